"""Which tokens a rank sees at which step. As nanoGPT's get_batch, but every sequence has its turn.

    loader = Loader(open_data(DataConfig(text="input.txt")).train, T=1024, batch_tokens=16 * 1024,
                    micro_batch=4, seed=1337)
    batch = loader.get_batch(step=0)          # (4 micro-steps, 4 sequences, T + 1) int64
    inputs, targets = batch[..., :-1], batch[..., 1:]

The training tokens are cut into sequences of T (data/stream.py shows how; --data.align documents:
data/alignment.py). An epoch takes every sequence once, in an order of its own: the shards are
shuffled, and within each shard its sequences, so that one shard is read at a time. The epochs
follow each other, and batch b takes the next batch_tokens / T sequences of them. Here with 7
sequences, of which 0 to 3 begin in shard 0 and 4 to 6 in shard 1, and 4 in a batch:

    epoch        [ 0                 ][ 1                 ][ 2 ...
    shard        [ 1     ][ 0        ][ 0        ][ 1     ][
    sequence       5  4  6  2  0  3  1  0  1  3  2  6  5  4  ...
    batch        [ 0        ][ 1        ][ 2        ][ 3   ...

So the batch of a step is computed from (seed, step, batch_tokens) alone. No position is kept: it's
the same after a restart, and on any number of ranks, each of which takes a slice of it. Only a
rollback changes it: the batches that did harm are skipped, and the steps take the next ones.
"""

import functools
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from data.alignment import document_sequences
from data.chat import inputs_and_targets
from data.dataset import Data
from data.stream import Stream
from kernels.constants import IGNORE
from launch.errors import BadInput


