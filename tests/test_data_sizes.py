"""Shards of a fitting size: chosen before anything is tokenised, and none too short to be read."""

import json

import pytest

from data import fineweb, job, sizes
from data.fineweb import FineWebConfig, make
from data.sizes import choose_shard_tokens
from data.sources import expected_bytes, local_files
from data.tokenizer import encode_documents
from tests.documents import failing, made, read_independently, refused, texts, write_parquet
from tests.test_data_sources import write_as


def sizes_of(manifest: dict) -> list[int]:
    return [shard["tokens"] for shard in manifest["shards"]]


@pytest.mark.parametrize(
    ("text_bytes", "shard_tokens"),
    [(0, 1), (400, 25), (8_000, 500), (1_115_394, 14_000), (40_000, 1025), (2 * 10**9, 25_000_000),
     (8 * 10**9, 100_000_000), (45 * 10**12, 100_000_000)],
)
def test_a_twentieth_is_for_validation(text_bytes, shard_tokens):
    assert choose_shard_tokens(text_bytes) == shard_tokens


def test_a_small_source_gets_small_shards(tmp_path, capsys):
    documents = texts(3000)
    write_parquet(tmp_path / "a.parquet", documents)
    kept, manifest = made(tmp_path / "a.parquet", tmp_path / "out", shard_tokens=None)
    assert kept == documents
    val, *train = sizes_of(manifest)
    total = val + sum(train)
    assert 0.03 < val / total < 0.08
    assert set(train[:-1]) == {val}
    assert train[-1] >= val
    assert f"shards of {val:,} tokens; {val:,} are for validation" in capsys.readouterr().out
    make(FineWebConfig(tmp_path / "out", source=str(tmp_path / "a.parquet")))
    assert "is complete" in capsys.readouterr().out


def test_a_stopped_job_keeps_the_size_that_it_chose(corpus, tmp_path, monkeypatch, small_pieces):
    out, source = tmp_path / "out", corpus[0]
    with monkeypatch.context() as patch:
        patch.setattr(job, "tokenise", failing(job.tokenise, after=9))
        refused("on purpose", out=out, source=source, shard_tokens=None)
    progress = json.loads((out / ".progress.json").read_text())
    monkeypatch.setattr(fineweb, "choose_shard_tokens", lambda _: 7)
    kept, manifest = made(source, out, shard_tokens=None)
    assert kept == corpus[1]
    assert manifest["settings"] == progress["settings"]


def test_the_validation_shard_has_a_size_of_its_own(corpus, tmp_path):
    _, manifest = made(corpus[0], tmp_path / "out", val_tokens=300, shard_tokens=2000)
    val, *train = sizes_of(manifest)
    assert val == 300
    assert set(train[:-1]) == {2000}
    stream = read_independently(tmp_path / "out")
    assert stream == encode_documents(corpus[1]).tolist()
    refused("val_tokens was 300 and is 400", out=tmp_path / "out", source=corpus[0],
            val_tokens=400, shard_tokens=2000)
    refused("--val_tokens 0: expected 1 to", out=tmp_path / "none", source=corpus[0], val_tokens=0)


def test_no_last_shard_is_too_short_to_be_read(corpus, tmp_path, monkeypatch):
    """llm.c and build-nanogpt stop on a last shard of 5 tokens."""
    stream = encode_documents(corpus[1]).tolist()
    size = (len(stream) - 5) // 4
    tail = len(stream) % size
    assert 0 < tail < 10
    _, manifest = made(corpus[0], tmp_path / "out", shard_tokens=size)
    assert sizes_of(manifest) == [size, size, size, size + tail]
    assert read_independently(tmp_path / "out") == stream
    monkeypatch.setattr(sizes, "READER_TOKENS", tail)
    _, manifest = made(corpus[0], tmp_path / "enough", shard_tokens=size)
    assert sizes_of(manifest) == [size, size, size, size, tail]


def test_a_job_killed_while_it_lengthens_the_last_shard(corpus, tmp_path, monkeypatch):
    size = (len(encode_documents(corpus[1])) - 5) // 4
    made(corpus[0], tmp_path / "whole", shard_tokens=size)
    monkeypatch.setattr(job, "atomic_write", failing(job.atomic_write, after=4))
    refused("on purpose", out=tmp_path / "killed", source=corpus[0], shard_tokens=size)
    monkeypatch.undo()
    last = sorted((tmp_path / "killed").glob("*.bin"))[-2]
    assert last.stat().st_size > 1024 + 2 * size  # it has its name, and no line in the progress
    made(corpus[0], tmp_path / "killed", shard_tokens=size)
    for path in sorted((tmp_path / "whole").glob("[!.]*")):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


def test_too_large_a_shard_is_refused_before_anything_is_tokenised(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "GUESSED_BYTES", 1000)
    monkeypatch.setattr(job, "tokenise", failing(job.tokenise, after=0))
    write_parquet(tmp_path / "a.parquet", texts(300))
    refused("nothing is left to train on: --shard_tokens 1,025 suits", out=tmp_path / "out",
            source=str(tmp_path / "a.parquet"), shard_tokens=100_000_000)


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "jsonl.gz"])
def test_the_guess_of_a_small_source_is_right(tmp_path, ending):
    documents = texts(300)
    write = write_parquet if ending == "parquet" else write_as
    write(tmp_path / f"a.{ending}", documents)
    guess = expected_bytes(local_files(str(tmp_path / f"a.{ending}")), "text")
    # parquet's first rows are all of them, with 8 bytes of offset each
    assert guess == pytest.approx(sum(len(text.encode()) for text in documents), rel=0.1)
