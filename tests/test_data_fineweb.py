"""FineWeb to shards: every document, in order, the same bytes however often the job is killed."""

import gzip
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import fineweb, sources
from data.counts import count_duplicates
from data.fineweb import FineWebConfig, make
from data.shards import open_folder
from data.tokenizer import EOT, decode, encode_documents
from launch.errors import BadInput, Failed, FolderInUse
from launch.files import folder_lock
from tests import baseline
from tests.running import ROOT, environment

WORDS = ["spirit", "of", "god", "hovering", "over", "the", "deep", "—", "and", "it's", "¿señor?"]


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 0 to 60 words; every 50th is empty, every 7th repeats the one before it."""
    rng = random.Random(seed)
    made: list[str] = []
    for i in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randrange(1, 60)))
        made.append("" if i % 50 == 49 else made[-1] if i % 7 == 6 else text)
    return made


def write_parquet(path: Path, documents: list[str | None], rows: int = 30) -> None:
    table = pa.table({"id": range(len(documents)), "text": pa.array(documents, pa.string())})
    pq.write_table(table, path, row_group_size=rows)


@pytest.fixture
def corpus(tmp_path) -> tuple[str, list[str]]:
    """(the pattern, the documents) of three parquet files."""
    documents = texts(300)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(3):
        write_parquet(folder / f"{i}.parquet", documents[i * 100 : i * 100 + 100])
    return str(folder / "*.parquet"), documents


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 4_000)


def run(source: str, out: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(source, out, *arguments), env=environment(**env), cwd=ROOT,
                          capture_output=True, text=True, timeout=120)


def command(source: str, out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "data.fineweb", "--source", source, "--out", str(out),
            "--shard_tokens", "1000", *arguments]


def read_independently(out: Path) -> list[int]:
    """All tokens of a folder, from llm.c's description of the format and not from our code."""
    stream: list[int] = []
    for number, path in enumerate(sorted(out.glob("*.bin"), key=lambda path: path.stem[-6:])):
        assert path.name == f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"
        content = path.read_bytes()
        magic, version, count, *rest = struct.unpack("<256i", content[:1024])
        assert (magic, version, any(rest)) == (20240520, 1, False)
        stream += struct.unpack(f"<{count}H", content[1024:])
    return stream


def contents(out: Path) -> dict[str, bytes]:
    """Every file that a job leaves behind but its lock."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def test_the_shards_are_the_documents_in_order(corpus, tmp_path):
    source, documents = corpus
    out = tmp_path / "out"
    make(FineWebConfig(out, source=source, shard_tokens=1000))
    stream = read_independently(out)
    assert stream == encode_documents(documents).tolist()
    ends = [i for i, token in enumerate(stream) if token == EOT] + [len(stream)]
    assert [decode(stream[a + 1 : b]) for a, b in zip(ends, ends[1:], strict=False)] == documents
    train, val, name = open_folder(out)
    assert [len(shard.tokens) for shard in val + train[:-1]] == [1000] * len(train)
    assert name == "fineweb from local files"
    for shard in val + train:
        shard.check()


def test_the_manifest_describes_shards_and_data(corpus, tmp_path, capsys):
    source, documents = corpus
    out = tmp_path / "out"
    make(FineWebConfig(out, source=source, shard_tokens=1000))
    manifest = json.loads((out / "manifest.json").read_text())
    for entry in manifest["shards"]:
        content = (out / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["documents"] == content[1024:].count(struct.pack("<H", EOT))
    sizes = [len(text.encode()) for text in documents]
    foreign = sum(byte > 127 for text in documents for byte in text.encode())
    tokens = len(encode_documents(documents))
    assert manifest["statistics"] == {
        "documents": 300, "tokens": tokens, "text_bytes": sum(sizes), "non_ascii_bytes": foreign,
        "empty": documents.count(""), "longer_than_100k_tokens": 0,
        "longest_tokens": max(len(encode_documents([text])) - 1 for text in documents),
        "duplicates": 300 - len(set(documents)),
        "non_ascii_share": round(foreign / sum(sizes), 6),
        "tokens_per_byte": round(tokens / sum(sizes), 6),
    }
    assert manifest["files"] == [[f"{i}.parquet", os.path.getsize(source.replace("*", str(i)))]
                                 for i in range(3)]
    printed = capsys.readouterr().out
    assert "GB of disk needed" in printed
    assert f"300 documents: {documents.count('')} empty" in printed
    make(FineWebConfig(out, source=source, shard_tokens=1000))
    assert "is complete" in capsys.readouterr().out


def test_without_fastokens_tiktoken_writes_the_same_bytes(corpus, tmp_path, monkeypatch, capsys):
    make(FineWebConfig(tmp_path / "fast", source=corpus[0], shard_tokens=1000, workers=2))
    monkeypatch.setitem(sys.modules, "fastokens", None)
    make(FineWebConfig(tmp_path / "slow", source=corpus[0], shard_tokens=1000, workers=2))
    assert "pip install fastokens" in capsys.readouterr().out
    assert contents(tmp_path / "fast") == contents(tmp_path / "slow")


JOBS = """
import itertools, json, os, random, signal, sys, threading
from pathlib import Path
from data import fineweb, shards, sources, tokenise, tokenizer
import fastokens, pyarrow.compute, pyarrow.parquet
tokenizer.encoding(), tokenise.tokenizer_json()  # built once for all
sources.PIECE_BYTES = 4_000
source, jobs = sys.argv[1], json.loads(sys.argv[2])

