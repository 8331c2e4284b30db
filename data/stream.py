"""The stream: all shards one after the other, as one row of tokens. A position counts tokens in it.

Three shards of 9, 5 and 11 tokens, cut into sequences of T = 4:

    position       0         1         2
                   0123456789012345678901234
    shard          [0      ][1  ][2        ]     shard_starts = [0, 9, 14, 25]
    sequence 0     iiii
                    tttt                         inputs i at 0..3, targets t at 1..4
    sequence 1         iiii
                        tttt                     its first input is the last target before it
    sequence 2             iiii
                            tttt                 begins in shard 0, goes on in shard 1
    sequence 5                         iiii
                                        tttt     the last: (25 - 1) // 4 = 6 sequences

Sequence i is rows([i * T], T + 1): its inputs are [:, :-1] and its targets [:, 1:].
"""

import bisect
import functools
from typing import Literal

import numpy as np
import torch

from data.shard_file import Shard, TokenFile

# Shards up to this size are read into memory when their turn comes: 100 M tokens are a fifth of a
# GB and take a fifth of a second. Larger files (nanoGPT's train.bin) are read a sequence at a time.
IN_MEMORY = 1 << 28  # tokens

# A third way, of data and not of taste: each row of T + 1 tokens is a sequence (data/chat.py).
Cut = Literal["stream", "documents", "rows"]


class Stream:
    """Reads tokens by their position in the stream. Raises BadInput where a file fails."""

    def __init__(self, shards: list[Shard], align: Cut = "stream") -> None:
        """align: where the training sequences begin, at every T-th token, at documents, or at
        every T + 1."""
        self.shards, self.align = shards, align
        lengths = [len(shard.tokens) for shard in shards]
        self.shard_starts = np.cumsum([0, *lengths])  # (shards + 1,)
        self._bounds: list[int] = self.shard_starts.tolist()
        self._checked: set[int] = set()
        self._beginning = np.empty(0, dtype=np.uint16)
        # A batch takes its sequences shard after shard, so one shard in memory is enough.
        self._load = functools.lru_cache(maxsize=1)(self._read_shard)

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def count_sequences(self, T: int) -> int:
        """How many sequences follow each other from the beginning on."""
        if self.align == "rows":
            return len(self) // (T + 1)
        return (len(self) - 1) // T  # the last target is a token too

    def start_of(self, sequences: np.ndarray, T: int) -> np.ndarray:
        """The positions where the sequences with these numbers begin."""
        return sequences * (T + 1 if self.align == "rows" else T)

    def read(self, start: int, count: int) -> np.ndarray:
        """(count,) uint16: the tokens from position `start` on, across shards if need be."""
        pieces = []
        for i in self.shards_of(start, count):
            begin = max(start - int(self.shard_starts[i]), 0)
            end = start + count - int(self.shard_starts[i])
            pieces.append(self.shards[i].tokens[begin:end])
        return np.concatenate(pieces)

    def rows(self, starts: np.ndarray, count: int) -> torch.Tensor:
        """(len(starts), count) int64: what read(start, count) gives for each start."""
        rows = np.empty((len(starts), count), dtype=np.int64)
        if len(starts) == 0:
            return torch.from_numpy(rows)
        low, high = int(starts.min()), int(starts.max()) + count
        shards = self.shards_of(low, high - low)
        if high <= len(self._beginning):
            rows[:] = windows(self._beginning, count)[starts]
        elif len(shards) == 1:  # almost always: a batch is small, and a shard is large
            rows[:] = self._rows_of_shard(shards[0], starts, count)
        else:
            self._fill_across_shards(rows, starts)
        return torch.from_numpy(rows)

    def shards_of(self, start: int, count: int) -> range:
        """The indices of the shards that hold `count` tokens from position `start` on."""
        first = bisect.bisect_right(self._bounds, start) - 1
        last = bisect.bisect_right(self._bounds, start + count - 1) - 1
        return range(first, last + 1)

    def shards_touched(self, starts: np.ndarray, count: int) -> set[int]:
        """The indices of the shards that rows(starts, count) reads."""
        low, high = int(starts.min()), int(starts.max()) + count
        shards = self.shards_of(low, high - low)
        if len(shards) == 1:
            return set(shards)
        return {i for start in starts.tolist() for i in self.shards_of(start, count)}

    def check(self, i: int) -> None:
        """Checks the hash and tokens of shard i before its first use. Raises BadInput."""
        if i not in self._checked:
            self.shards[i].check()
            self._checked.add(i)

    def keep_beginning(self, count: int) -> None:
        """Keeps the first `count` tokens in memory, unless they are too many for that.

        The validation set lies there: no evaluation in mid-run waits for a disk, or fails by one.
        """
        if count <= IN_MEMORY:
            self._beginning = self.read(0, count)

    def _fill_across_shards(self, rows: np.ndarray, starts: np.ndarray) -> None:
        """What rows() does where its rows lie in several shards, or go on from one in the next."""
        count = rows.shape[1]
        shard = np.searchsorted(self.shard_starts, starts, side="right") - 1  # (rows,)
        inside = starts + count <= self.shard_starts[shard + 1]  # (rows,) ends in the same shard
        for i in dict.fromkeys(shard[inside].tolist()):  # in the order of the batch
            here = inside & (shard == i)
            rows[here] = self._rows_of_shard(i, starts[here], count)
        for row in np.flatnonzero(~inside):
            rows[row] = self.read(int(starts[row]), count)

    def _rows_of_shard(self, i: int, starts: np.ndarray, count: int) -> np.ndarray:
        """(len(starts), count) uint16 out of shard i, which holds them all."""
        tokens, inside = self.shards[i].tokens, starts - self.shard_starts[i]
        if isinstance(tokens, TokenFile):
            if len(tokens) > IN_MEMORY:
                return tokens.rows(inside, count)
            tokens.check_size()
            tokens = self._load(i)
        return windows(tokens, count)[inside]

    def _read_shard(self, i: int) -> np.ndarray:
        return self.shards[i].tokens[:]


def windows(tokens: np.ndarray, count: int) -> np.ndarray:
    """(len(tokens) - count + 1, count): row p is tokens[p : p + count]. Nothing is copied."""
    # NumPy's sliding_window_view is the same and takes ten times as long to make, once a batch.
    shape = (len(tokens) - count + 1, count)
    return np.ndarray(shape, tokens.dtype, tokens, strides=tokens.strides * 2)
