"""One run of data.fineweb's pipeline: pieces are read and tokenised by threads, shards written in
order, and after each finished shard .progress.json says how far it went.
"""

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from data.counts import Counts
from data.documents import File, Piece, Unreadable
from data.progress import PROGRESS, Position, Progress
from data.shard_file import BLOCK, HEADER_BYTES, ShardWriter
from data.sizes import nothing_left, shortest_last_shard
from data.sources import pieces
from data.tokenise import SAMPLE_EVERY, Encode, Tokens, tokenise
from launch.errors import BadInput
from launch.files import atomic_write, human_size
from launch.progress import Bar

if TYPE_CHECKING:
    from data.fineweb import FineWebConfig

NAMES = {"fineweb": "fineweb", "fineweb-edu": "edu_fineweb"}  # of llm.c's dev/data/fineweb.py
HASHES = ".document_hashes"  # of those in finished shards, 8 bytes each
SHOWN = 20  # documents that can't be read and are named on the terminal; the manifest has all


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
        self, config: "FineWebConfig", files: list[File], before: Progress, encode: Encode,
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
        self._cut_hashes()
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
        rates = ", ".join(f"{stage} {human_size(done / max(seconds, 1e-9))}/s"
                          for stage, seconds in self.seconds.items())
        print(f"{human_size(done)} of text in {time.perf_counter() - start:,.1f} s; "
              f"a thread of each stage alone: {rates}")
        return self.progress

    def _cut_hashes(self) -> None:
        """Leaves the hashes of documents in finished shards alone."""
        hashes = self.config.out / HASHES
        if hashes.is_symlink():  # what it leads to would be cut
            raise BadInput(f"{hashes} is a link, and this program makes none: remove it")
        hashes.touch()
        os.truncate(hashes, 8 * self.progress.counts.documents)

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
        prefix = self.config.name or NAMES[self.config.dataset]
        name = f"{prefix}_{kind}_{number:06d}.bin"
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