def dying(call, instants):
    def maybe(*args, **kwargs):
        if next(instants, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return maybe

def run(out, workers, seed):
    if seed is not None:  # dies before one of the things that it does to a piece or the disk
        last = random.Random(seed).randrange(1, 30 if seed % 4 else 90)
        instants = iter(range(last))
        for owner, name in [
            (shards.ShardWriter, "_write"), (shards, "fsync"), (shards.os, "fsync"),
            (shards.Path, "replace"), (fineweb, "atomic_write"), (fineweb, "tokenise"),
            (fineweb.Job, "_add"), (fineweb, "count_duplicates"),
        ]:
            setattr(owner, name, dying(getattr(owner, name), instants))
    fineweb.make(fineweb.FineWebConfig(
        Path(out), source=source, shard_tokens=1000, workers=workers))

for out, workers, seed in jobs:
    child = os.fork()  # importing takes longer than the job
    if child == 0:
        code = 1
        try:
            run(out, workers, seed)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    print("code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_jobs(source: str, jobs: list[tuple[Path, int, int | None]]) -> list[int]:
    """Exit codes of jobs (out, workers, seed of the instant to be killed at), one after another."""
    listed = json.dumps([(str(out), workers, seed) for out, workers, seed in jobs])
    done = subprocess.run([sys.executable, "-c", JOBS, source, listed], env=environment(),
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [int(line[5:]) for line in done.stdout.splitlines() if line.startswith("code ")]


def test_any_number_of_workers_writes_the_same_bytes(corpus, tmp_path):
    jobs = [(tmp_path / str(workers), workers, None) for workers in (1, 2, 5)]
    assert run_jobs(corpus[0], jobs) == [0, 0, 0]
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


def test_20_kills_and_the_shards_are_those_of_a_job_never_killed(corpus, tmp_path):
    """Six folders, each killed again and again at instants drawn from a seed, then finished."""
    source, documents = corpus
    whole = tmp_path / "whole"
    jobs = [(tmp_path / f"killed{seed // 4}", 1 + seed % 2, seed) for seed in range(24)]
    ends = [(tmp_path / f"killed{i}", 2, None) for i in range(6)]
    codes = run_jobs(source, [(whole, 2, None), *jobs, *ends])
    assert codes.count(-signal.SIGKILL) >= 20
    assert set(codes) <= {0, -signal.SIGKILL}
    assert codes[-6:] == [0] * 6
    for out, _, _ in ends:
        assert contents(out) == contents(whole)
    assert read_independently(whole) == encode_documents(documents).tolist()


def test_a_killed_job_keeps_its_finished_shards(corpus, tmp_path):
    out = tmp_path / "out"
    kept: list[dict] = []
    for seed in (1, 2, 3, 5, 6, 7, 9, 10, 11):  # each job gets some operations further
        assert run_jobs(corpus[0], [(out, 2, seed)]) == [-signal.SIGKILL]
        progress = out / ".progress.json"
        kept = json.loads(progress.read_text())["shards"] if progress.exists() else []
        if len(kept) > 1:
            break
    assert len(kept) > 1
    assert not (out / "manifest.json").exists()
    before = {entry["file"]: (out / entry["file"]).stat().st_ino for entry in kept}
    make(FineWebConfig(out, source=corpus[0], shard_tokens=1000))
    assert before == {name: (out / name).stat().st_ino for name in before}
    assert read_independently(out) == encode_documents(corpus[1]).tolist()


def write_as(path: Path, documents: list[str]) -> None:
    """Documents in the format that the name asks for."""
    lines = "".join(json.dumps({"text": text}) + "\n\n" for text in documents).encode()
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines[:999]) + gzip.compress(lines[999:]))  # two members
    elif path.name.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines)
    else:
        path.write_bytes(lines)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines_are_read_and_resumed(tmp_path, ending, small_pieces, monkeypatch):
    documents = texts(200)
    write_as(tmp_path / f"a.{ending}", documents[:150])
    write_as(tmp_path / f"b.{ending}", documents[150:])
    config = FineWebConfig(tmp_path / "out", source=str(tmp_path / f"*.{ending}"),
                           shard_tokens=700)
    monkeypatch.setattr(fineweb, "tokenise", failing(fineweb.tokenise, after=5))
    with pytest.raises(Failed, match="on purpose"):
        make(config)
    monkeypatch.undo()
    assert json.loads((tmp_path / "out" / ".progress.json").read_text())["shards"]
    make(config)
    assert read_independently(tmp_path / "out") == encode_documents(documents).tolist()


