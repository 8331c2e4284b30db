"""GPT-2's two embeddings, and their gradients without a sort on the device, in Triton.

    x[n] = wte[token[n]] + wpe[n mod T]
    dwte[v] = sum of dx[n] over the places n of token v,   dwpe[t] = sum of dx[n] over n mod T = t

PyTorch's own gradient of wte sorts the tokens, in twenty launches. Here the host has sorted them:
`order` holds the places with those of one token side by side, so that one program finds all that it
has to add up in a row, in the same order every time: no atomics, the same bits in every run.

wte is the output head too. So that its two gradients are added without a third matrix, the head
takes it from here: embedding() hands it on, and its backward pass adds the tokens' part to the
head's, which comes in.

Shapes: N = B * T tokens, C width, V rows of wte.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import launcher, reference, tiles


@triton.jit
def embedding_forward(
    tokens, stride, wte, wpe, x, T, C, BLOCK: tl.constexpr, POSITIONS: tl.constexpr
):
    """One program, one token: grid (N,). It alone writes this row of x (N, C). tokens: (B, T), rows
    `stride` apart; wte: (V, C); wpe: (n_ctx, C), read with POSITIONS."""
    place = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    token = tl.load(tokens + place // T * stride + place % T)
    row = tl.load(wte + token * C + columns, mask=inside, other=0.0).to(tl.float32)
    if POSITIONS:
        row += tl.load(wpe + place % T * C + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + place * C + columns, row.to(x.dtype.element_ty), mask=inside)


@triton.jit
def embedding_backward(
    tokens, stride, order, dx, dwte, N, T, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One program, a place in the order and a tile of columns: grid (N, tiles of columns).

    The first place of a token adds up all of the token's rows of dx (N, C), BLOCK_M at a time, and
    adds them to these cells of dwte (V, C), which it alone writes; other places have nothing to do.
    """
    first = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < C
    place = tl.load(order + first)
    token = tl.load(tokens + (place // T).to(tl.int64) * stride + place % T)
    place = tl.load(order + tl.maximum(first - 1, 0))
    before = tl.load(tokens + (place // T).to(tl.int64) * stride + place % T)
    if (first == 0) | (before != token):
        total = tl.zeros([BLOCK_N], tl.float32)
        start = first
        more = True
        while more:
            at = start + tl.arange(0, BLOCK_M)
            places = tl.load(order + at, mask=at < N, other=0)
            cells = (places // T).to(tl.int64) * stride + places % T
            same = (tl.load(tokens + cells) == token) & (at < N)
            cells = places[:, None].to(tl.int64) * C + columns[None, :]
            rows = tl.load(dx + cells, mask=same[:, None] & inside[None, :], other=0.0)
            total += tl.sum(rows.to(tl.float32), 0)
            start += BLOCK_M
            more = tl.sum(same.to(tl.int32)) == BLOCK_M
        cells = dwte + token * C + columns
        sums = tl.load(cells, mask=inside, other=0.0).to(tl.float32) + total
        tl.store(cells, sums.to(dwte.dtype.element_ty), mask=inside)


def launch_forward(idx: Tensor, wte: Tensor, wpe: Tensor | None) -> Tensor:
    """(B, T, C). idx: (B, T); its rows may lie apart."""
    (B, T), C = idx.shape, wte.shape[1]
    x = wte.new_empty(B, T, C)
    block = tiles.next_power_of_2(C)
    tile = tiles.pick("embedding_forward", tiles.arch(idx.device), block)
    launcher.launch(embedding_forward, (B * T,),
        idx, idx.stride(0), wte, wpe, x, T, C,
        BLOCK=block, POSITIONS=wpe is not None, num_warps=tile.warps,
    )
    return x


def launch_backward(idx: Tensor, order: Tensor, dx: Tensor, dwte: Tensor) -> None:
    """Adds dx (B, T, C), summed over the places of each token, to dwte (V, C)."""
    B, T, C = dx.shape
    tile = tiles.pick("embedding_backward", tiles.arch(idx.device), 1)
    launcher.launch(embedding_backward, (B * T, tiles.cdiv(C, tile.n)),
        idx, idx.stride(0), order, dx.contiguous(), dwte, B * T, T, C,
        BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps,
    )


class _Embedding(torch.autograd.Function):
    """(x, wte for the head). wpe before wte: then DDP hears of it first, and reduces both at once,
    in 14 buckets of GPT-2 124M, not 15."""

    @staticmethod
    def forward(ctx, idx, wpe, wte, order):
        ctx.save_for_backward(idx, order)
        ctx.V, ctx.n_ctx = len(wte), 0 if wpe is None else len(wpe)
        ctx.set_materialize_grads(False)  # no zeros for a head that is not this one
        return launch_forward(idx, wte, wpe), wte.view_as(wte)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dhead):
        idx, order = ctx.saved_tensors
        _, T, C = dx.shape
        # The head's gradient is the loss's alone to give, and nobody reads it later: added to.
        dwte = dx.new_zeros(ctx.V, C) if dhead is None else dhead.contiguous()
        launch_backward(idx, order, dx, dwte)
        dwpe = None
        if ctx.n_ctx:
            dwpe = dx.sum(0)  # (T, C)
            if ctx.n_ctx > T:
                dwpe = torch.nn.functional.pad(dwpe, (0, 0, 0, ctx.n_ctx - T))
        return None, dwpe, dwte, None


def embedding(
    idx: Tensor, wte: Tensor, wpe: Tensor | None = None, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Looks up tokens and adds their positions.

    idx: (B, T) int64, below V; wte: (V, C); wpe: (n_ctx, C) or none; order: (B T,) int32, the
    places of idx's tokens sorted by token. Returns (x (B, T, C), wte for the output head); without
    an order PyTorch's own (kernels/reference.py, the definition).
    """
    if order is None:
        return reference.embedding(idx, wte, wpe)
    return _Embedding.apply(idx, wpe, wte, order)
