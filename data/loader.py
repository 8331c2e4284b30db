"""The tokens of every step, on every rank, as a function of nothing but the seed and the step.

The stream is cut into sequences of T tokens (each with one more, the last target). An epoch takes
every sequence once: shards in shuffled order, the sequences of a shard shuffled, so that the disk
reads one shard at a time. Step s takes the next batch_tokens / T of them. No state is kept: the
batch of step s is computed from (seed, s, batch_tokens) alone, so it's the same after a restart
and on any number of ranks, which only slice it. Only a rollback changes it, by batches to skip.

How the stream is cut is --data.align: "stream", as GPT-2 was trained, at every T-th token;
"documents" at the starts of documents (document_sequences). Nothing is masked in either.
"""

import functools
import hashlib
import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data import corpus
from data.shards import Shard, blocks, open_folder
from data.tokenizer import EOT
from launch.errors import BadInput

Align = Literal["stream", "documents"]


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from: a folder of shards, a text, or the embedded corpus."""

    dir: str = "fineweb10B"
    """Folder of shards; an empty string means the embedded corpus."""
    text: str = ""
    """A text file to train on instead; every 20th block of it is held out for validation."""
    align: Align = "stream"
    """Where training sequences begin: at every T-th token, or at the starts of documents."""


class Stream:
    """Shards one after the other, as one row of tokens, and how it's cut into sequences."""

    def __init__(self, shards: list[Shard], align: Align = "stream") -> None:
        self.shards, self.align = shards, align
        self.starts = np.cumsum([0] + [len(shard.tokens) for shard in shards])
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """(count,) uint16 tokens from position `start` on, across shards if need be."""
        parts = []
        for i in self.shards_of(start, count):
            begin = max(start - int(self.starts[i]), 0)
            end = start + count - int(self.starts[i])
            parts.append(self.shards[i].tokens[begin:end])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rows(self, starts: np.ndarray, count: int) -> torch.Tensor:
        """(len(starts), count) int64: what read() gives at each of these positions."""
        out = np.empty((len(starts), count), dtype=np.int64)
        if len(one := self.shards_spanned(starts, count)) == 1:  # as good as always
            out[:] = self._windows(one[0], count)[starts - self.starts[one[0]]]
            return torch.from_numpy(out)
        shard = np.searchsorted(self.starts, starts, side="right") - 1
        inside = starts + count <= self.starts[shard + 1]
        for i in set(shard[inside].tolist()):
            rows = np.flatnonzero(inside & (shard == i))
            out[rows] = self._windows(i, count)[starts[rows] - self.starts[i]]
        for row in np.flatnonzero(~inside):  # these go on in the next shard
            out[row] = self.read(int(starts[row]), count)
        return torch.from_numpy(out)

    def _windows(self, shard: int, count: int) -> np.ndarray:
        """(positions, count) uint16: the row that begins at each token, as a view of the shard."""
        tokens = self.shards[shard].tokens
        every = (len(tokens) - count + 1, count)
        return np.ndarray(every, np.uint16, tokens, strides=tokens.strides * 2)

    def documents(self, shard: int) -> np.ndarray:
        """(documents,) int64 positions of a shard's EOTs, each of which begins a document."""
        found = [start + np.flatnonzero(part == EOT)
                 for start, part in blocks(self.shards[shard].tokens)]
        return self.starts[shard] + np.concatenate(found)

    def shards_of(self, start: int, count: int) -> range:
        """Indices of the shards that hold these tokens."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, start + count - 1, side="right")) - 1
        return range(first, last + 1)

    def shards_spanned(self, starts: np.ndarray, count: int) -> range:
        """Indices of the shards from the first of these rows to the last."""
        if len(starts) == 0:
            return range(0)
        first = int(starts.min())
        return self.shards_of(first, int(starts.max()) - first + count)

    def shards_touched(self, starts: np.ndarray, count: int) -> set[int]:
        """Indices of all shards that hold `count` tokens from any of these positions on."""
        if len(one := self.shards_spanned(starts, count)) == 1:
            return set(one)
        first = np.searchsorted(self.starts, starts, side="right") - 1
        last = np.searchsorted(self.starts, starts + count - 1, side="right") - 1
        pairs = set(zip(first.tolist(), last.tolist(), strict=True))
        return {shard for low, high in pairs for shard in range(low, high + 1)}

    def check(self, index: int) -> None:
        """Checks a shard's hash and tokens before its first use. Raises BadInput."""
        if index not in self._checked:
            self.shards[index].check()
            self._checked.add(index)


