"""The batch of a step is a function of seed, step and batch size, and of nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data.alignment
from data.alignment import document_sequences
from data.config import fit_micro_batch
from data.loader import Stream, validation_batch, validation_sequences
from data.shard_file import Shard
from data.tokenizer import EOT
from launch.errors import BadInput
from tests.streams import T, batches, make, stream

# Lengths of what stands before each document: 1 leaves a document empty, 20 is 5 sequences long.
DOCUMENTS = st.lists(st.one_of(st.integers(1, 6), st.integers(1, 20)), min_size=1, max_size=80)


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    documents=st.one_of(st.just([]), DOCUMENTS),
    sequences=st.sampled_from([4, 8, 12]),
    ranks=st.sampled_from([1, 2, 4]),
    start=st.integers(0, 20),
    seed=st.integers(0, 2**32 - 1),
    at_most=st.integers(1, 12),
)
def test_ranks_micro_batches_and_restarts_see_the_same_batches(
    lengths, documents, sequences, ranks, start, seed, at_most
):
    # The last shard makes sure of one sequence.
    source = stream(*lengths, 30, documents=tuple(documents))
    whole = batches(make(source, sequences, seed=seed, micro_batch=sequences), range(start + 2))
    micro = fit_micro_batch(sequences * T, ranks, T, at_most)
    parts = [
        batches(make(source, sequences, seed=seed, micro_batch=micro, rank=r, ranks=ranks),
                range(start, start + 2))
        for r in range(ranks)
    ]
    for i in range(2):
        together = torch.cat([part[i] for part in parts])
        assert torch.equal(together, whole[start + i])


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_an_epoch_takes_every_sequence_once(lengths, seed):
    source = stream(*lengths, 30)
    loader = make(source, 1, seed=seed)
    taken = torch.cat(batches(loader, range(2 * loader.sequences)))
    epochs = taken[:, 0].view(2, -1)
    everything = torch.arange(loader.sequences) * T
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, everything)
    assert torch.equal(taken[:, 1:], taken[:, :1] + torch.arange(1, T + 1))  # across shards too


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5), count=st.integers(1, 9),
       starts=st.lists(st.integers(0, 10**6), max_size=20))
def test_rows_are_what_read_gives_one_by_one(lengths, count, starts):
    source = stream(*lengths, 9)
    positions = np.array(starts, dtype=np.int64) % (len(source) - count + 1)
    rows = source.rows(positions, count)
    assert rows.shape == (len(starts), count)
    assert rows.tolist() == [source.read(int(i), count).tolist() for i in positions]


def aligned_one_by_one(tokens: list[int]) -> list[int]:
    """What document_sequences promises, a token at a time."""
    begins = [i for i, token in enumerate(tokens) if token == EOT]
    found, position = [], begins[0] if begins else len(tokens)
    while position + T < len(tokens):
        found.append(position)
        position += T
        after = min((i for i in begins if i >= position), default=len(tokens))
        if after - position < T:
            position = after
    return found


@settings(deadline=None, max_examples=300)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), documents=DOCUMENTS)
def test_sequences_aligned_with_documents(lengths, documents):
    source = stream(*lengths, documents=tuple(documents))
    expected = aligned_one_by_one(source.read(0, len(source)).tolist())
    if expected:
        assert document_sequences(source, T).tolist() == expected
    else:
        with pytest.raises(BadInput, match="--data.align documents: no document"):
            document_sequences(source, T)


def test_a_long_document_is_cut_and_a_short_end_is_left_out():
    # Documents begin at 2, 5, 6, 19 and 21; T = 4, and 24 is the last target.
    source = stream(11, 14, documents=(2, 3, 1, 13, 2))
    assert document_sequences(source, T).tolist() == [2, 6, 10, 14, 19]
    epoch = torch.cat(batches(make(source, 1), range(5)))
    assert sorted(epoch[:, 1].tolist()) == [3, 7, 11, 15, 20]
    assert (epoch[:, 0] == EOT).sum() == 3


def test_the_share_of_tokens_in_aligned_sequences_is_printed_once(capsys):
    source = stream(11, 14, documents=(2, 3, 1, 13, 2))
    for rank in range(2):
        make(source, 2, rank=rank, ranks=2).close()
    (line,) = capsys.readouterr().out.splitlines()
    assert "5 of 4 tokens hold 80.0 % of the training tokens" in line


def test_every_token_but_a_tail_is_used():
    loader = make(stream(50, 53), 1)
    assert loader.sequences == (103 - 1) // T
    loader.close()


def test_epochs_and_seeds_differ_in_order():
    source = stream(200, 200)
    loader = make(source, 99)
    first, second = loader.sequences_of_step(0), loader.sequences_of_step(1)
    other = make(source, 99, seed=4)
    assert sorted(first) == sorted(second) == list(range(99))
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.sequences_of_step(0).tolist()
    assert first.tolist() != sorted(first)
    loader.close()
    other.close()


def test_the_order_never_changes_between_versions():
    """A run resumed after an upgrade has to see the batches it would have seen. If this fails,
    it isn't the expectation that is wrong."""
    loader = make(stream(23, 22), 11, seed=1337)
    assert loader.sequences_of_step(0).tolist() == ORDER_OF_SEED_1337
    loader.close()


