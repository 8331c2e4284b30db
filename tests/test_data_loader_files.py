"""Batches out of files: the same from every format, and an error where a file is cut or gone."""

import json
import os
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch

import data.stream
from data.dataset import DataConfig, fingerprint, open_data
from data.loader import Loader, Stream, validation_batch, validation_sequences
from data.shards import convert, open_folder, write_folder
from data.tokenizer import EOT, encode_documents
from launch import cli
from launch.errors import BadInput
from launch.tracker import read_rows
from model import checkpoint
from tests.streams import T, batches, make, stream
from train_gpt2 import PRESETS, TrainConfig, train


def test_every_format_is_aligned_alike_and_validation_is_not(tmp_path):
    tokens = stream(60, documents=(1, 9, 2, 30)).read(0, 60)
    write_folder(tmp_path / "llmc", "toy", [tokens[:25], tokens[25:]], tokens[:20], "toy")
    convert(tmp_path / "llmc", "npy")
    convert(tmp_path / "llmc", "nanogpt")
    seen = []
    for folder in ("llmc", "llmc-npy", "llmc-nanogpt"):
        data = open_data(DataConfig(dir=str(tmp_path / folder), align="documents"))
        loader = make(data.train, 1)
        taken = sorted(loader.sequences_of_step(step)[0] for step in range(loader.sequences))
        assert taken == list(range(loader.sequences))
        seen.append([loader.stream.rows(loader.aligned_starts, T + 1).tolist(), data.val.align])
        loader.close()
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][1] == "stream"
    assert seen[0][0][0] == [EOT, *range(2, 6)]


def test_how_sequences_are_cut_belongs_to_the_training_data(corpus_file):
    plain = fingerprint(open_data(DataConfig(text=str(corpus_file))).train)
    aligned = fingerprint(open_data(DataConfig(text=str(corpus_file), align="documents")).train)
    assert aligned == plain + ", cut at documents"


def test_a_damaged_shard_is_found_before_a_token_of_it_is_used(tmp_path):
    tokens = np.arange(40, dtype=np.uint16)
    write_folder(tmp_path, "toy", [tokens, tokens], tokens, "toy")
    path = tmp_path / "toy_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x00\x00")
    train, _, _ = open_folder(tmp_path)
    loader = make(Stream(train), 1)
    good = {i for i in range(loader.sequences) if i * T + T < 40}
    for step in range(loader.sequences):
        if int(loader.sequences_of_step(step)[0]) in good:
            loader._read_batch(step)
        else:
            with pytest.raises(BadInput, match="sha256 differs"):
                loader._read_batch(step)
    loader.close()


@pytest.fixture(params=["in memory", "too large for it"])
def toy(request, tmp_path, monkeypatch):
    """Two train shards of 40 tokens in files, read either way."""
    if request.param == "too large for it":
        monkeypatch.setattr(data.stream, "IN_MEMORY", 0)
    tokens = np.arange(80, dtype=np.uint16)
    write_folder(tmp_path / "toy", "toy", [tokens[:40], tokens[40:]], tokens, "toy")
    return tmp_path / "toy"


def test_files_give_the_rows_of_arrays(toy):
    train, val, _ = open_folder(toy)
    expected = batches(make(stream(40, 40), 2), range(12))
    assert all(map(torch.equal, batches(make(Stream(train), 2), range(12)), expected))
    assert validation_sequences(Stream(val), T, 10**9) == 19
    assert validation_batch(Stream(val), T, [0, 18]).tolist() == [[*range(5)], [*range(72, 77)]]


def test_a_shard_cut_short_in_mid_run_is_an_error_and_no_sigbus(toy):
    loader = make(Stream(open_folder(toy)[0]), 1)
    for step in range(loader.sequences):
        loader.get_batch(step)
    for path in toy.glob("*_train_*"):
        os.truncate(path, 1024)
    loader.load_skipped_batches([])  # forgets what was read ahead
    batch, _, error = loader.try_get_batch(0)
    assert batch.shape == loader.batch_shape and not batch.any()
    assert re.search(r"toy_train_00000.\.bin ends after 1,0\d\d bytes and had 1,104", str(error))
    loader.close()


def test_a_shard_that_vanished_in_mid_run_is_an_error(toy):
    loader = make(Stream(open_folder(toy)[0]), 1)
    loader.get_batch(0)
    for path in toy.glob("*_train_*"):
        path.unlink()
    loader.load_skipped_batches([])
    *_, error = loader.try_get_batch(0)
    assert "No such file" in str(error)
    loader.close()


def test_an_evaluation_in_mid_run_needs_no_disk(tmp_path):
    tokens = np.arange(80, dtype=np.uint16)
    write_folder(tmp_path, "toy", [tokens], tokens, "toy")
    val = Stream(open_folder(tmp_path)[1])
    assert validation_sequences(val, T, 40) == 10
    os.truncate(tmp_path / "toy_val_000000.bin", 0)
    assert validation_batch(val, T, [0, 9]).tolist() == [[*range(5)], [*range(36, 41)]]


def test_a_shard_cut_short_stops_the_run_after_a_save(tiny, tmp_path, corpus_file, monkeypatch):
    """The line and the checkpoint that a shard gets whose hash is wrong."""
    tokens = encode_documents([corpus_file.read_text()])
    write_folder(tmp_path / "toy", "toy", [tokens[1000:]], tokens[:1000], "toy")
    read = Loader.get_batch

    def get_batch(loader, step):
        if step == 3:
            os.truncate(tmp_path / "toy" / "toy_train_000001.bin", 2000)
        return read(loader, step)

    monkeypatch.setattr(Loader, "get_batch", get_batch)
    config = tiny(data=DataConfig(dir=str(tmp_path / "toy")), steps=40, eval_every=100,
                  save_every=100)
    with pytest.raises(BadInput, match=r"toy_train_000001\.bin ends after 2,000 bytes"):
        train(config)
    done = len([r for r in read_rows(tmp_path / "tiny" / "metrics.jsonl") if "train_loss" in r])
    assert 3 <= done <= 5  # a batch or two were read ahead
    newest = checkpoint.newest_valid(tmp_path / "tiny" / "checkpoints")[0]
    assert newest.name == f"step_{done:08d}"


def test_a_text_and_a_folder_are_not_both_taken(corpus_file):
    with pytest.raises(BadInput, match=r"--data\.dir x and --data\.text y are both given"):
        open_data(DataConfig(dir="x", text="y"))
    arguments = ["gpt2-124m", "--data.dir", "fineweb10B", "--data.text", str(corpus_file)]
    with pytest.raises(BadInput, match="are both given"):
        train(cli.parse(TrainConfig, PRESETS, arguments))


@pytest.mark.parametrize(
    ("preset", "flags", "expected"),
    [("gpt2-124m", [], ("fineweb10B", "")), ("gpt2-124m", ["--data.text", "y"], ("", "y")),
     ("gpt2-124m", ["--data.dir", ""], ("", "")), ("demo", [], ("", "")),
     ("demo", ["--data.text", "y"], ("", "y")), ("demo", ["--data.dir", "x"], ("x", ""))],
)
def test_where_the_tokens_come_from(tmp_path, preset, flags, expected):
    config = cli.parse(TrainConfig, PRESETS, [preset, *flags]).data
    resolved = config.resolve()
    assert (resolved.dir, resolved.text) == expected
    again = tmp_path / "config.json"  # a run's file starts the same run
    again.write_text(json.dumps({"config": {"data": asdict(config)}}))
    assert cli.parse(TrainConfig, PRESETS, [str(again)]).data == config
