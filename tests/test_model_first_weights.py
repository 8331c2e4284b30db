"""First weights: of the seed alone, whatever the threads; each piece from a stream of its own."""

import math
import sys

import pytest
import torch

from model import first_weights
from model.config import GPTConfig
from model.first_weights import draw_normal
from model.network import new_network, without_weights


def drawn(seed: int, *shapes: tuple[int, ...], std: float = 1.0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    tensors = [torch.full(shape, math.nan) for shape in shapes]
    draw_normal(*((tensor, std) for tensor in tensors))
    return tensors


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(first_weights, "PIECE", 64)


@pytest.mark.usefixtures("small_pieces")
def test_the_numbers_do_not_depend_on_the_threads():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(drawn(3, (40, 16), (7,), (1000,)))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.usefixtures("small_pieces")
def test_every_piece_of_every_matrix_has_other_numbers():
    pieces = [piece for tensor in drawn(3, (64, 64), (64, 64)) for piece in tensor.view(-1, 64)]
    assert len({tuple(piece.tolist()) for piece in pieces}) == len(pieces) == 128


@pytest.mark.parametrize("seed", [0, 1337, 2**40])
def test_they_are_of_the_seed_and_of_no_other(seed):
    first, again, other = drawn(seed, (50,)), drawn(seed, (50,)), drawn(seed + 1, (50,))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.usefixtures("small_pieces")
def test_they_are_normal_and_pieces_know_nothing_of_each_other():
    """A million numbers in 15,625 pieces. Six standard errors each: of a mean 1/sqrt(n), of a
    standard deviation 1/sqrt(2 n), of a correlation of neighbouring pieces 1/sqrt(n); of the
    fourth moment (3 expected) sqrt(96 / n)."""
    n = 1_000_000
    values = drawn(1, (n,))[0].double()
    assert abs(values.mean()) < 6 / math.sqrt(n)
    assert abs(values.std() - 1) < 6 / math.sqrt(2 * n)
    assert abs((values**4).mean() - 3) < 6 * math.sqrt(96 / n)
    assert abs((values[64:] * values[:-64]).mean()) < 6 / math.sqrt(n)


def test_seeds_at_the_end_of_32_bits_go_on_at_zero(monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(2**32 - 1))
    last, first = drawn(0, (8,), (8,))
    for tensor, seed in ((last, 2**32 - 1), (first, 0)):
        assert tensor.equal(torch.empty(8).normal_(generator=torch.Generator().manual_seed(seed)))


def test_parameters_that_want_gradients_are_filled_in_place():
    parameter = torch.nn.Parameter(torch.full((300,), math.nan))
    with torch.no_grad():
        draw_normal((parameter, 0.02))
    # 300 numbers: six standard errors of a standard deviation are 6/sqrt(600) of it
    assert parameter.std().item() == pytest.approx(0.02, rel=6 / math.sqrt(600))
    assert parameter.requires_grad


def test_a_view_that_is_not_contiguous_is_refused_rather_than_copied():
    with pytest.raises(RuntimeError):
        draw_normal((torch.zeros(4, 4).T, 1.0))


@pytest.mark.parametrize("arch", ["gpt2", "speedrun"])
def test_a_network_of_no_memory_is_made_without_drawing(arch, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "normal_", lambda *_, **__: sys.exit("drawn"))
    config = GPTConfig(arch=arch, n_layer=1, n_head=1, n_embd=24, n_ctx=8, n_vocab=130)
    assert without_weights(config).wte.weight.is_meta
    with pytest.raises(SystemExit):
        new_network(config)
