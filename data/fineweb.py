"""FineWeb to shards: on all cores, resumable at any moment, the same bytes every time.

    python -m data.fineweb --dataset fineweb-edu --sample 10BT --out edufineweb10B   # from the Hub
    python -m data.fineweb --source 'mirror/*.parquet' --out fineweb10B              # from a disk
    python -m data.fineweb --pretokenised True --out fineweb10B    # ready-made shards, 20 GB

Documents keep their order, each begins with EOT and none is dropped. The first tokens, by default
as many as in a shard, are the validation shard, and the rest follows in train shards; manifest.json
comes last and names the source, its revision and each shard's sha256. A stopped job goes on from
its last finished shard, with any number of workers.
"""

import errno
import json
import os
import shlex
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.counts import Counts, count_duplicates, in_words
from data.documents import File, Piece, Unreadable
from data.progress import (
    PROGRESS,
    Position,
    Progress,
    read_progress,
    refuse_changes,
    refuse_shards_of_others,
)
from data.shard_file import BLOCK, HEADER_BYTES, ShardWriter
from data.shards import read_manifest
from data.sizes import (
    BYTES_PER_TOKEN,
    choose_shard_tokens,
    nothing_left,
    refuse_too_large,
    shortest_last_shard,
)
from data.sources import expected_bytes, hub_files, local_files, pieces, text_borders
from data.tokenise import SAMPLE_EVERY, Encode, Tokens, encoder, tokenise
from data.tokenizer import EOT_TEXT, RANKS_SHA256
from launch import cli, flags
from launch.errors import BadInput, Failed, one_line_errors
from launch.files import atomic_write, folder_lock, free_bytes
from launch.progress import Bar

REPOS = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
NAMES = {"fineweb": "fineweb", "fineweb-edu": "edu_fineweb"}  # of llm.c's dev/data/fineweb.py
LOCK_WAIT = 5.0  # seconds that a restarted job gives its predecessor
HASHES = ".document_hashes"
SHOWN = 20  # documents that can't be read and are named on the terminal; the manifest has all


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
    split_text: bool = True
    """In .txt files `<|endoftext|>` ends a document; False leaves it there as text."""
    column: str = "text"
    """Column of parquet, or field of jsonl, that holds the documents."""
    revision: str = ""
    """Commit, branch or tag on the Hub; empty takes main's newest commit and records it."""
    shard_tokens: int | None = None
    """Tokens in a shard, 2 bytes each; not given: 100,000,000, or a 20th of a small source."""
    val_tokens: int | None = None
    """Tokens of the validation shard, the stream's first; not given: as many as in a shard."""
    workers: int = os.cpu_count() or 1
    """Threads that tokenise. The shards don't depend on it."""
    skip_bad_files: bool = False
    """Go on without the documents that can't be decoded, and name them in the manifest."""
    pretokenised: bool = False
    """Download shards that others have made of the data set, checked against the Hub's hashes."""


def make(config: FineWebConfig) -> None:
    """Makes the folder of shards, or what is missing of it. Raises BadInput or Failed."""
    for name in ("shard_tokens", "val_tokens"):
        value = getattr(config, name)
        if value is not None:
            cli.within(name, value, 1, 2**31 - 1)  # an int32 in the header
    cli.within("workers", config.workers, 1, 1024)
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
    before = read_progress(config.out)
    refuse_shards_of_others(config.out, done, before)
    known = done.get("settings") or (before.settings if before else {})
    files, revision, dataset = _source(config, known.get("revision"))
    text_bytes = 0 if done else expected_bytes(files, config.column)
    settings = _settings(config, dataset, revision, known, text_bytes)
    refuse_changes(config.out, done, before, settings, files)
    if done:
        verify = f"python -m data.shards verify {shlex.quote(str(config.out))}"
        print(f"{config.out} is complete: {len(done['shards'])} shards. `{verify}` checks them")
        return
    refuse_too_large(settings["val_tokens"], text_bytes)
    if before is None:
        before = Progress.start(settings, files)
    borders = _borders(files, config.split_text)
    _check_disk(config.out, text_bytes, before)
    print(f"shards of {settings['shard_tokens']:,} tokens; {settings['val_tokens']:,} are for "
          "validation")
    name, encode = encoder(config.workers)
    if name == "tiktoken":
        print("tokenising with tiktoken; `pip install fastokens` makes it several times faster")
    if before.shards:
        print(f"going on after {before.shards[-1]['file']}, {before.counts.tokens:,} tokens")
    progress = Job(config, files, before, encode, text_bytes).run()
    _finish(config.out, dataset, progress, borders)


