"""--data.val_text: a run is validated on a text of its own, and holds nothing back for that."""

import json

import numpy as np
import pytest
import torch

from data import corpus
from data.dataset import DataConfig, fingerprint, open_data
from data.shards import open_folder, write_folder
from data.tokenizer import EOT_TEXT, encode_documents
from launch.errors import BadInput
from launch.folder import require_same_run
from launch.tracker import read_rows
from model.checkpoint import load_model
from train_gpt2 import train

T = 16


@pytest.fixture
def val_text(tmp_path):
    path = tmp_path / "held.txt"
    path.write_text("In the beginning was the word, and it was held out.\n" * 40)
    return path


def tokens(stream) -> np.ndarray:
    return stream.read(0, len(stream))


def test_a_text_is_trained_on_whole_and_the_other_validated_on(corpus_file, val_text):
    data = open_data(DataConfig(text=str(corpus_file), val_text=str(val_text)))
    assert np.array_equal(tokens(data.train), encode_documents([corpus_file.read_text()]))
    assert np.array_equal(tokens(data.val), encode_documents([val_text.read_text()]))
    assert data.name == "held.txt"


def test_of_the_embedded_corpus_too_nothing_is_held_out(val_text):
    data = open_data(DataConfig(dir="", val_text=str(val_text)))
    assert np.array_equal(tokens(data.train), encode_documents(corpus.bible_chapters()))
    assert len(data.train) == sum(map(len, corpus.embedded()))
    assert np.array_equal(tokens(data.val), encode_documents([val_text.read_text()]))


def test_a_folder_needs_no_validation_shard_then(val_text, tmp_path):
    shard = np.arange(100, dtype=np.uint16)
    write_folder(tmp_path / "toy", "toy", [shard, shard + 1], shard, "toy")
    config = DataConfig(dir=str(tmp_path / "toy"), val_text=str(val_text))
    with_shard = open_data(config)
    (tmp_path / "toy" / "toy_val_000000.bin").unlink()
    (tmp_path / "toy" / "manifest.json").unlink()
    without = open_data(config)
    for data in (with_shard, without):
        assert tokens(data.train).tolist() == [*range(100), *range(1, 101)]
        assert np.array_equal(tokens(data.val), encode_documents([val_text.read_text()]))
        assert data.name == "held.txt"
    with pytest.raises(BadInput, match="holds no validation shard"):
        open_folder(tmp_path / "toy")


def test_endoftext_ends_documents_in_both_texts(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(f"one{EOT_TEXT}two")
    (tmp_path / "b.txt").write_text(f"three{EOT_TEXT}four{EOT_TEXT}\n")
    named = DataConfig(text=str(tmp_path / "a.txt"), val_text=str(tmp_path / "b.txt"))
    data = open_data(named)
    assert np.array_equal(tokens(data.train), encode_documents(["one", "two"]))
    assert np.array_equal(tokens(data.val), encode_documents(["three", "four"]))
    assert f"b.txt: 2 {EOT_TEXT} in it" in capsys.readouterr().out
    (tmp_path / "b.txt").write_text(EOT_TEXT)
    with pytest.raises(BadInput, match=r"b\.txt holds nothing but <\|endoftext\|>"):
        open_data(named)


def test_only_the_training_data_is_cut_at_documents(corpus_file, val_text):
    data = open_data(DataConfig(text=str(corpus_file), val_text=str(val_text), align="documents"))
    assert (data.train.align, data.val.align) == ("documents", "stream")
    assert fingerprint(data.train).endswith(", cut at documents")
    assert not fingerprint(data.val).endswith(", cut at documents")


def test_a_text_that_is_trained_on_too_gets_a_warning(corpus_file, val_text, tmp_path, capsys):
    own = corpus_file.read_text()
    part = tmp_path / "part.txt"
    for text in (own, "\ufeff" + own[2000:5000]):
        part.write_text(text, encoding="utf-8")
        open_data(DataConfig(text=str(corpus_file), val_text=str(part)))
        assert f"warning: --data.val_text {part} is part of --data.text" in capsys.readouterr().out
    open_data(DataConfig(text=str(corpus_file), val_text=str(val_text)))
    assert capsys.readouterr().out == ""


def test_a_missing_one_is_named(corpus_file, tmp_path):
    with pytest.raises(BadInput, match=r"can't read the text .*none\.txt"):
        open_data(DataConfig(text=str(corpus_file), val_text=str(tmp_path / "none.txt")))


def test_a_run_is_judged_on_it_and_goes_on_with_no_other(
    tiny, corpus_file, val_text, tmp_path, capsys
):
    data = DataConfig(text=str(corpus_file), val_text=str(val_text))
    config = tiny(steps=2, eval_every=1, data=data, dtype="fp32")
    assert train(config) == 0
    run = tmp_path / "tiny"
    row = [row for row in read_rows(run / "metrics.jsonl") if "val_loss" in row][-1]
    held = torch.from_numpy(encode_documents([val_text.read_text()]).astype(np.int64))
    context = config.model.n_ctx
    count = min(config.evaluation.val_tokens, len(held) - 1) // context
    inputs = held[: count * context].view(count, context)  # (B, T)
    targets = held[1 : count * context + 1].view(count, context)  # (B, T)
    with torch.no_grad():
        loss = load_model(str(run))(inputs, targets).item()
    assert row["val_loss"] == pytest.approx(loss, abs=1e-5)  # two orders of adding up fp32
    assert row["val_set"] == f"held.txt, {count * context:,} tokens"
    assert f"validates on held.txt, {count * context:,} tokens" in capsys.readouterr().out

    with pytest.raises(SystemExit) as leaving:  # the same once more: finished, and no other run
        train(config)
    assert leaving.value.code == 0
    other = tmp_path / "other.txt"
    other.write_text("Another text, and another loss.\n" * 60)
    with pytest.raises(BadInput, match=r"another run: validation data .* there, .* asked\. "):
        train(tiny(steps=2, data=DataConfig(text=str(corpus_file), val_text=str(other))))
    with pytest.raises(BadInput, match="training data .*; validation data "):
        train(tiny(steps=2))
    val_text.rename(tmp_path / "moved.txt")  # it's the same text
    moved = DataConfig(text=str(corpus_file), val_text=str(tmp_path / "moved.txt"))
    with pytest.raises(SystemExit) as leaving:
        train(tiny(steps=2, data=moved))
    assert leaving.value.code == 0


def test_a_run_older_than_the_flag_goes_on_without_it(tmp_path):
    settings = {"init": "", "data": {"val_text": ""}}
    (tmp_path / "config.json").write_text(json.dumps({"config": settings, "must_match": {}}))
    asked = {"config": settings, "must_match": {"validation data": "320 tokens (0a1b)"}}
    require_same_run(tmp_path, asked)
    asked["config"] = {"init": "", "data": {"val_text": "held.txt"}}
    with pytest.raises(BadInput, match="validation data None there, 320 tokens"):
        require_same_run(tmp_path, asked)
