"""FineWeb to shards: on all cores, resumable at any moment, the same bytes every time.

    python -m data.fineweb --dataset fineweb-edu --sample 10BT --out edufineweb10B   # from the Hub
    python -m data.fineweb --source 'mirror/*.parquet' --out fineweb10B              # from a disk
    python -m data.fineweb --pretokenised True --out fineweb10B    # ready-made shards, 20 GB

Documents keep their order, each begins with EOT and none is dropped. The first shard_tokens tokens
are the validation shard, the rest follows in train shards; manifest.json comes last and names the
source, its revision and each shard's sha256. A stopped job goes on from its last finished shard,
with any number of workers.
"""

import errno
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from data.counts import Counts, count_duplicates, in_words
from data.shard_file import HEADER_BYTES, ShardWriter
from data.shards import read_manifest
from data.sources import BadFile, File, Piece, hub_files, local_files, pieces, text_share
from data.tokenise import SAMPLE_EVERY, Encode, Tokens, encoder, tokenise
from data.tokenizer import RANKS_SHA256
from launch.errors import BadInput, Failed, one_line_errors
from launch.files import atomic_write, folder_lock, free_bytes

REPOS = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
NAMES = {"fineweb": "fineweb", "fineweb-edu": "edu_fineweb"}  # of llm.c's dev/data/fineweb.py
LOCK_WAIT = 5.0  # seconds that a restarted job gives its predecessor
BYTES_PER_TOKEN = 4.0  # FineWeb has 4.5 to 4.7; the disk that is needed is rounded up
PROGRESS = ".progress.json"
HASHES = ".document_hashes"


@dataclass(frozen=True)
class FineWebConfig:
    """Turns FineWeb or FineWeb-Edu into shards of GPT-2 tokens."""

    out: Path
    """Folder for the shards and manifest.json."""
    dataset: Literal["fineweb", "fineweb-edu"] = "fineweb"
    """Data set on the Hub; with --source only what the shards are called."""
    sample: Literal["10BT", "100BT", "350BT", "full"] = "10BT"
    """Published sample of it, in billions of its authors' tokens."""
    source: str = ""
    """Local files instead of the Hub: a path, folder or quoted pattern (parquet, jsonl, txt)."""
    column: str = "text"
    """Column of parquet, or field of jsonl, that holds the documents."""
    revision: str = ""
    """Commit, branch or tag on the Hub; empty takes main's newest commit and records it."""
    shard_tokens: int = 100_000_000
    """Tokens in a shard: 2 bytes each."""
    workers: int = os.cpu_count() or 1
    """Threads that tokenise. The shards don't depend on it."""
    skip_bad_files: bool = False
    """Go on without the undecodable rest of a damaged file, and name it in the manifest."""
    pretokenised: bool = False
    """Download shards that others have made of the data set, checked against the Hub's hashes."""


@dataclass
class Progress:
    """What .progress.json holds after each finished shard."""

    settings: dict[str, Any]
    files: list[tuple[str, int]]
    shards: list[dict[str, Any]]
    position: tuple[int, int, int]  # file, document in it, tokens of that document written
    counts: Counts
    skipped_files: list[str]


def make(config: FineWebConfig) -> None:
    """Makes the folder of shards, or what is missing of it. Raises BadInput or Failed."""
    if config.shard_tokens < 1 or config.workers < 1:
        raise BadInput("--shard_tokens and --workers are at least 1")
    with folder_lock(config.out, wait=LOCK_WAIT):
        try:
            if config.pretokenised:
                from data.pretokenised import fetch  # the Hub's library, which shards don't need

                fetch(config.dataset, config.sample, config.revision, config.out)
            else:
                _make(config)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise Failed(f"the disk of {config.out} is full: make room, and the same command goes "
                         "on from the last finished shard") from None


