"""Bad settings, texts, shards, checkpoints and disks get one clear line, and nothing is lost."""

import json
import lzma
from dataclasses import asdict, replace

import pytest
from safetensors.torch import load_file

import train_gpt2
from data.corpus import read_text
from data.dataset import DataConfig
from data.shards import read_manifest, write_folder
from data.tokenizer import encode_documents
from eval import sample, tasks
from eval.choice import read_rows as read_questions
from launch import cli
from launch.errors import BadInput, Failed
from launch.tracker import read_rows
from model import checkpoint, saving
from model.checkpoint import read_config
from model.formats import hf
from model.gpt2 import GPTConfig
from tests.running import run_program
from train_gpt2 import PRESETS, TrainConfig, train


@pytest.mark.parametrize("prompt", ["-x", "--steps 3", "- a list\n- of two", "=", "", " ", "'\""])
def test_any_prompt_comes_back_from_a_config_file(prompt, tiny, tmp_path):
    config = tiny(prompt=prompt)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": asdict(config)}))
    assert cli.parse(TrainConfig, PRESETS, [str(path)]) == config


def test_a_config_file_may_begin_with_a_byte_order_mark(tiny, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(asdict(tiny()), indent=1), encoding="utf-8-sig", newline="\r\n")
    assert cli.parse(TrainConfig, PRESETS, [str(path)]) == tiny()


@pytest.mark.parametrize("group", ["exam", "evaluation"])
def test_a_config_file_of_before_its_group_was_renamed_is_read(group, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": {group: {"eval_every": 7}}}))
    assert cli.parse(TrainConfig, PRESETS, [str(path), "--eval_every", "7"]) == cli.parse(
        TrainConfig, PRESETS, [str(path)])


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is no JSON"), (b"{'steps': 1}", "is no JSON"), (b"\xff\xfe\x00", "is no JSON"),
    (b"[1]", "expected an object of settings"), (b"[" * 100_000, "brackets in brackets"),
    (b'{"name": "a\\u0000b"}', "holds a zero character"),
], ids=["empty", "quotes", "bytes", "list", "deep", "zero"])
def test_a_config_file_that_is_none(content, words, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadInput, match=words):
        cli.parse(TrainConfig, PRESETS, [str(tmp_path / "config.json")])


def test_a_wrong_key_in_a_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": {"optim": {"rl": 1}}}))
    done = run_program([str(path)])
    assert done.returncode == 2
    assert "--optim.rl" in done.stderr
    assert "--optim.lr" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b" \n ", "is empty"), (b"\xff\xfe\x00abc", "no UTF-8 text: byte 0xff"),
     (b"text \x00 text", "is binary"), (b"x", "too short to hold out")],
)
def test_a_text_that_is_none(tiny, tmp_path, content, words):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(BadInput, match=words):
        train(tiny(data=DataConfig(text=str(tmp_path / "bad.txt"))))


@pytest.fixture
def shards(tmp_path, corpus_file):
    tokens = encode_documents([corpus_file.read_text()])
    folder = tmp_path / "shards"
    write_folder(folder, "toy", [tokens[1000:3000], tokens[3000:]], tokens[:1000], "toy")
    return folder


def test_shards_are_trained_on(tiny, tmp_path, shards):
    assert train(tiny(data=DataConfig(dir=str(shards)))) == 0
    rows = read_rows(tmp_path / "tiny" / "metrics.jsonl")
    assert rows[0]["val_set"] == "toy, 320 tokens"


def test_a_damaged_validation_shard_stops_the_run_before_it_starts(tiny, tmp_path, shards):
    path = shards / "toy_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x00\x00")
    with pytest.raises(BadInput, match="sha256 differs"):
        train(tiny(data=DataConfig(dir=str(shards))))
    assert not (tmp_path / "tiny").exists()


def test_a_damaged_train_shard_stops_the_run_after_a_save(tiny, tmp_path, shards):
    path = shards / "toy_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x00\x00")
    # Whichever shard comes first: the run ends where the damaged one would be read.
    config = tiny(data=DataConfig(dir=str(shards)), steps=40, eval_every=100, save_every=100,
                  optim=replace(tiny().optim, warmup_steps=1))
    with pytest.raises(BadInput, match=r"toy_train_000002\.bin is not the file"):
        train(config)
    done = len([r for r in read_rows(tmp_path / "tiny" / "metrics.jsonl") if "train_loss" in r])
    newest = checkpoint.newest_valid(tmp_path / "tiny" / "checkpoints")[0]
    assert newest.name == f"step_{done:08d}"


def test_a_validation_set_shorter_than_a_sequence(tiny):
    with pytest.raises(BadInput, match="shorter than one sequence"):
        train(tiny(val_tokens=10))


def test_resuming_with_another_shape_lists_what_differs(tiny):
    train(tiny(steps=1))
    other = GPTConfig(n_layer=3, n_head=2, n_embd=32, n_ctx=16)
    with pytest.raises(BadInput, match="model.n_layer 2 there, 3 asked; steps 1 there, 6 asked"):
        train(tiny(model=other))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch_tokens": 24 * 16}, {"steps": 9, "seed": 1}, {"dtype": "fp64"}],
    ids=str,
)
def test_resuming_another_run_is_refused(tiny, change):
    train(tiny(steps=2))
    with pytest.raises(BadInput, match="belongs to another run"):
        train(tiny(**({"steps": 2} | change)))