def failing(call, after: int):
    calls = iter(range(after))

    def maybe(*args):
        if next(calls, None) is None:
            raise Failed("on purpose")
        return call(*args)

    return maybe


def test_a_txt_file_is_one_document(tmp_path):
    documents = ["one " * 50, "two\n\nthree " * 40]
    for i, text in enumerate(documents):
        (tmp_path / f"{i}.txt").write_text(text)
    make(FineWebConfig(tmp_path / "out", source=str(tmp_path / "*.txt"), shard_tokens=90))
    assert read_independently(tmp_path / "out") == encode_documents(documents).tolist()


def test_missing_texts_and_half_characters_become_documents(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", None, "two"] * 10)
    (tmp_path / "b.jsonl").write_text('{"text": null}\n{"text": "x\\ud800y"}\n')
    make(FineWebConfig(tmp_path / "out", source=str(tmp_path / "*.*"), shard_tokens=20))
    expected = ["one", "", "two"] * 10 + ["", "x\ufffdy"]
    assert read_independently(tmp_path / "out") == encode_documents(expected).tolist()


def test_a_huge_row_group_is_read_in_batches(tmp_path, monkeypatch, small_pieces):
    monkeypatch.setattr(sources, "LARGE_GROUP_BYTES", 6_000)
    documents = texts(400)
    rng = random.Random(1)
    documents = [text + "".join(rng.choices("abcdefgh ", k=80)) for text in documents]
    write_parquet(tmp_path / "a.parquet", documents, rows=200)
    files = sources.local_files(str(tmp_path / "a.parquet"))
    found = list(sources.pieces(files, "text"))
    assert len(found) > 4
    assert [text for piece in found for text in piece.load().to_pylist()] == documents
    # From any document on, the pieces that hold it and all after it.
    for start in (0, 1, 77, 199, 200, 399):
        later = list(sources.pieces(files, "text", 0, start))
        assert later[0].first <= start < later[0].first + later[0].count
        rest = [text for piece in later for text in piece.load().to_pylist()]
        assert rest[start - later[0].first :] == documents[start:]


def refused(line: str, error: type[BadInput] = BadInput, **settings) -> None:
    with pytest.raises(error, match=line):
        make(FineWebConfig(**({"shard_tokens": 1000} | settings)))


def test_bad_sources_are_one_clear_line(corpus, tmp_path):
    out, source = tmp_path / "out", corpus[0]
    refused("no such file", out=out, source=str(tmp_path / "none*.parquet"))
    refused(r"no column 'body'; --column takes one of: id, text", out=out, source=source,
            column="body")
    refused("holds int64, and documents are strings", out=out, source=source, column="id")
    (tmp_path / "x.csv").write_text("a,b")
    refused(r"x\.csv: documents are read from \.parquet", out=out, source=str(tmp_path / "x.csv"))
    (tmp_path / "x.jsonl").write_text('{"content": "a"}\n')
    refused(r"document 1 has no 'text'; --column takes one of: content", out=out,
            source=str(tmp_path / "x.jsonl"))
    write_parquet(tmp_path / "empty.parquet", [])
    refused(r"empty\.parquet: no documents", out=out, source=str(tmp_path / "empty.parquet"))
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(r"empty\.jsonl: no documents", out=out, source=str(tmp_path / "empty.jsonl"))
    refused("nothing is left to train on: --shard_tokens", out=out, source=source,
            shard_tokens=10**8)
    refused("at least 1", out=out, source=source, shard_tokens=0)
    refused("at least 1", out=out, source=source, workers=0)
    assert not list(out.glob("*.bin")) + list(out.glob(".*.tmp"))


def test_not_enough_disk_is_said_before_the_start(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "free_bytes", lambda _: 100)
    refused("not enough disk", out=tmp_path / "out", source=corpus[0])


def test_a_disk_that_fills_up_loses_nothing(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    full = failing_writes(monkeypatch, after=12)
    refused("disk of .* is full", Failed, out=out, source=corpus[0])
    assert next(full, None) is None
    assert list(out.glob("*.bin"))
    assert not list(out.glob(".*.tmp"))
    monkeypatch.undo()
    make(FineWebConfig(out, source=corpus[0], shard_tokens=1000))
    assert read_independently(out) == encode_documents(corpus[1]).tolist()


def failing_writes(monkeypatch, after: int):
    calls, write = iter(range(after)), fineweb.ShardWriter._write

    def maybe(writer, content):
        if next(calls, None) is None:
            raise OSError(28, "No space left on device")
        write(writer, content)

    monkeypatch.setattr(fineweb.ShardWriter, "_write", maybe)
    return calls


@pytest.mark.parametrize("damage", ["footer", "page"])
def test_a_damaged_parquet_file_is_named_or_skipped(corpus, tmp_path, small_pieces, damage):
    source, documents = corpus
    path, out = Path(source.replace("*", "1")), tmp_path / "out"
    content = bytearray(path.read_bytes())
    if damage == "footer":
        content[-4:] = b"XXXX"
        kept = documents[:100] + documents[200:]
    else:
        column = pq.ParquetFile(path).metadata.row_group(2).column(1)
        begin = column.dictionary_page_offset or column.data_page_offset
        content[begin : begin + 200] = bytes(200)
        kept = documents[:160] + documents[200:]
    path.write_bytes(content)
    refused(r"1\.parquet: .*--skip_bad_files True", out=out, source=source)
    make(FineWebConfig(out, source=source, shard_tokens=1000, skip_bad_files=True))
    assert read_independently(out) == encode_documents(kept).tolist()
    (skipped,) = json.loads((out / "manifest.json").read_text())["skipped_files"]
    assert skipped.startswith("1.parquet: ")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, document 2: "),
     ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, document 1: .*utf-8"),
     ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-20], r"a\.jsonl\.gz: "),
     ("a.jsonl.zst", b"no zstd at all", r"a\.jsonl\.zst: "),
     ("a.txt", b"\xff\xff", r"a\.txt: .*utf-8"),
     ("a.jsonl", b'["a"]\n', "has no 'text'"), ("a.jsonl", b'{"text": 3}\n', "is a int")],
    # gzip stores the time, which must not reach a test's name: parallel workers compare the names
    ids=["cut off", "not utf-8", "gzip cut off", "no zstd", "binary", "a list", "a number"],
)
def test_other_damaged_files_are_named(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    refused(line, out=tmp_path / "out", source=str(tmp_path / name))


def test_two_jobs_in_one_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "LOCK_WAIT", 0.0)
    with folder_lock(tmp_path / "out"):
        refused("is in use by process", FolderInUse, out=tmp_path / "out", source=corpus[0])
    assert FolderInUse.exit_code == 75