def _make(config: FineWebConfig) -> None:
    try:
        import pyarrow as pa
    except ImportError:
        raise BadInput("reading documents takes `pip install pyarrow`") from None
    pa.set_cpu_count(config.workers)
    done = read_manifest(config.out)
    before = _read_progress(config.out)
    known = done.get("settings") or (before.settings if before else {})
    files, settings, dataset = _source(config, known.get("revision"))
    _refuse_changes(config.out, done, before, settings, files)
    if done:
        print(f"{config.out} is complete: {len(done['shards'])} shards. "
              f"`python -m data.shards verify {config.out}` checks them")
        return
    if before is None:
        before = Progress(settings, _names(files), [], (0, 0, 0), Counts(), [])
    expected = _expected_bytes(files, config.column)
    _check_disk(config.out, expected, before)
    name, encode = encoder(config.workers)
    if name == "tiktoken":
        print("tokenising with tiktoken; `pip install fastokens` makes it several times faster")
    if before.shards:
        print(f"going on after {before.shards[-1]['file']}, {before.counts.tokens:,} tokens")
    progress = Job(config, files, before, encode, expected).run()
    _finish(config.out, dataset, progress)


def _source(config: FineWebConfig, pinned: str | None) -> tuple[list[File], dict[str, Any], str]:
    """(files, the settings that the shards depend on, what to call the data set)."""
    if config.source:
        files, revision = local_files(config.source), ""
        dataset = f"{config.dataset} from local files"
    else:
        name = "default" if config.sample == "full" else f"sample-{config.sample}"
        repo = REPOS[config.dataset]
        files, revision = hub_files(repo, name, config.revision or pinned or "")
        dataset = f"{config.dataset} {name}"
    settings = {
        "dataset": dataset, "revision": revision, "column": config.column,
        "shard_tokens": config.shard_tokens, "tokenizer_sha256": RANKS_SHA256,
    }
    return files, settings, dataset


def _names(files: list[File]) -> list[tuple[str, int]]:
    return [(file.name, file.size) for file in files]


def _refuse_changes(
    out: Path, done: dict, before: Progress | None, settings: dict[str, Any], files: list[File]
) -> None:
    """Raises BadInput, with all that differs, if `out` holds shards of another job."""
    if done and not (before or "settings" in done):
        raise BadInput(f"{out} already holds shards that weren't made here: choose another --out")
    if not done and before is None:
        if any(out.glob("*.bin")):
            raise BadInput(f"{out} already holds .bin files, without a manifest: "
                           "choose another --out")
        return
    old = done.get("settings") or (before.settings if before else {})
    old_files = [tuple(f) for f in done.get("files") or (before.files if before else [])]
    changes = [f"{key} was {old.get(key)!r} and is {value!r}"
               for key, value in settings.items() if old.get(key) != value]
    names = _names(files)
    if old_files != names:
        strange = next((f"{a[0]} ({a[1]:,} bytes)" for a in [*names, *old_files]
                        if (a in names) != (a in old_files)), "their order")
        changes.append(f"the source had {len(old_files):,} files and has {len(names):,}, "
                       f"first difference: {strange}")
    if changes:
        raise BadInput(f"{out} holds shards of another job: {'; '.join(changes)}. "
                       "Choose another --out, or empty the folder")


def _expected_bytes(files: list[File], column: str) -> int:
    """About how many bytes of text there are, judged by the first file that isn't damaged."""
    total = sum(file.size for file in files)
    for file in files:
        try:
            return int(text_share(file, column) * total)
        except BadFile:
            continue  # named when its turn comes
    return total


def _check_disk(out: Path, text_bytes: int, before: Progress) -> None:
    """Prints what is needed and what is free. Raises BadInput if it can't suffice."""
    written = sum(HEADER_BYTES + 2 * shard["tokens"] for shard in before.shards)
    needed = max(0, int(2 * text_bytes / BYTES_PER_TOKEN) - written)
    free = free_bytes(out)
    print(f"about {text_bytes / 1e9:,.2f} GB of text: {needed / 1e9:,.2f} GB of disk needed, "
          f"{free / 1e9:,.2f} GB free in {out}")
    if needed > free:
        raise BadInput(f"not enough disk: about {needed / 1e9:,.2f} GB are needed and "
                       f"{free / 1e9:,.2f} GB free in {out}")