class Loader:
    """Batches of the training stream for one rank.

    A thread reads the next step's batch while this one is computed; on CUDA (pin) a batch lies in
    pinned memory. Raises BadInput where the data doesn't hold one sequence.
    """

    def __init__(
        self, stream: Stream, *, T: int, batch_tokens: int, micro_batch: int, seed: int,
        rank: int = 0, ranks: int = 1, pin: bool = False,
    ) -> None:
        self.stream, self.T, self.seed, self.pin = stream, T, seed, pin
        self.batch_sequences = batch_tokens // T  # sequences in a step, over all ranks
        per_rank = self.batch_sequences // ranks
        self.rank_slice = slice(rank * per_rank, (rank + 1) * per_rank)
        self.batch_shape = (per_rank // micro_batch, micro_batch, T + 1)
        self.skipped_batches: list[tuple[int, int]] = []  # [begin, end) each, sorted, apart
        self._cut_into_sequences(say=rank == 0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next: tuple[int, Future[torch.Tensor]] | None = None  # step, its batch
        self._permutation = functools.lru_cache(maxsize=6)(self._shuffle)

    @property
    def micro_steps(self) -> int:
        """Forward and backward passes of a rank in a step."""
        return self.batch_shape[0]

    def get_batch(self, step: int) -> torch.Tensor:
        """This rank's share of a step: (micro-steps, B, T + 1) int64. The micro-batches of all
        ranks together are the step's batch_tokens / T sequences.

        Raises BadInput where a shard turns out to be damaged, on every rank at the same step.
        """
        if self._next is not None and self._next[0] == step:
            batch = self._next[1]
        else:
            batch = self._thread.submit(self._read_batch, step)
        self._next = (step + 1, self._thread.submit(self._read_batch, step + 1))
        return batch.result()

    def try_get_batch(self, step: int) -> tuple[torch.Tensor, int, BadInput | None]:
        """The batch, its targets over all ranks, and None; or tokens 0 in its place, as many, and
        what is wrong with the data."""
        try:
            return self.get_batch(step), self.count_targets(step), None
        except BadInput as error:
            zeros = torch.zeros(self.batch_shape, dtype=torch.int64)
            return zeros, self.batch_sequences * self.T, error

    def sequences_of_step(self, step: int) -> np.ndarray:
        """(batch_tokens / T,) numbers of the sequences that make up a step, over all ranks."""
        begin = self._batch_number(step) * self.batch_sequences
        end = begin + self.batch_sequences
        pieces = []
        while begin < end:  # a batch may take the end of one epoch and the beginning of the next
            epoch, begin_in_epoch = divmod(begin, self.sequences)
            count = min(end - begin, self.sequences - begin_in_epoch)
            pieces += self._sequences_of_epoch(epoch, begin_in_epoch, begin_in_epoch + count)
            begin += count
        return np.concatenate(pieces)

    def sequence_starts(self, sequences: np.ndarray) -> np.ndarray:
        """The positions in the stream where the sequences with these numbers begin."""
        if self.stream.align == "documents":
            return self.aligned_starts[sequences]
        return self.stream.start_of(sequences, self.T)

    def inputs_and_targets(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T + 1) of a batch -> (B, T) tokens to read, (B, T) to predict: of conversations only
        what the assistant says, IGNORE elsewhere."""
        if self.stream.align == "rows":
            return inputs_and_targets(tokens)
        return tokens[:, :-1], tokens[:, 1:]

    def token_orders(self, batch: torch.Tensor) -> torch.Tensor:
        """Of each micro-batch the places of its inputs, those of one token side by side:
        (micro-steps, B T) int32. In this order a GPU adds up the gradients of a token's embedding,
        and need not sort (kernels/embedding.py).
        """
        orders = np.empty((len(batch), self.batch_shape[1] * self.T), np.int32)
        for order, tokens in zip(orders, batch, strict=True):
            inputs, _ = self.inputs_and_targets(tokens)  # (B, T), below 2^16: a radix sort
            order[:] = np.argsort(inputs.flatten().numpy().astype(np.uint16), kind="stable")
        return torch.from_numpy(orders).pin_memory() if self.pin else torch.from_numpy(orders)

    def count_targets(self, step: int) -> int:
        """Tokens to predict in a step, over all ranks: batch_tokens, or fewer in conversations."""
        if self.stream.align != "rows":
            return self.batch_sequences * self.T
        starts = self.sequence_starts(self.sequences_of_step(step))  # (batch_tokens / T,)
        return count_targets(self.stream.rows(starts, self.T + 1))

    def epoch(self, step: int) -> float:
        """How many epochs lie before this step: 1.5 after the training data once and a half."""
        return self._batch_number(step) * self.batch_sequences / self.sequences

    def skip_batches(self, first: int, end: int) -> None:
        """Skips the batches of steps [first, end): these steps take the batches after them."""
        begin, stop = self._batch_number(first), self._batch_number(end - 1) + 1
        apart = []
        for low, high in self.skipped_batches:
            if high < begin or low > stop:
                apart.append((low, high))
            else:  # one range with the new one
                begin, stop = min(begin, low), max(stop, high)
        self.load_skipped_batches(sorted([*apart, (begin, stop)]))

    def load_skipped_batches(self, ranges: list[tuple[int, int]]) -> None:
        """Takes over skipped_batches as a checkpoint holds them (state.json, "skipped")."""
        self.skipped_batches = [(int(begin), int(end)) for begin, end in ranges]
        self._next = None  # it was read ahead before

    def close(self) -> None:
        """Ends the reading thread."""
        self._thread.shutdown(cancel_futures=True)

    def _cut_into_sequences(self, say: bool) -> None:
        """Counts the sequences, and those that begin in each shard."""
        stream, T = self.stream, self.T
        if len(stream) <= T:
            raise BadInput(f"the training data has {len(stream):,} tokens, "
                           f"less than one sequence of {T + 1:,}")
        # Sequences first_sequence[k] to first_sequence[k + 1] begin in shard k.
        if stream.align == "documents":
            self.aligned_starts = document_sequences(stream, T)  # (sequences,)
            self.sequences = len(self.aligned_starts)
            self.first_sequence = np.searchsorted(self.aligned_starts, stream.shard_starts)
            if say:
                print(f"sequences begin at documents: {self.sequences:,} of {T:,} tokens hold "
                      f"{100 * self.sequences * T / len(stream):.1f} % of the training tokens, the "
                      "others are ends of documents")
            return
        self.sequences = stream.count_sequences(T)
        first_sequence = -(-stream.shard_starts // T)  # rounded up; rows are all in one shard
        self.first_sequence = np.minimum(first_sequence, self.sequences)
        self.first_sequence[-1] = self.sequences

    def _batch_number(self, step: int) -> int:
        """Which batch a step takes: the step-th of those that aren't skipped."""
        number = step
        for begin, end in self.skipped_batches:
            if number >= begin:
                number += end - begin
        return number

    def _sequences_of_epoch(self, epoch: int, begin: int, end: int) -> list[np.ndarray]:
        """The numbers of the sequences at places [begin, end) of an epoch, shard by shard."""
        pieces = []
        shards = len(self.first_sequence) - 1
        place = 0  # of this shard's first sequence in the epoch
        for shard in self._permutation(epoch, -1, shards):
            first = int(self.first_sequence[shard])
            count = int(self.first_sequence[shard + 1]) - first
            low, high = max(begin - place, 0), min(end - place, count)
            if low < high:
                pieces.append(first + self._permutation(epoch, int(shard), count)[low:high])
            place += count
            if place >= end:
                break
        return pieces

    def _shuffle(self, epoch: int, shard: int, count: int) -> np.ndarray:
        """A shuffle of range(count), of the shards (shard -1) or of one shard's sequences.

        RandomState's streams are frozen for ever (NumPy's NEP 19); those of Generator may change
        between versions, and a run resumed after an upgrade would see other batches.
        """
        return np.random.RandomState([self.seed, epoch, shard + 1]).permutation(count)

    def _read_batch(self, step: int) -> torch.Tensor:
        """What get_batch gives, read now."""
        starts = self.sequence_starts(self.sequences_of_step(step))  # (batch_tokens / T,)
        # Every rank checks every shard of the step, so all of them stop at the same one.
        for shard in self.stream.shards_touched(starts, self.T + 1):
            self.stream.check(shard)
        rows = self.stream.rows(starts[self.rank_slice], self.T + 1)  # (share of the rank, T + 1)
        batch = rows.view(self.batch_shape)  # (micro-steps, B, T + 1)
        return batch.pin_memory() if self.pin else batch


def validation_sequences(stream: Stream, T: int, val_tokens: int) -> int:
    """How many sequences of T tokens the fixed validation set has: the stream's first val_tokens.

    They are checked, and stay in memory. Raises BadInput where there isn't even one.
    """
    sequences = min(val_tokens // T, stream.count_sequences(T))
    if sequences < 1:
        raise BadInput(
            f"the validation set is shorter than one sequence: {len(stream):,} tokens there, "
            f"--val_tokens {val_tokens:,}, and {T + 1:,} needed"
        )
    end = int(stream.start_of(np.array(sequences - 1), T)) + T + 1
    for shard in stream.shards_of(0, end):
        stream.check(shard)
    stream.keep_beginning(end)
    return sequences


def describe_validation(data: Data, T: int, sequences: int) -> str:
    """The data set and the number of tokens that a validation loss is the loss of."""
    if not data.chat:
        return f"{data.name}, {sequences * T:,} tokens"
    targets = count_targets(validation_batch(data.val, T, [*range(sequences)]))
    return f"{data.name}, {targets:,} tokens of the answers in {sequences:,} conversations"


def count_targets(rows: torch.Tensor) -> int:
    """Tokens to predict in rows of T + 1 tokens."""
    _inputs, targets = inputs_and_targets(rows)
    return int((targets != IGNORE).sum())


def validation_batch(stream: Stream, T: int, sequences: list[int]) -> torch.Tensor:
    """(len(sequences), T + 1) int64 tokens of the validation set's sequences with these numbers."""
    return stream.rows(stream.start_of(np.array(sequences), T), T + 1)