def _source(config: FineWebConfig, pinned: str | None) -> tuple[list[File], str, str]:
    """(files, their revision on the Hub or empty, what to call the data set)."""
    if config.source:
        return local_files(config.source), "", f"{config.dataset} from local files"
    name = "default" if config.sample == "full" else f"sample-{config.sample}"
    repo = REPOS[config.dataset]
    files, revision = hub_files(repo, name, config.revision or pinned or "")
    return files, revision, f"{config.dataset} {name}"


def _settings(
    config: FineWebConfig, dataset: str, revision: str, known: dict[str, Any], text_bytes: int
) -> dict[str, Any]:
    """What the shards depend on. Sizes that aren't given are those of the job that goes on."""
    shard_tokens = config.shard_tokens or known.get("shard_tokens")
    if shard_tokens is None:
        shard_tokens = choose_shard_tokens(text_bytes)
    return {
        "dataset": dataset,
        "revision": revision,
        "column": config.column,
        "split_text": config.split_text,
        "shard_tokens": shard_tokens,
        "val_tokens": config.val_tokens or known.get("val_tokens") or shard_tokens,
        "tokenizer_sha256": RANKS_SHA256,
    }


def _borders(files: list[File], split_text: bool) -> int:
    """How many `<|endoftext|>` of the .txt files end a document; says so."""
    found = text_borders(files)
    if found and split_text:
        print(f"{found:,} {EOT_TEXT} in .txt files end documents; --split_text False keeps them "
              "as text")
    elif found:
        print(f"{found:,} {EOT_TEXT} in .txt files stay text")
    return found if split_text else 0


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


@dataclass(frozen=True)
class Read:
    """What a reader makes of a piece: tokens of the documents with these numbers in their file."""

    tokens: Tokens
    numbers: np.ndarray  # (documents,) int64
    unreadable: list[Unreadable]