def readers(workers: int) -> int:
    """How many pieces are read and tokenised at a time, each of them by all workers.

    More than two on two cores take turns and don't help (measured: a tenth more CPU time).
    """
    return min(4, max(2, workers // 2))


class Job:
    """One run of the pipeline: pieces in, shards out, and what has been counted so far."""

    def __init__(
        self, config: FineWebConfig, files: list[File], before: Progress, encode: Encode,
        expected_bytes: int,
    ) -> None:
        self.config, self.files, self.progress, self.encode = config, files, before, encode
        self.expected_bytes = expected_bytes
        self.sample_every = min(SAMPLE_EVERY, config.shard_tokens)
        self.counts = Counts(**asdict(before.counts))  # as far as read, also in the open shard
        self.bad = list(before.skipped_files)
        self.hashes: list[np.ndarray] = []
        self.writer: ShardWriter | None = None
        self.seconds = dict(read=0.0, tokenise=0.0, write=0.0)

    def run(self) -> Progress:
        """Reads to the end of the source; returns the state after the last shard."""
        for leftover in self.config.out.glob(".*.bin.tmp"):
            leftover.unlink()
        hashes = self.config.out / HASHES
        hashes.touch()
        os.truncate(hashes, 8 * self.progress.counts.documents)
        already = self.counts.text_bytes
        bar = tqdm(total=max(self.expected_bytes, already), initial=already, unit="B",
                   unit_scale=True, desc="text")
        pool = ThreadPoolExecutor(readers(self.config.workers), thread_name_prefix="reader")
        start = time.perf_counter()
        with bar:
            try:
                for piece, tokens in self._in_order(pool):
                    begun = time.perf_counter()
                    self._add(piece, tokens)
                    self.seconds["write"] += time.perf_counter() - begun
                    bar.set_postfix_str(f"{self.counts.tokens:,} tokens", refresh=False)
                    bar.update(int(tokens.text_bytes.sum()))
                self._end()
            finally:
                pool.shutdown(cancel_futures=True)
                if self.writer:
                    self.writer.abandon()
        done = self.counts.text_bytes - already
        rates = ", ".join(f"{stage} {done / 1e6 / max(seconds, 1e-9):,.0f} MB/s"
                          for stage, seconds in self.seconds.items())
        print(f"{done / 1e6:,.1f} MB of text in {time.perf_counter() - start:,.1f} s; "
              f"a thread of each stage alone: {rates}")
        return self.progress

    def _in_order(self, pool: ThreadPoolExecutor) -> Iterator[tuple[Piece, Tokens]]:
        """Pieces with their tokens, readers() at a time and in the order of the source."""
        file, document, _ = self.progress.position
        window: deque[tuple[Piece, Future[Tokens]]] = deque()
        bad: set[int] = set()

        def oldest() -> Iterator[tuple[Piece, Tokens]]:
            piece, future = window.popleft()
            if piece.file in bad:
                return
            try:
                yield piece, future.result()
            except BadFile as problem:
                if not self.config.skip_bad_files:
                    raise BadInput(f"{problem}; get the file again, or --skip_bad_files True goes "
                                   "on without the rest of it") from None
                tqdm.write(f"skipped the rest of {problem}")
                bad.add(piece.file)
                self.bad.append(str(problem))

        for piece in pieces(self.files, self.config.column, file, document):
            window.append((piece, pool.submit(self._work, piece)))
            if len(window) > readers(self.config.workers):
                yield from oldest()
        while window:
            yield from oldest()

    def _work(self, piece: Piece) -> Tokens:
        begun = time.perf_counter()
        texts = piece.load()
        read = time.perf_counter()
        tokens = tokenise(texts, self.encode, self.sample_every)
        self.seconds["read"] += read - begun
        self.seconds["tokenise"] += time.perf_counter() - read
        return tokens

    def _add(self, piece: Piece, tokens: Tokens) -> None:
        """Writes the tokens of a piece, those that a shard before this run holds left out."""
        file, document, token = self.progress.position
        at = 0
        if token and piece.file == file and 0 <= document - piece.first < piece.count:
            at = int(tokens.starts[document - piece.first]) + token
        while at < len(tokens.ids):
            if self.writer is None:
                kind = "train" if self.progress.shards else "val"
                name = f"{NAMES[self.config.dataset]}_{kind}_{len(self.progress.shards):06d}.bin"
                self.writer = ShardWriter(self.config.out / name, self.config.shard_tokens)
            end = min(len(tokens.ids), at + self.writer.room)
            self.writer.append(tokens.ids[at:end])
            self.hashes.append(self.counts.add(tokens, at, end))
            at = end
            if self.writer.room == 0:
                last = int(np.searchsorted(tokens.starts[:-1], end - 1, side="right")) - 1
                self._close((piece.file, piece.first + last, end - int(tokens.starts[last])))

    def _close(self, position: tuple[int, int, int]) -> None:
        """Finishes the open shard: it gets its name, then .progress.json says so."""
        assert self.writer is not None
        entry = self.writer.finish()
        with (self.config.out / HASHES).open("r+b") as file:
            file.seek(8 * self.progress.counts.documents)
            file.write(np.concatenate(self.hashes).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.writer, self.hashes = None, []
        self.progress = Progress(
            self.progress.settings, self.progress.files, [*self.progress.shards, entry], position,
            Counts(**asdict(self.counts)), list(self.bad),
        )
        atomic_write(self.config.out / PROGRESS, json.dumps(asdict(self.progress)))

    def _end(self) -> None:
        """Closes the last shard. Raises BadInput if there is nothing to train on."""
        shards = len(self.progress.shards) + (self.writer is not None)
        if self.counts.documents == 0:
            raise BadInput(f"{self.files[0].name}: no documents"
                           + (f" in any of {len(self.files):,} files" if self.files[1:] else ""))
        if shards < 2:
            raise BadInput(
                f"all {self.counts.tokens:,} tokens fit into the validation shard, and nothing is "
                f"left to train on: --shard_tokens {max(1, self.counts.tokens // 10):,} is a tenth")
        if self.writer is not None:
            self._close((len(self.files), 0, 0))
        self.progress.skipped_files = list(self.bad)


def _finish(out: Path, dataset: str, progress: Progress) -> None:
    """Writes the manifest, tells what the data is like, removes what was for resuming."""
    counts = progress.counts
    statistics = counts.statistics(count_duplicates(out / HASHES))
    manifest = {
        "dataset": dataset,
        "revision": progress.settings["revision"] or None,
        "tokenizer_sha256": RANKS_SHA256,
        "settings": progress.settings,
        "statistics": statistics,
        "skipped_files": progress.skipped_files,
        "shards": progress.shards,
        "files": progress.files,
    }
    atomic_write(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    (out / PROGRESS).unlink(missing_ok=True)
    (out / HASHES).unlink(missing_ok=True)
    print(in_words(statistics))
    print(f"{len(progress.shards)} shards, {counts.tokens:,} tokens in {out}"
          + "".join(f"\nskipped the rest of {name}" for name in progress.skipped_files))


def _read_progress(out: Path) -> Progress | None:
    path = out / PROGRESS
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        return Progress(**content | {
            "counts": Counts(**content["counts"]), "position": tuple(content["position"]),
            "files": [tuple(file) for file in content["files"]],
        })
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"can't read {path} ({error}): remove the shards and start again") from None


def main() -> None:
    make(tyro.cli(FineWebConfig, config=(tyro.conf.FlagConversionOff,),
                  prog="python -m data.fineweb"))


if __name__ == "__main__":
    with one_line_errors():
        main()
