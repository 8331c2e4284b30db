"""The embeddings' kernels, interpreted, against PyTorch's own in fp64; and the order they go by.

    pytest tests/test_kernels_embedding.py
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import Loader
from data.shard_file import Shard
from data.stream import Stream
from kernels import embedding, operators, reference
from model.gpt2 import GPT, GPTConfig
from tests.exact import poison  # noqa: F401

V, N_CTX = 40, 13
ROWS = {  # (B, T): the last of the wider rows that a batch has is nobody's input
    "few of each": torch.randint(0, V, (3, 9), generator=torch.Generator().manual_seed(0)),
    "one alone": torch.full((2, 13), 7),  # more places than a tile has rows
    "a whole tile, and one more": torch.tensor([[3] * 9, [5] * 8 + [0]]),
    "one token": torch.tensor([[39]]),
    # Of 156 places in the order, pieces end at 64 and 128.
    "one through three pieces": torch.full((12, 13), 7),
    "a border between tokens": torch.tensor([3] * 64 + [5] * 64 + [8] * 28).view(12, 13),
    "across a border": torch.tensor([3] * 50 + [5] * 30 + [9] * 76).view(12, 13),
    "whole pieces and a bit": torch.tensor([3] * 64 + [5] * 92).view(12, 13),
    "many": torch.randint(0, 5, (12, 13), generator=torch.Generator().manual_seed(3)),
}


def strided(idx):
    """The same as a batch gives it: the first T of T + 1 columns."""
    return torch.nn.functional.pad(idx, (0, 1), value=V - 1)[:, :-1]


def sorted_places(idx):
    return idx.flatten().argsort(stable=True).int()


def results(function, idx, C, dtype, head, positions):
    """x, and the gradients of wte and wpe; head: whether the output head has one too."""
    draw = torch.Generator().manual_seed(1)
    wte, wpe = (torch.randn(n, C, generator=draw).to(dtype).requires_grad_() for n in (V, N_CTX))
    dx = torch.randn(*idx.shape, C, generator=draw).to(dtype)
    dhead = torch.randn(V, C, generator=draw).to(dtype)
    x, tied = function(idx, wte, wpe if positions else None, sorted_places(idx))
    torch.autograd.backward((x, tied) if head else (x,), (dx, dhead) if head else (dx,))
    return [x.detach(), wte.grad, *([wpe.grad] if positions else [])]


# fp32: sums of up to 156 rows, 4 at a time in each piece and then the pieces: some 20 roundings, or
# 41 where pieces are of 4, each by at most 2^-24 of a partial sum, on the average half the whole:
# 1.2e-6, were all in one direction, and half of that or less as they are.
LIMIT = 1e-6


def errors(rows, C, head, positions):
    """Of x and the gradients, relative to fp64's."""
    idx = strided(ROWS[rows])
    got = results(embedding.embedding, idx, C, torch.float32, head, positions)
    exact = results(reference.embedding, idx, C, torch.float64, head, positions)
    assert {a.dtype for a in got} == {torch.float32}
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("positions", [True, False], ids=["positions", "none"])
@pytest.mark.parametrize("head", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("C", [48, 300])  # less than a tile of columns, and more
@pytest.mark.parametrize("rows", ROWS)
def test_embedding(rows, C, head, positions):
    assert max(errors(rows, C, head, positions)) <= LIMIT


@pytest.mark.parametrize("piece", [4, 8])
@pytest.mark.parametrize("rows", ["one through three pieces", "across a border", "many"])
def test_a_token_in_many_pieces(rows, piece, monkeypatch):
    """In up to 39 of them: more than a program of embedding_join takes at once."""
    monkeypatch.setattr(embedding, "PIECE", piece)
    assert max(errors(rows, 48, True, True)) <= LIMIT


def test_without_an_order_it_is_pytorchs_own():
    wte, wpe = torch.randn(V, 16), torch.randn(N_CTX, 16)
    x, head = embedding.embedding(ROWS["few of each"], wte, wpe)
    assert torch.equal(x, wte[ROWS["few of each"]] + wpe[:9]) and head is wte


def test_a_models_tied_gradient_is_the_same():
    """Of head and tokens together, in the whole network: as without an order, up to rounding."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=64, n_ctx=16, n_vocab=100)
    gradients = []
    idx = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(2))
    for order in (None, sorted_places(idx)):
        torch.manual_seed(0)
        model = GPT(config, operators.TORCH._replace(embedding=embedding.embedding))
        model(idx, idx.roll(1), "sum", order).backward()
        gradients.append([model.wte.weight.grad, model.wpe.weight.grad])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm() and b.norm() > 0


def test_the_loader_puts_the_places_of_a_token_side_by_side():
    tokens = np.random.RandomState(0).randint(0, 9, 200).astype(np.uint16)
    stream = Stream([Shard(Path("tokens"), tokens)])
    loader = Loader(stream, T=5, batch_tokens=40, micro_batch=2, seed=0)
    batch = loader.get_batch(0)
    orders = loader.token_orders(batch)
    assert orders.shape == (4, 10) and orders.dtype == torch.int32
    for order, micro_batch in zip(orders, batch, strict=True):
        assert torch.equal(order, sorted_places(loader.inputs_and_targets(micro_batch)[0]))
    loader.close()
