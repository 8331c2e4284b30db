"""FineWeb to shards: every document, in order, the same bytes however often the job is killed."""

import glob
import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data import fineweb, job, shard_file, shards
from data.counts import count_duplicates
from data.fineweb import FineWebConfig, make
from data.shards import open_folder
from data.tokenizer import EOT, decode, encode_documents
from launch.errors import Failed, FolderInUse
from launch.files import folder_lock, human_size
from tests.bench import shards as usual_way
from tests.documents import failing, read_independently, refused, run
from tests.running import ROOT, environment


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
        "end_of_text_as_text": 0, "end_of_text_as_border": 0,
        "non_ascii_share": round(foreign / sum(sizes), 6),
        "tokens_per_byte": round(tokens / sum(sizes), 6),
    }
    assert manifest["files"] == [[f"{i}.parquet", os.path.getsize(source.replace("*", str(i)))]
                                 for i in range(3)]
    printed = capsys.readouterr().out
    bytes_of_text = human_size(sum(sizes))  # of which the tokens take about half
    assert f"{bytes_of_text} of text in" in printed
    assert re.search(r"about [\d.]+ kB of text: [\d.]+ kB of disk needed, ", printed)
    assert " 0.00 " not in printed
    assert not re.search(r"(?<![\d.])0(\.0+)? MB/s", printed)  # 2.30 MB/s is a speed
    assert f"300 documents: {documents.count('')} empty" in printed
    make(FineWebConfig(out, source=source, shard_tokens=1000))
    assert "is complete" in capsys.readouterr().out


def test_documents_of_one_s_own_have_a_name(corpus, tmp_path, capsys):
    """In shards' names, in the manifest, in what the tools print, and beside every loss."""
    source, documents = corpus
    out = tmp_path / "out"
    make(FineWebConfig(out, source=source, name="my.docs_1", val_tokens=1000, shard_tokens=100_000))
    assert sorted(contents(out)) == [
        "manifest.json", "my.docs_1_train_000001.bin", "my.docs_1_val_000000.bin"]
    assert json.loads((out / "manifest.json").read_text())["dataset"] == "my.docs_1"
    train, val, name = open_folder(out)
    assert name == "my.docs_1"
    stream = np.concatenate([shard.tokens for shard in val + train])
    assert np.array_equal(stream, encode_documents(documents))
    shards.info(out)
    shards.verify(out)
    make(FineWebConfig(out, source=source, name="my.docs_1"))
    printed = capsys.readouterr().out
    assert "my.docs_1: " in printed
    assert "is complete" in printed
    assert "local files" not in printed
    refused("dataset was 'my.docs_1' and is 'others'", out=out, source=source, name="others",
            shard_tokens=None)


def test_without_a_name_it_is_said_what_documents_are_called(corpus, tmp_path, capsys):
    make(FineWebConfig(tmp_path / "out", source=corpus[0], shard_tokens=1000))
    assert "called 'fineweb from local files': --name" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a b", "../a", ".a", "-a", "_a", "a/b", "a, b", "a" * 51, "a\n"])
def test_a_name_that_no_shard_can_have_is_refused(corpus, tmp_path, name):
    refused("expected letters, digits, '_', '-' and '.'", out=tmp_path / "out", source=corpus[0],
            name=name)


def test_the_hub_s_data_sets_keep_their_names(tmp_path):
    refused("--name mine is for documents of your own", out=tmp_path / "out", name="mine")
    refused("--name mine is for documents of your own", out=tmp_path / "out", name="mine",
            source="x.txt", pretokenised=True)


def test_without_fastokens_tiktoken_writes_the_same_bytes(corpus, tmp_path, monkeypatch, capsys):
    make(FineWebConfig(tmp_path / "fast", source=corpus[0], shard_tokens=1000, workers=2))
    monkeypatch.setitem(sys.modules, "fastokens", None)
    make(FineWebConfig(tmp_path / "slow", source=corpus[0], shard_tokens=1000, workers=2))
    assert "pip install fastokens" in capsys.readouterr().out
    assert contents(tmp_path / "fast") == contents(tmp_path / "slow")


JOBS = """
import itertools, json, os, random, signal, sys, threading
from pathlib import Path
from data import fineweb, job, shard_file, sources, tokenise, tokenizer
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
            (shard_file.ShardWriter, "_write"), (shard_file, "fsync"), (shard_file.os, "fsync"),
            (shard_file.Path, "replace"), (job, "atomic_write"), (job, "tokenise"),
            (job.Job, "_add"), (fineweb, "count_duplicates"),
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
    calls, write = iter(range(after)), shard_file.ShardWriter._write

    def maybe(writer, content):
        if next(calls, None) is None:
            raise OSError(28, "No space left on device")
        write(writer, content)

    monkeypatch.setattr(shard_file.ShardWriter, "_write", maybe)
    return calls


def test_two_jobs_in_one_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "LOCK_WAIT", 0.0)
    with folder_lock(tmp_path / "out"):
        refused("is in use by process", FolderInUse, out=tmp_path / "out", source=corpus[0])
    assert FolderInUse.exit_code == 75


def test_changed_flags_on_resume_are_listed(corpus, tmp_path, monkeypatch, small_pieces):
    source, documents = corpus
    out = tmp_path / "out"
    monkeypatch.setattr(job, "tokenise", failing(job.tokenise, after=9))
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
    usual_way.make(sorted(glob.glob(source)), tmp_path / "usual", workers=1, shard_tokens=500_000)
    usual = [np.load(path) for path in sorted((tmp_path / "usual").iterdir())]
    assert np.array_equal(stream, np.concatenate(usual))


def test_a_link_where_hashes_lie_is_not_followed(corpus, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".document_hashes").symlink_to(precious)
    refused(r"\.document_hashes is a link", out=tmp_path / "out", source=corpus[0])
    assert precious.read_text() == "kept"


def test_a_folder_that_begins_with_a_dash_can_be_pasted(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        make(FineWebConfig(Path("-out"), source=corpus[0], shard_tokens=1000))
    assert "`python -m data.shards verify ./-out` checks them" in capsys.readouterr().out
