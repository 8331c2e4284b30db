"""The batch of a step is a function of seed, step and batch size, and of nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import (
    DataConfig,
    Loader,
    Stream,
    document_sequences,
    fit_micro_batch,
    open_data,
    validation_batch,
    validation_sequences,
)
from data.shards import Shard, convert, open_folder, write_folder
from data.tokenizer import EOT
from launch.errors import BadInput

T = 4


def stream(*lengths: int, documents: tuple[int, ...] = ()) -> Stream:
    """Shards whose tokens number the stream, so that a token says where it stood.

    Where documents of these lengths begin stands EOT, and the stream is aligned with them.
    """
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    begins = np.cumsum(documents, dtype=np.int64)
    tokens[begins[begins < len(tokens)]] = EOT
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    return Stream([Shard(Path(f"shard{i}"), part) for i, part in enumerate(parts)],
                  "documents" if documents else "stream")


def batches(loader: Loader, steps: range) -> list[torch.Tensor]:
    with_all = [loader.get_batch(step).reshape(-1, loader.T + 1) for step in steps]
    loader.close()
    return with_all


def make(source: Stream, sequences: int, **settings) -> Loader:
    return Loader(source, T=T, batch_tokens=sequences * T,
                  **({"micro_batch": 1, "seed": 3} | settings))


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


def test_every_format_is_aligned_alike_and_validation_is_not(tmp_path):
    tokens = stream(60, documents=(1, 9, 2, 30)).read(0, 60)
    write_folder(tmp_path / "llmc", "toy", [tokens[:25], tokens[25:]], tokens[:20], "toy")
    convert(tmp_path / "llmc", "npy")
    convert(tmp_path / "llmc", "nanogpt")
    seen = []
    for folder in ("llmc", "llmc-npy", "llmc-nanogpt"):
        data = open_data(DataConfig(dir=str(tmp_path / folder), align="documents"))
        loader = make(data.train, 1)
        taken = sorted(loader.sequences_of_step(step)[0] for step in range(loader.sequences))
        assert taken == list(range(loader.sequences))
        seen.append([loader.stream.rows(loader.aligned_starts, T + 1).tolist(), data.val.align])
        loader.close()
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][1] == "stream"
    assert seen[0][0][0] == [EOT, *range(2, 6)]


def test_how_sequences_are_cut_belongs_to_the_training_data(corpus_file):
    plain = open_data(DataConfig(text=str(corpus_file))).fingerprint()
    aligned = open_data(DataConfig(text=str(corpus_file), align="documents")).fingerprint()
    assert aligned == plain + ", cut at documents"


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


def test_a_damaged_shard_is_found_before_a_token_of_it_is_used(tmp_path):
    tokens = np.arange(40, dtype=np.uint16)
    write_folder(tmp_path, "toy", [tokens, tokens], tokens, "toy")
    path = tmp_path / "toy_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x00\x00")
    train, _, _ = open_folder(tmp_path)
    loader = make(Stream(train), 1)
    good = {i for i in range(loader.sequences) if i * T + T < 40}
    for step in range(loader.sequences):
        if int(loader.sequences_of_step(step)[0]) in good:
            loader._read_batch(step)
        else:
            with pytest.raises(BadInput, match="sha256 differs"):
                loader._read_batch(step)
    loader.close()