def test_changed_flags_on_resume_are_listed(corpus, tmp_path, monkeypatch, small_pieces):
    source, documents = corpus
    out = tmp_path / "out"
    monkeypatch.setattr(fineweb, "tokenise", failing(fineweb.tokenise, after=9))
    refused("on purpose", Failed, out=out, source=source)
    monkeypatch.undo()
    before = contents(out)
    refused("shard_tokens was 1000 and is 500", out=out, source=source, shard_tokens=500)
    refused("dataset was .*fineweb from.* and is .*fineweb-edu", out=out, source=source,
            dataset="fineweb-edu")
    refused(r"had 3 files and has 1, first difference: ", out=out,
            source=source.replace("*", "1"))
    (out / ".progress.json").write_text("{")
    refused("can't read .*progress", out=out, source=source)
    (out / ".progress.json").write_bytes(before[".progress.json"])
    assert contents(out) == before
    make(FineWebConfig(out, source=source, shard_tokens=1000, workers=1))
    assert read_independently(out) == encode_documents(documents).tolist()
    refused("shard_tokens was 1000 and is 500", out=out, source=source, shard_tokens=500)


def test_shards_of_others_are_left_alone(corpus, tmp_path):
    (tmp_path / "fineweb_train_000001.bin").write_bytes(b"mine")
    refused("already holds .bin files", out=tmp_path, source=corpus[0])
    assert (tmp_path / "fineweb_train_000001.bin").read_bytes() == b"mine"


