"""The tokens of every step, on every rank, as a function of nothing but the seed and the step.

The stream is cut into sequences of T tokens (each with one more, the last target). An epoch takes
every sequence once: shards in shuffled order, the sequences of a shard shuffled, so that the disk
reads one shard at a time. Step s takes the next batch_tokens / T of them. No state is kept: the
batch of step s is computed from (seed, s, batch_tokens) alone, so it's the same after a restart
and on any number of ranks, which only slice it. Only a rollback changes it, by batches to skip.
"""

import functools
import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import corpus
from data.shards import Shard, open_folder
from launch.errors import BadInput


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from: a folder of shards, a text, or the embedded corpus."""

    dir: str = "fineweb10B"
    """Folder of shards; an empty string means the embedded corpus."""
    text: str = ""
    """A text file to train on instead; every 20th block of it is held out for validation."""


class Stream:
    """Shards one after the other, as one row of tokens."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
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

    def shards_of(self, start: int, count: int) -> range:
        """Indices of the shards that hold these tokens."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, start + count - 1, side="right")) - 1
        return range(first, last + 1)

    def shards_touched(self, starts: np.ndarray, count: int) -> set[int]:
        """Indices of all shards that hold `count` tokens from any of these positions on."""
        first = np.searchsorted(self.starts, starts, side="right") - 1
        last = np.searchsorted(self.starts, starts + count - 1, side="right") - 1
        pairs = np.unique(np.stack([first, last]), axis=1).T
        return {shard for low, high in pairs for shard in range(int(low), int(high) + 1)}

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

        The hash is taken from each shard's length and first and last 1,024 tokens.
        """
        digest = hashlib.sha256()
        for shard in self.train.shards:
            digest.update(str(len(shard.tokens)).encode())
            digest.update(shard.tokens[:1024].tobytes() + shard.tokens[-1024:].tobytes())
        return f"{len(self.train):,} tokens ({digest.hexdigest()[:16]})"


def open_data(config: DataConfig) -> Data:
    """Opens what the configuration names. Raises BadInput where it can't be used."""
    if config.text:
        path = Path(config.text)
        train, val = corpus.text_file(path)
        name = path.name
    elif config.dir:
        shards, val_shards, name = open_folder(Path(config.dir))
        return Data(Stream(shards), Stream(val_shards), name)
    else:
        train, val = corpus.embedded()
        path, name = Path("World English Bible"), "World English Bible"
    return Data(Stream([Shard(path, train)]), Stream([Shard(path, val)]), name)


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
        self.sequences = (len(stream) - 1) // T
        if self.sequences < 1:
            raise BadInput(f"the training data has {len(stream):,} tokens, "
                           f"less than one sequence of {T + 1:,}")
        self.batch_sequences = batch_tokens // T
        per_rank = self.batch_sequences // ranks
        self.shape = (per_rank // micro_batch, micro_batch, T + 1)
        self.slice = slice(rank * per_rank, (rank + 1) * per_rank)
        # Sequence i belongs to the shard of its first token: shard k has [first[k], first[k+1]).
        self.first = np.minimum(-(-stream.starts // T), self.sequences)
        self.first[-1] = self.sequences
        self.skipped: list[tuple[int, int]] = []  # batches [begin, end) that no step gets
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next: tuple[int, Future[torch.Tensor]] | None = None
        self._shard_permutation = functools.lru_cache(maxsize=4)(self._permutation)

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
                order = self._shard_permutation(epoch, int(shard), count)
                pieces.append(self.first[shard] + order[low:high])
            position += count
            if position >= end:
                break
        return np.concatenate(pieces)

    def _permutation(self, epoch: int, shard: int, count: int) -> np.ndarray:
        """A shuffle of range(count), of the shards (shard -1) or of one shard's sequences.

        RandomState's streams are frozen for ever (NumPy's NEP 19); those of Generator may change
        between versions, and a run resumed after an upgrade would see other batches.
        """
        return np.random.RandomState([self.seed, epoch, shard + 1]).permutation(count)

    def _read(self, step: int) -> torch.Tensor:
        order = self.order(step)
        # Every rank checks every shard of the step, so all of them stop at the same one.
        for shard in self.stream.shards_touched(order * self.T, self.T + 1):
            self.stream.check(shard)
        rows = np.stack([self.stream.read(int(i) * self.T, self.T + 1) for i in order[self.slice]])
        batch = torch.from_numpy(rows.astype(np.int64)).view(self.shape)
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
    rows = [stream.read(i * T, T + 1) for i in numbers]
    return torch.from_numpy(np.stack(rows).astype(np.int64))