ORDER_OF_SEED_1337 = [6, 8, 7, 10, 9, 5, 3, 0, 2, 4, 1]


def test_one_shard_is_read_at_a_time():
    loader = make(stream(100, 100, 100), 74)
    shards = [int(i) * T // 100 for i in loader.sequences_of_step(0)]
    changes = sum(a != b for a, b in zip(shards, shards[1:], strict=False))
    assert changes == 2
    loader.close()


def test_inputs_and_targets_overlap_by_one():
    (batch,) = batches(make(stream(100), 2, micro_batch=2), range(1))
    assert batch.shape == (2, T + 1)
    assert batch.dtype == torch.int64


@pytest.mark.parametrize(
    ("batch_tokens", "ranks", "at_most", "expected"),
    [(48, 1, 12, 12), (48, 1, 5, 4), (48, 2, 64, 6), (48, 3, 3, 2), (28, 1, 6, 1)],
)
def test_the_micro_batch_is_the_largest_divisor(batch_tokens, ranks, at_most, expected):
    assert fit_micro_batch(batch_tokens, ranks, T, at_most) == expected


@pytest.mark.parametrize(
    ("batch_tokens", "ranks", "line"),
    [(50, 1, "nearest that is: 48 or 52"), (48, 5, "nearest that is: 40 or 60"),
     (3, 1, "nearest that is: 4"), (0, 1, "nearest that is: 4")],
)
def test_a_batch_that_can_not_be_shared_out_names_the_nearest(batch_tokens, ranks, line):
    with pytest.raises(BadInput, match=line):
        fit_micro_batch(batch_tokens, ranks, T, 8)


def test_the_validation_set_is_the_first_tokens():
    source = stream(10, 100)
    assert validation_sequences(source, T, 40) == 10
    assert validation_sequences(source, T, 43) == 10
    assert validation_sequences(source, T, 10**9) == (110 - 1) // T
    rows = validation_batch(source, T, [0, 2])
    assert rows.tolist() == [[0, 1, 2, 3, 4], [8, 9, 10, 11, 12]]


@pytest.mark.parametrize(("length", "val_tokens"), [(4, 100), (100, 3)])
def test_a_validation_set_without_a_sequence_is_refused(length, val_tokens):
    with pytest.raises(BadInput, match="shorter than one sequence"):
        validation_sequences(stream(length), T, val_tokens)


def test_too_little_to_train_on_is_refused():
    with pytest.raises(BadInput, match="less than one sequence"):
        make(stream(4), 1)


def test_the_worked_example_of_documents():
    """The picture in data/alignment.py."""
    tokens = np.array([EOT if c == "E" else ord(c) for c in "EaaaaaEbEcccccEddd"], dtype=np.uint16)
    assert "E a a a a a E b E c c c c c E d d d" in data.alignment.__doc__
    source = Stream([Shard(Path("example"), tokens)], "documents")
    assert document_sequences(source, 4).tolist() == [0, 6, 10]


def test_the_picture_of_the_stream():
    """The picture in data/stream.py."""
    source = stream(9, 5, 11)
    assert source.shard_starts.tolist() == [0, 9, 14, 25]
    loader = make(source, 1)
    assert loader.sequences == 6
    assert loader.first_sequence.tolist() == [0, 3, 4, 6]
    assert source.shards_touched(np.array([2 * T]), T + 1) == {0, 1}
    assert source.rows(np.array([5 * T]), T + 1).tolist() == [[20, 21, 22, 23, 24]]
    loader.close()


def test_skipped_batches_are_taken_by_nobody():
    loader, plain = make(stream(100), 1), make(stream(100), 1)
    loader.skip_batches(2, 4)
    loader.skip_batches(2, 3)  # batch 4, which step 2 takes by now
    loader.skip_batches(6, 7)  # and one apart from these
    assert loader.skipped_batches == [(2, 5), (9, 10)]
    taken = [loader.get_batch(step).tolist() for step in range(8)]
    assert taken == [plain.get_batch(batch).tolist() for batch in (0, 1, 5, 6, 7, 8, 10, 11)]
    for each in (loader, plain):
        each.close()