class Job:
    """One run of the pipeline: pieces in, shards out, and what has been counted so far."""

    def __init__(
        self, config: FineWebConfig, files: list[File], before: Progress, encode: Encode,
        expected_bytes: int,
    ) -> None:
        self.config, self.files, self.progress, self.encode = config, files, before, encode
        self.expected_bytes = expected_bytes
        self.shard_tokens = before.settings["shard_tokens"]
        self.sample_every = min(SAMPLE_EVERY, self.shard_tokens)
        self.start = before.position
        self.counts = Counts(**asdict(before.counts))  # as far as read, also in the open shard
        self.skipped: list[tuple[int, int, str]] = []  # by this run: file, document, the problem
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
        bar = Bar(total=max(self.expected_bytes, already), initial=already, unit="B", desc="text")
        pool = ThreadPoolExecutor(readers(self.config.workers), thread_name_prefix="reader")
        start = time.perf_counter()
        with bar:
            try:
                for piece, read in self._in_order(pool):
                    begun = time.perf_counter()
                    self._skip(piece, read.unreadable)
                    self._add(piece, read)
                    self.seconds["write"] += time.perf_counter() - begun
                    bar.set_postfix_str(f"{self.counts.tokens:,} tokens", refresh=False)
                    bar.update(int(read.tokens.text_bytes.sum()))
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

    def _in_order(self, pool: ThreadPoolExecutor) -> Iterator[tuple[Piece, Read]]:
        """Pieces and what is in them, readers() at a time and in the order of the source."""
        file, document, _ = self.start
        window: deque[tuple[Piece, Future[Read]]] = deque()
        for piece in pieces(self.files, self.config.column, file, document,
                            self.config.split_text):
            window.append((piece, pool.submit(self._read, piece)))
            if len(window) > readers(self.config.workers):
                oldest, future = window.popleft()
                yield oldest, future.result()
        for oldest, future in window:
            yield oldest, future.result()

    def _read(self, piece: Piece) -> Read:
        begun = time.perf_counter()
        documents = piece.load()
        loaded = time.perf_counter()
        tokens = tokenise(documents.texts, self.encode, self.sample_every)
        self.seconds["read"] += loaded - begun
        self.seconds["tokenise"] += time.perf_counter() - loaded
        return Read(tokens, documents.numbers, documents.unreadable)

    def _skip(self, piece: Piece, unreadable: list[Unreadable]) -> None:
        """Notes what can't be read of a piece. Raises BadInput where that isn't allowed."""
        for lost in unreadable:
            if not self.config.skip_bad_files:
                raise BadInput(f"{lost.problem}; get the file again, or --skip_bad_files True goes "
                               "on without what can't be read")
            if (piece.file, lost.document) < self.start[:2]:
                continue  # the job that goes on has noted it
            self.skipped.append((piece.file, lost.document, lost.problem))
            if len(self.skipped) <= SHOWN:
                Bar.write(f"skipped {lost.problem}")

    def _add(self, piece: Piece, read: Read) -> None:
        """Writes the tokens of a piece, those that a shard before this run holds left out."""
        tokens = read.tokens
        at = self._already_written(piece, read)
        while at < len(tokens.ids):
            if self.writer is None:
                self.writer = self._open_shard()
            end = min(len(tokens.ids), at + self.writer.room)
            self.writer.append(tokens.ids[at:end])
            self.hashes.append(self.counts.add(tokens, at, end))
            at = end
            if self.writer.room == 0:
                last = int(np.searchsorted(tokens.starts[:-1], end - 1, side="right")) - 1
                self._close((piece.file, int(read.numbers[last]), end - int(tokens.starts[last])))

    def _already_written(self, piece: Piece, read: Read) -> int:
        """How many tokens of this piece lie in the shards from before this run."""
        file, document, token = self.start
        if piece.file != file or token == 0:
            return 0
        i = int(np.searchsorted(read.numbers, document))
        if i == len(read.numbers) or read.numbers[i] != document:
            return 0
        return int(read.tokens.starts[i]) + token

    def _open_shard(self) -> ShardWriter:
        number = len(self.progress.shards)
        kind = "train" if number else "val"
        size = self.shard_tokens if number else self.progress.settings["val_tokens"]
        name = f"{NAMES[self.config.dataset]}_{kind}_{number:06d}.bin"
        return ShardWriter(self.config.out / name, size)

    def _close(self, position: Position) -> None:
        """Finishes the open shard: it gets its name, then .progress.json says so."""
        assert self.writer is not None
        entry = self.writer.finish()
        with (self.config.out / HASHES).open("r+b") as file:
            file.seek(8 * self.progress.counts.documents)
            file.write(np.concatenate(self.hashes).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.writer, self.hashes = None, []
        before = [shard for shard in self.progress.shards if shard["file"] != entry["file"]]
        behind = [lost for lost in self.skipped if lost[:2] < position[:2]]
        self.skipped = [lost for lost in self.skipped if lost[:2] >= position[:2]]
        self.progress = Progress(
            self.progress.settings, self.progress.files, [*before, entry], position,
            Counts(**asdict(self.counts)),
            [*self.progress.skipped_files, *(problem for _, _, problem in behind)],
        )
        atomic_write(self.config.out / PROGRESS, json.dumps(asdict(self.progress)))

    def _end(self) -> None:
        """Closes the last shard. Raises BadInput if there is nothing to train on."""
        if self.counts.documents == 0:
            raise BadInput(f"{self.files[0].name}: no documents"
                           + (f" in any of {len(self.files):,} files" if self.files[1:] else ""))
        shards = len(self.progress.shards) + (self.writer is not None)
        if shards < 2:
            raise BadInput(nothing_left(f"all {self.counts.tokens:,} tokens",
                                        self.counts.text_bytes))
        if self.writer is not None:
            tokens = self.writer.size - self.writer.room
            if shards > 2 and tokens < shortest_last_shard(self.shard_tokens):
                self.writer = self._appended(self.writer)
            self._close((len(self.files), 0, 0))
        rest = [problem for _, _, problem in self.skipped]
        self.progress.skipped_files = [*self.progress.skipped_files, *rest]

    def _appended(self, short: ShardWriter) -> ShardWriter:
        """The last finished shard once more, with the few tokens of this one behind its own.

        A job that is killed here finds the finished shard with its own tokens first, and reads no
        more of it than .progress.json says.
        """
        last = self.progress.shards[-1]
        path = self.config.out / last["file"]
        few = short.size - short.room
        longer = ShardWriter(path, last["tokens"] + few)
        short.file.flush()
        for source, tokens in ((path, last["tokens"]), (short.temporary, few)):
            for start in range(0, tokens, BLOCK):
                count = min(BLOCK, tokens - start)
                longer.append(np.fromfile(source, "<u2", count, offset=HEADER_BYTES + 2 * start))
        short.abandon()
        return longer


def _finish(out: Path, dataset: str, progress: Progress, borders: int) -> None:
    """Writes the manifest, tells what the data is like, removes what was for resuming."""
    counts = progress.counts
    statistics = counts.statistics(count_duplicates(out / HASHES))
    statistics["end_of_text_as_border"] = borders
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
    print(f"{len(progress.shards)} shards, {counts.tokens:,} tokens in {out}")
    if progress.skipped_files:
        print(f"skipped, and named in the manifest: {len(progress.skipped_files):,}, the first "
              f"{progress.skipped_files[0]}")


def main() -> None:
    make(flags.parse(FineWebConfig))


if __name__ == "__main__":
    with one_line_errors():
        main()