def test_resuming_on_other_data_is_refused(tiny, tmp_path):
    train(tiny(steps=2))
    (tmp_path / "other.txt").write_text("another text altogether\n" * 500)
    with pytest.raises(BadInput, match="training data"):
        train(tiny(steps=2, data=DataConfig(text=str(tmp_path / "other.txt"))))


def test_resuming_with_sequences_cut_otherwise_is_refused(tiny, corpus_file):
    train(tiny(steps=2))
    with pytest.raises(BadInput, match="training data .* there, .*, cut at documents asked"):
        train(tiny(steps=2, data=DataConfig(text=str(corpus_file), align="documents")))


def test_what_may_change_on_resume_may(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "finish", lambda run, step, last_step: 0)
    whole = tiny(name="whole")
    train(whole)
    train(tiny())
    checkpoint.remove(tmp_path / "tiny" / "checkpoints" / "step_00000006")
    assert train(tiny(micro_batch=5, eval_every=2, save_every=2, keep=5, val_tokens=160)) == 0


def test_resume_never_refuses_a_used_folder(tiny):
    train(tiny(steps=1))
    with pytest.raises(BadInput, match="--resume never"):
        train(tiny(steps=1, resume="never"))


def test_going_back_past_a_later_checkpoint_needs_another_name(tiny, tmp_path):
    train(tiny())
    early = str(tmp_path / "tiny" / "checkpoints" / "step_00000003")
    with pytest.raises(BadInput, match="choose another --name"):
        train(tiny(resume=early))
    assert train(tiny(resume=early, name="branch")) == 0
    with pytest.raises(SystemExit):  # the same command again: finished, and not a conflict
        train(tiny(resume=early, name="branch"))


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tiny, tmp_path):
    wild = replace(tiny().optim, lr=1e18, warmup_steps=0)
    with pytest.raises(Failed, match="the loss is nan"):
        train(tiny(optim=wild, steps=20, save_every=1, eval_every=100))
    saved = load_file(
        checkpoint.newest_valid(tmp_path / "tiny" / "checkpoints")[0] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert "NaN" not in (tmp_path / "tiny" / "metrics.jsonl").read_text()


def test_init_of_another_shape_is_refused(tiny, tmp_path):
    train(tiny(steps=1))
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=16)
    with pytest.raises(BadInput, match=r"another shape than this run's: add --model.n_layer 2$"):
        train(tiny(name="other", model=shape, init=str(tmp_path / "tiny")))


def test_a_disk_that_fills_in_mid_run_is_reported_and_training_goes_on(tiny, tmp_path, monkeypatch,
                                                                      capsys):
    original, calls = saving.write_manifest, []

    def full_once(folder, progress):
        calls.append(folder)
        if len(calls) == 2:  # step 3; step 0 was saved
            raise OSError(28, "No space left on device")
        original(folder, progress)

    monkeypatch.setattr(saving, "write_manifest", full_once)
    assert train(tiny()) == 0
    printed = capsys.readouterr().out
    assert "No space left on device; training goes on" in " ".join(printed.split())
    names = sorted(p.name for p in (tmp_path / "tiny" / "checkpoints").iterdir())
    assert names == ["step_00000000", "step_00000006"]
    events = [r["event"] for r in read_rows(tmp_path / "tiny" / "metrics.jsonl") if "event" in r]
    assert "checkpoint failed" in events[0]


def test_a_disk_that_is_full_at_the_start_stops_the_run(tiny, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_manifest", full)
    with pytest.raises(Failed, match="No space left"):
        train(tiny())
    assert Failed("").exit_code == 1


HF_CONFIG = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 50257}
ROW = {"step": 1, "tokens": 8, "val_loss": 3.0}
MARKED = {  # what people write or edit by hand: file, content, what reads it
    "prompts": ("a.txt", "Once upon a time\nThe cat\n", sample.read_prompts),
    "text to judge": ("a.txt", "Once upon a time", tasks.read_text),
    "text to train on": ("a.txt", "Once upon a time", read_text),
    "questions": ("a.jsonl", '{"ctx": 1}\n{"ctx": 2}\n', lambda path: read_questions(path, dict)),
    "shards": ("manifest.json", '{"shards": []}', lambda path: read_manifest(path.parent)),
    "checkpoint": ("config.json", '{"config": {}}', lambda path: read_config(path.parent)),
    "of HF": ("config.json", json.dumps(HF_CONFIG), lambda path: hf.read_config(path.parent)),
    "metrics": ("metrics.jsonl", json.dumps(ROW) + "\n", read_rows),
}


@pytest.mark.parametrize("case", MARKED)
def test_a_byte_order_mark_changes_nothing(case, tmp_path):
    """Notepad and PowerShell write one before UTF-8."""
    name, content, read = MARKED[case]
    results = []
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_text(content, encoding=encoding)
        results.append(read(tmp_path / name))
    assert results[0]
    assert results[0] == results[1]


def test_compressed_questions_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b'\xef\xbb\xbf{"ctx": 1}\n'))
    assert read_questions(tmp_path / "a.jsonl.xz", dict) == [{"ctx": 1}]
