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

from kernels import launcher, reference, tiles
from kernels.direct import refuse_second_derivative

# Places: 4,800 of 65,536 tokens of the embedded text are commas, and one program that added them
# all up took 1.5 ms of an H200, of a step's 121.
PIECE = 64


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
def _token(tokens, stride, T, place):
    """The token at places of the batch. tokens: (B, T), rows `stride` apart."""
    return tl.load(tokens + (place // T).to(tl.int64) * stride + place % T)


@triton.jit
def _add(dwte, token, C, columns, inside, total):
    """Adds total to these cells of a token's row of dwte (V, C)."""
    cells = dwte + token * C + columns
    sums = tl.load(cells, mask=inside, other=0.0).to(tl.float32) + total
    tl.store(cells, sums.to(dwte.dtype.element_ty), mask=inside)


@triton.jit
def _token_rows(
    tokens, stride, order, dx, dwte, parts, first, columns, N, T, C,
    PIECE: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """What the place `first` of the order has to do, for some columns: see embedding_backward."""
    inside = columns < C
    end = tl.minimum(first // PIECE * PIECE + PIECE, N)  # of its piece
    token = _token(tokens, stride, T, tl.load(order + first))
    before = _token(tokens, stride, T, tl.load(order + tl.maximum(first - 1, 0)))
    begins = (first == 0) | (before != token)
    if begins | (first % PIECE == 0):
        total = tl.zeros([BLOCK_M, columns.shape[0]], tl.float32)
        start = first
        more = True
        while more:
            at = start + tl.arange(0, BLOCK_M)
            places = tl.load(order + at, mask=at < end, other=0)
            same = (_token(tokens, stride, T, places) == token) & (at < end)
            cells = places[:, None].to(tl.int64) * C + columns[None, :]
            rows = tl.load(dx + cells, mask=same[:, None] & inside[None, :], other=0.0)
            total += rows.to(tl.float32)
            count = tl.sum(same.to(tl.int32))
            start += count
            more = count == BLOCK_M
        after = _token(tokens, stride, T, tl.load(order + tl.minimum(start, N - 1)))
        goes_on = (start == end) & (end < N) & (after == token)
        if begins & (goes_on == 0):
            _add(dwte, token, C, columns, inside, tl.sum(total, 0))
        else:
            part = (2 * (first // PIECE) + (first % PIECE != 0)).to(tl.int64)
            tl.store(parts + part * C + columns, tl.sum(total, 0), mask=inside)


@triton.jit
def embedding_backward(
    tokens, stride, order, dx, dwte, dwpe, parts, N, T, C,
    PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, POSITIONS: tl.constexpr,
):
    """One program, a place of the order or, after all N of them, a position, and a tile of columns:
    grid (N, or with POSITIONS N + T, tiles of columns).

    The order is cut into pieces of PIECE places. The first place of a token in a piece adds up the
    rows of dx (N, C) that the token has there, BLOCK_M at a time. Where they are all that it has,
    they are added to these cells of dwte (V, C); a token that a border cuts has a part in each
    piece, which embedding_join adds up: parts (2 * pieces, C), of what begins a piece and of what
    ends one. Other places have nothing to do. A position adds up its rows for these cells of dwpe
    (T, C). Each cell is written by one program.
    """
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0)
    if first < N:
        _token_rows(tokens, stride, order, dx, dwte, parts, first, columns, N, T, C, PIECE, BLOCK_M)
    elif POSITIONS:
        inside = columns < C
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(first - N, N, BLOCK_M * T):
            places = start + tl.arange(0, BLOCK_M) * T
            cells = places[:, None].to(tl.int64) * C + columns[None, :]
            mask = (places < N)[:, None] & inside[None, :]
            total += tl.load(dx + cells, mask=mask, other=0.0).to(tl.float32)
        cells = dwpe + (first - N) * C + columns
        tl.store(cells, tl.sum(total, 0).to(dwpe.dtype.element_ty), mask=inside)


@triton.jit
def embedding_join(
    tokens, stride, order, dwte, parts, N, T, C,
    PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program, a piece of the order and a tile of columns: grid (pieces, tiles of columns).

    The piece in which a token begins that goes on in the next adds up its parts, BLOCK_M at a
    time, in the order's order, and adds them to these cells of dwte, which it alone writes.
    """
    piece = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < C
    first = piece * PIECE
    next_one = first + PIECE
    if next_one < N:
        token = _token(tokens, stride, T, tl.load(order + next_one))
        last_token = _token(tokens, stride, T, tl.load(order + next_one - 1))
        whole = _token(tokens, stride, T, tl.load(order + first)) == token
        before = _token(tokens, stride, T, tl.load(order + tl.maximum(first - 1, 0)))
        begins = (whole == 0) | (first == 0) | (before != token)
        if (last_token == token) & begins:
            part = (2 * piece + (whole == 0)).to(tl.int64)
            total = tl.load(parts + part * C + columns, mask=inside, other=0.0)
            start = piece + 1
            more = True
            while more:
                at = start + tl.arange(0, BLOCK_M)
                places = tl.load(order + at * PIECE, mask=at * PIECE < N, other=0)
                same = (_token(tokens, stride, T, places) == token) & (at * PIECE < N)
                cells = 2 * at[:, None].to(tl.int64) * C + columns[None, :]
                rows = tl.load(parts + cells, mask=same[:, None] & inside[None, :], other=0.0)
                total += tl.sum(rows, 0)
                start += BLOCK_M
                more = tl.sum(same.to(tl.int32)) == BLOCK_M
            _add(dwte, token, C, columns, inside, total)


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


def launch_backward(
    idx: Tensor, order: Tensor, dx: Tensor, dwte: Tensor, dwpe: Tensor | None
) -> None:
    """Adds dx (B, T, C), summed over the places of each token, to dwte (V, C), and puts its sums
    over B into dwpe (T, C), if there is one."""
    B, T, C = dx.shape
    N = B * T
    pieces = tiles.cdiv(N, PIECE)
    parts = dx.new_empty(2 * pieces, C, dtype=torch.float32)
    tile = tiles.pick("embedding_backward", tiles.arch(idx.device), 1)
    columns = tiles.cdiv(C, tile.n)
    launcher.launch(embedding_backward, (N if dwpe is None else N + T, columns),
        idx, idx.stride(0), order, dx.contiguous(), dwte, dwpe, parts, N, T, C,
        PIECE=PIECE, BLOCK_M=tile.m, BLOCK_N=tile.n, POSITIONS=dwpe is not None,
        num_warps=tile.warps,
    )
    if pieces > 1:
        launcher.launch(embedding_join, (pieces, columns),
            idx, idx.stride(0), order, dwte, parts, N, T, C,
            PIECE=PIECE, BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps,
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
    def backward(ctx, dx, dhead):
        refuse_second_derivative("embedding")
        idx, order = ctx.saved_tensors
        _, T, C = dx.shape
        # The head's gradient is the loss's alone to give, and nobody reads it later: added to.
        dwte = dx.new_zeros(ctx.V, C) if dhead is None else dhead.contiguous()
        dwpe = None
        if ctx.n_ctx:  # positions that no token had have no gradient
            dwpe = (dx.new_zeros if ctx.n_ctx > T else dx.new_empty)(ctx.n_ctx, C)
        launch_backward(idx, order, dx, dwte, dwpe)
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