@dataclass(frozen=True)
class Data:
    """What a run reads: the training stream, the validation stream, and what to call them."""

    train: Stream
    val: Stream
    name: str

    def fingerprint(self) -> str:
        """Names the training tokens, and changes with them but not with the path to them.

        The hash is taken from each shard's length and first and last 1,024 tokens. How sequences
        are cut belongs to it: a run can't go on with other sequences.
        """
        digest = hashlib.sha256()
        for shard in self.train.shards:
            digest.update(str(len(shard.tokens)).encode())
            digest.update(shard.tokens[:1024].tobytes() + shard.tokens[-1024:].tobytes())
        aligned = ", cut at documents" if self.train.align == "documents" else ""
        return f"{len(self.train):,} tokens ({digest.hexdigest()[:16]}){aligned}"


def open_data(config: DataConfig) -> Data:
    """Opens what the configuration names. Raises BadInput where it can't be used."""
    if config.text:
        path = Path(config.text)
        train, val = corpus.text_file(path)
        name = path.name
    elif config.dir:
        shards, val_shards, name = open_folder(Path(config.dir))
        return Data(Stream(shards, config.align), Stream(val_shards), name)
    else:
        train, val = corpus.embedded()
        path, name = Path("World English Bible"), "World English Bible"
    return Data(Stream([Shard(path, train)], config.align), Stream([Shard(path, val)]), name)


def document_sequences(stream: Stream, T: int) -> np.ndarray:
    """(sequences,) int64: where the sequences begin that are aligned with documents.

    The first begins at the first document. Where a sequence ends inside a document, the next one
    goes on there if T or more tokens of that document are left, and begins at the next document
    if not. So no token is read twice; none is without the beginning of its document but in
    documents longer than T; and what isn't read are ends of documents, less than T tokens each:
    18 % of the tokens of 1,400 documents of FineWeb at T = 1024 (43 % if the next sequence always
    began at the next document). The shards are read once, block by block, and 8 bytes are kept
    for each sequence.

    Raises BadInput where no sequence fits.
    """
    sequences = [np.empty(0, dtype=np.int64)]
    last = np.empty(0, dtype=np.int64)  # the document to begin with that's known, and not its end
    end = np.array([len(stream)])
    for documents in itertools.chain(map(stream.documents, range(len(stream.shards))), [end]):
        bounds = np.append(last, documents)
        after = np.searchsorted(bounds, bounds + T)  # (bounds,) first document T or more behind it
        following, chosen, i = after.tolist(), [], 0
        while i < len(bounds) and following[i] < len(bounds):
            chosen.append(i)
            i = following[i]
        counts = (bounds[after[chosen]] - bounds[chosen]) // T  # sequences from each chosen one on
        numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        sequences.append(np.repeat(bounds[chosen], counts) + T * numbers)
        last = bounds[i : i + 1]
    found = np.concatenate(sequences)
    found = found[found + T < len(stream)]  # the last target is a token too
    if len(found) == 0:
        raise BadInput(f"--data.align documents: no document (token {EOT}) begins a sequence of "
                       f"{T + 1:,} tokens in the training data")
    return found