def test_duplicates_are_counted_in_any_memory(tmp_path):
    hashes = np.random.RandomState(0).randint(0, 3000, 5000).astype("<u8")
    hashes.tofile(tmp_path / "hashes")
    expected = 5000 - len(set(hashes.tolist()))
    for memory in (1 << 27, 4096, 100):
        assert count_duplicates(tmp_path / "hashes", memory) == expected


def test_the_program_ends_with_one_line_and_exit_code_2(tmp_path):
    done = run(str(tmp_path / "none.parquet"), tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    done = run("x", tmp_path / "out", "--sample", "11BT")
    assert done.returncode == 2
    assert "10BT" in done.stderr


def test_making_shards_does_not_wait_for_torch():
    code = "import sys, data.fineweb, data.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_real_fineweb(real_data, tmp_path):
    source = str(real_data / "fineweb_sample_*.parquet")
    make(FineWebConfig(tmp_path / "out", source=source, shard_tokens=500_000))
    documents = [text for path in sorted(real_data.glob("fineweb_sample_*.parquet"))
                 for text in pq.read_table(path)["text"].to_pylist()]
    train, val, _ = open_folder(tmp_path / "out")
    stream = np.concatenate([shard.tokens for shard in val + train])
    assert np.array_equal(stream, encode_documents(documents))
    baseline.make(source, tmp_path / "usual", workers=1, shard_tokens=500_000)
    usual = [np.load(path) for path in sorted((tmp_path / "usual").iterdir())]
    assert np.array_equal(stream, np.concatenate(usual))