def fit_micro_batch(batch_tokens: int, ranks: int, T: int, at_most: int) -> int:
    """Sequences a rank computes at once: the largest divisor of its share that is <= at_most.

    Raises BadInput where batch_tokens can't be shared out, naming the nearest that can.
    """
    share, rest = divmod(batch_tokens, ranks * T)
    if rest or share == 0:
        below, above = share * ranks * T, (share + 1) * ranks * T
        nearest = f"{below:,} or {above:,}" if below else f"{above:,}"
        raise BadInput(f"batch_tokens {batch_tokens:,} is not divisible by ranks x T = {ranks} x "
                       f"{T:,}: the nearest that is: {nearest}")
    if at_most < 1:
        raise BadInput(f"micro_batch {at_most} leaves nothing to compute: it is at least 1")
    return next(size for size in range(min(at_most, share), 0, -1) if share % size == 0)


class Loader:
    """Batches of the training stream for one rank.

    batch(step) is (micro-steps, B, T + 1) int64 tokens: inputs are [..., :-1], targets [..., 1:].
    The micro-batches of all ranks together are the step's batch_tokens / T sequences. A thread
    reads the next step while this one is computed; on CUDA the batch lies in pinned memory.
    """

    def __init__(
        self, stream: Stream, *, T: int, batch_tokens: int, micro_batch: int, seed: int,
        rank: int = 0, ranks: int = 1, pin: bool = False,
    ) -> None:
        self.stream, self.T, self.seed, self.pin = stream, T, seed, pin
        if len(stream) <= T:
            raise BadInput(f"the training data has {len(stream):,} tokens, "
                           f"less than one sequence of {T + 1:,}")
        # Sequence i belongs to the shard of its first token: shard k has [first[k], first[k+1]).
        if stream.align == "documents":
            self.aligned = document_sequences(stream, T)
            self.sequences = len(self.aligned)
            self.first = np.searchsorted(self.aligned, stream.starts)
            if rank == 0:
                print(f"sequences begin at documents: {self.sequences:,} of {T:,} tokens hold "
                      f"{100 * self.sequences * T / len(stream):.1f} % of the training tokens, the "
                      "others are ends of documents")
        else:
            self.sequences = (len(stream) - 1) // T
            self.first = np.minimum(-(-stream.starts // T), self.sequences)
            self.first[-1] = self.sequences
        self.batch_sequences = batch_tokens // T
        per_rank = self.batch_sequences // ranks
        self.shape = (per_rank // micro_batch, micro_batch, T + 1)
        self.slice = slice(rank * per_rank, (rank + 1) * per_rank)
        self.skipped: list[tuple[int, int]] = []  # batches [begin, end) that no step gets
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next: tuple[int, Future[torch.Tensor]] | None = None
        self._permutation = functools.lru_cache(maxsize=6)(self._shuffled)

    def batch(self, step: int) -> torch.Tensor:
        """This rank's tokens of a step. Raises BadInput if a shard turns out to be damaged."""
        if self._next is not None and self._next[0] == step:
            future = self._next[1]
        else:
            future = self._thread.submit(self._read, step)
        self._next = (step + 1, self._thread.submit(self._read, step + 1))
        return future.result()

    def try_batch(self, step: int) -> tuple[torch.Tensor, BadInput | None]:
        """The batch, or an empty one and what is wrong with the data (the disk's errors too)."""
        try:
            return self.batch(step), None
        except (BadInput, OSError) as error:
            return torch.empty(0), BadInput(str(error))

    def __len__(self) -> int:
        """Micro-steps in a step."""
        return self.shape[0]

    def order(self, step: int) -> np.ndarray:
        """(batch_tokens / T,) numbers of the sequences that make up a step, over all ranks."""
        start = self.batch_number(step) * self.batch_sequences
        return np.concatenate(
            [
                self._epoch_order(epoch, begin, end)
                for epoch, begin, end in self._epochs(start, start + self.batch_sequences)
            ]
        )

    def batch_number(self, step: int) -> int:
        """Which batch of the endless row of batches a step takes: the step-th not skipped."""
        for begin, end in self.skipped:
            if step >= begin:
                step += end - begin
        return step

    def skip(self, first: int, end: int) -> None:
        """Leaves out the batches that steps [first, end) would take; those after them move up."""
        begin, stop = self.batch_number(first), self.batch_number(end - 1) + 1
        apart = [(b, e) for b, e in self.skipped if e < begin or b > stop]
        inside = [x for x in self.skipped if x not in apart]
        begin = min([begin] + [b for b, _ in inside])
        stop = max([stop] + [e for _, e in inside])
        self.set_skipped(sorted([*apart, (begin, stop)]))

    def set_skipped(self, ranges: list[tuple[int, int]]) -> None:
        """Takes over the skipped ranges of a checkpoint: sorted, and apart from each other."""
        self.skipped = [(int(begin), int(end)) for begin, end in ranges]
        self._next = None  # read ahead before

    def epoch(self, step: int) -> float:
        """How often the training data has been seen before this step."""
        return self.batch_number(step) * self.batch_sequences / self.sequences

    def close(self) -> None:
        """Ends the reading thread."""
        self._thread.shutdown(cancel_futures=True)

    def _epochs(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Cuts positions [start, end) at the ends of epochs: (epoch, begin, end inside it)."""
        pieces = []
        while start < end:
            epoch, begin = divmod(start, self.sequences)
            count = min(end - start, self.sequences - begin)
            pieces.append((epoch, begin, begin + count))
            start += count
        return pieces

    def _epoch_order(self, epoch: int, begin: int, end: int) -> np.ndarray:
        """Sequence numbers at positions [begin, end) of an epoch."""
        pieces, position = [], 0
        for shard in self._permutation(epoch, -1, len(self.first) - 1):
            count = int(self.first[shard + 1] - self.first[shard])
            low, high = max(begin - position, 0), min(end - position, count)
            if low < high:
                order = self._permutation(epoch, int(shard), count)
                pieces.append(self.first[shard] + order[low:high])
            position += count
            if position >= end:
                break
        return np.concatenate(pieces)

    def _shuffled(self, epoch: int, shard: int, count: int) -> np.ndarray:
        """A shuffle of range(count), of the shards (shard -1) or of one shard's sequences.

        RandomState's streams are frozen for ever (NumPy's NEP 19); those of Generator may change
        between versions, and a run resumed after an upgrade would see other batches.
        """
        return np.random.RandomState([self.seed, epoch, shard + 1]).permutation(count)

    def _read(self, step: int) -> torch.Tensor:
        order = self.order(step)
        starts = self.aligned[order] if self.stream.align == "documents" else order * self.T
        # Every rank checks every shard of the step, so all of them stop at the same one.
        for shard in self.stream.shards_touched(starts, self.T + 1):
            self.stream.check(shard)
        batch = self.stream.rows(starts[self.slice], self.T + 1).view(self.shape)
        return batch.pin_memory() if self.pin else batch


def validation_sequences(stream: Stream, T: int, val_tokens: int) -> int:
    """How many sequences of T tokens the fixed validation set has: the stream's first val_tokens.

    Raises BadInput where there isn't even one.
    """
    sequences = min(val_tokens, len(stream) - 1) // T
    if sequences < 1:
        raise BadInput(
            f"the validation set is shorter than one sequence: {len(stream):,} tokens there, "
            f"--val_tokens {val_tokens:,}, and {T + 1:,} needed"
        )
    for shard in stream.shards_of(0, sequences * T + 1):
        stream.check(shard)
    return sequences


def validation_batch(stream: Stream, T: int, numbers: list[int]) -> torch.Tensor:
    """(len(numbers), T + 1) int64 tokens of the validation set's sequences with these numbers."""
    return stream.rows(np.array(numbers) * T, T + 1)
