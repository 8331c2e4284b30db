"""Causal flash attention in Triton, forward and backward, out of the packed projection.

For every batch and head, with q, k, v of shape (T, D):

    s = q k^T / sqrt(D), s_ij = -inf for j > i,   lse_i = log sum_j exp(s_ij)
    p_ij = exp(s_ij - lse_i),   o = p v

and backward, with delta_i = sum_d o_id do_id = sum_j p_ij dp_ij:

    dp = do v^T,   ds = p * (dp - delta)
    dv = p^T do,   dq = ds k / sqrt(D),   dk = ds^T q / sqrt(D)

A program holds one tile of queries (or keys) and walks over the other side, so no (T, T) matrix is
ever in memory; the running maximum and sum make the softmax exact. FlashAttention-2, arXiv
2307.08691, with its two passes backward: dq (which also makes delta), then dk and dv, each from a
recomputed p. Nothing is added atomically, hence every run gives the same bits.

q, k, v lie side by side in qkv (B, T, 3C), and o goes to (B, T, C) with the heads side by side: the
kernels reach them by strides, without a transpose or a copy. Products take the inputs' dtype and
accumulate in fp32; softmax is fp32. Exponentials are powers of two, as the hardware makes them:
`lse` holds lse_i / ln 2.

Shapes: B batch, T time, C = H * D width, H heads, D head width (64 or 128), M queries and N keys of
one tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import tiles

HEAD_WIDTHS = (64, 128)

LOG2E = tl.constexpr(1.4426950408889634)
IEEE = tl.constexpr("ieee")  # fp32 products in fp32, not in TF32's 10 bits; bf16 and fp16 ignore it


@triton.jit
def _place(T, ROWS: tl.constexpr):
    """(tile, batch * H + head) of this program in _grid's order."""
    tiles = tl.cdiv(T, ROWS)
    bh = tl.program_id(0) // tiles
    return tl.program_id(0) - bh * tiles, bh


@triton.jit
def _load(
    x, b, row, column, T, width,
    ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, EDGE: tl.constexpr,
):
    """(ROWS, D) of x (B, T, width) from (b, row, column) on; rows from T on are zero.

    x is a tensor descriptor (TMA) or a pointer. EDGE: the tile may reach past T. A descriptor
    always looks; a pointer only where it has to, since masks cost instructions in the loop.
    """
    if TMA:
        return x.load([b, row, column]).reshape(ROWS, D)
    else:
        rows = row + tl.arange(0, ROWS)
        # int64: B * T * 3C passes 2^31 at 911 sequences of GPT-2 124M.
        start = x + b.to(tl.int64) * T * width + column
        at = start + rows[:, None] * width + tl.arange(0, D)[None, :]
        if EDGE:
            return tl.load(at, mask=rows[:, None] < T, other=0.0)
        else:
            return tl.load(at)


@triton.jit
def _store(x, value, b, row, column, T, width, ROWS: tl.constexpr, D: tl.constexpr):
    """Writes value (ROWS, D) to x (B, T, width) from (b, row, column) on, up to row T."""
    rows = row + tl.arange(0, ROWS)
    start = x + b.to(tl.int64) * T * width + column
    at = start + rows[:, None] * width + tl.arange(0, D)[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=rows[:, None] < T)


@triton.jit
def _forward_step(
    q, acc, total, top, keys, b, row, n, column, T, H,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr, TMEM: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Takes the keys n .. n + N into (acc, total, top) of the queries row .. row + M."""
    SCALE: tl.constexpr = LOG2E / D**0.5
    k = _load(keys, b, n, H * D + column, T, 3 * H * D, N, D, TMA, DIAGONAL)  # (N, D)
    s = tl.dot(q, k.T, input_precision=IEEE)  # (M, N)
    if DIAGONAL:
        # The side that takes the offset is made anew: the one of which a thread holds little (the
        # rows, out of tensor memory: a thread a row). Else the compiler keeps the other, 32 numbers
        # or more, in registers through the loop above.
        if TMEM:
            seen = row - n + tl.arange(0, M)[:, None] >= tl.arange(0, N)[None, :]
        else:
            seen = tl.arange(0, M)[:, None] >= n - row + tl.arange(0, N)[None, :]
        s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * SCALE)  # finite: key 0 comes first and all see it
    p = tl.exp2(s * SCALE - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    v = _load(keys, b, n, 2 * H * D + column, T, 3 * H * D, N, D, TMA, DIAGONAL)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=IEEE)
    return acc, total, new_top


# T and H differ from call to call (generation) and from model to model: no variant for each.
@triton.jit(do_not_specialize=["T", "H"])
def attention_forward(
    queries, keys, out, lse, T, H,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr, TMEM: tl.constexpr,
):
    """One program, one tile of M queries of one head: see _grid. TMEM: each thread holds a whole
    row of the scores.

    It alone writes these M rows of this head's columns in out (B, T, C) and lse (B, H, T).
    Consecutive programs share a head, whose keys then stay in the L2 cache; the longest come first.
    """
    tile, bh = _place(T, M)
    row = (tl.cdiv(T, M) - 1 - tile) * M
    b, column = bh // H, bh % H * D
    q = _load(queries, b, row, column, T, 3 * H * D, M, D, TMA, True)  # (M, D)
    acc = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    for n in range(0, row, N):  # every query of the tile sees all of these keys
        acc, total, top = _forward_step(
            q, acc, total, top, keys, b, row, n, column, T, H, D, M, N, TMA, TMEM, False
        )
    for n in range(row, min(row + M, T), N):
        acc, total, top = _forward_step(
            q, acc, total, top, keys, b, row, n, column, T, H, D, M, N, TMA, TMEM, True
        )
    _store(out, acc / total[:, None], b, row, column, T, H * D, M, D)
    rows = row + tl.arange(0, M)
    tl.store(lse + bh.to(tl.int64) * T + rows, top + tl.log2(total), mask=rows < T)


@triton.jit
def _dq_step(
    q, do, dq, lse, delta, keys, b, row, n, column, T, H,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr, DIAGONAL: tl.constexpr,
):
    """Adds what the keys n .. n + N contribute to dq of the queries row .. row + M."""
    SCALE: tl.constexpr = LOG2E / D**0.5
    k = _load(keys, b, n, H * D + column, T, 3 * H * D, N, D, TMA, DIAGONAL)  # (N, D)
    v = _load(keys, b, n, 2 * H * D + column, T, 3 * H * D, N, D, TMA, DIAGONAL)
    s = tl.dot(q, k.T, input_precision=IEEE)  # (M, N)
    p = tl.exp2(s * SCALE - lse[:, None])
    if DIAGONAL:
        seen = (row - n + tl.arange(0, M))[:, None] >= tl.arange(0, N)[None, :]
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(do, v.T, input_precision=IEEE)  # (M, N)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=IEEE)


@triton.jit(do_not_specialize=["T", "H"])
def attention_dq(
    queries, keys, out, dout, lse, delta, dqkv, T, H,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
):
    """One program, one tile of M queries of one head: see _grid.

    It alone writes these rows of delta (B, H, T) and of the head's dq in dqkv (B, T, 3C).
    """
    tile, bh = _place(T, M)
    row = (tl.cdiv(T, M) - 1 - tile) * M
    b, column = bh // H, bh % H * D
    o = _load(out, b, row, column, T, H * D, M, D, False, True)  # (M, D)
    do = _load(dout, b, row, column, T, H * D, M, D, False, True)
    d = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # (M,)
    rows = row + tl.arange(0, M)
    start = bh.to(tl.int64) * T
    tl.store(delta + start + rows, d, mask=rows < T)
    e = tl.load(lse + start + rows, mask=rows < T, other=0.0)
    q = _load(queries, b, row, column, T, 3 * H * D, M, D, TMA, True)
    dq = tl.zeros([M, D], tl.float32)
    for n in range(0, row, N):  # every query of the tile sees all of these keys
        dq = _dq_step(q, do, dq, e, d, keys, b, row, n, column, T, H, D, M, N, TMA, False)
    for n in range(row, min(row + M, T), N):
        dq = _dq_step(q, do, dq, e, d, keys, b, row, n, column, T, H, D, M, N, TMA, True)
    _store(dqkv, dq * (1 / D**0.5), b, row, column, T, 3 * H * D, M, D)


@triton.jit
def _dkdv_step(
    k, v, dk, dv, queries, dout, lse, delta, b, row, n, column, T, H,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr, DIAGONAL: tl.constexpr,
):
    """Adds what the queries row .. row + M contribute to dk, dv of the keys n .. n + N.

    Scores are transposed, (N, M), so that p^T and ds^T are at hand for the products. A query past
    T has q = do = 0 and delta = 0, which contributes nothing.
    """
    SCALE: tl.constexpr = LOG2E / D**0.5
    q = _load(queries, b, row, column, T, 3 * H * D, M, D, TMA, True)  # (M, D)
    st = tl.dot(k, q.T, input_precision=IEEE)  # (N, M)
    rows = row + tl.arange(0, M)
    e = tl.load(lse + rows, mask=rows < T, other=0.0)
    pt = tl.exp2(st * SCALE - e[None, :])
    if DIAGONAL:
        seen = (row - n + tl.arange(0, M))[None, :] >= tl.arange(0, N)[:, None]
        pt = tl.where(seen, pt, 0.0)
    do = _load(dout, b, row, column, T, H * D, M, D, TMA, True)
    dv = tl.dot(pt.to(do.dtype), do, dv, input_precision=IEEE)
    dpt = tl.dot(v, do.T, input_precision=IEEE)  # (N, M)
    d = tl.load(delta + rows, mask=rows < T, other=0.0)
    dst = pt * (dpt - d[None, :])
    dk = tl.dot(dst.to(q.dtype), q, dk, input_precision=IEEE)
    return dk, dv


@triton.jit(do_not_specialize=["T", "H"])
def attention_dkdv(
    queries, keys, dout, lse, delta, dqkv, T, H,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
):
    """One program, one tile of N keys of one head: see _grid.

    It alone writes these rows of the head's dk and dv in dqkv (B, T, 3C). The first keys are seen
    by the most queries: longest come first here too.
    """
    tile, bh = _place(T, N)
    n = tile * N
    b, column = bh // H, bh % H * D
    k = _load(keys, b, n, H * D + column, T, 3 * H * D, N, D, TMA, True)  # (N, D)
    v = _load(keys, b, n, 2 * H * D + column, T, 3 * H * D, N, D, TMA, True)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    lse += bh.to(tl.int64) * T
    delta += bh.to(tl.int64) * T
    for row in range(n, min(n + N, T), M):
        dk, dv = _dkdv_step(
            k, v, dk, dv, queries, dout, lse, delta,
            b, row, n, column, T, H, D, M, N, TMA, True,
        )
    for row in range(n + N, T, M):  # every query of the tile sees all keys
        dk, dv = _dkdv_step(
            k, v, dk, dv, queries, dout, lse, delta,
            b, row, n, column, T, H, D, M, N, TMA, False,
        )
    _store(dqkv, dk * (1 / D**0.5), b, n, H * D + column, T, 3 * H * D, N, D)
    _store(dqkv, dv, b, n, 2 * H * D + column, T, 3 * H * D, N, D)


def _operand(x: Tensor, rows: int, D: int, tma: bool) -> Tensor | TensorDescriptor:
    """What _load takes: x (B, T, width) itself, or a descriptor of its tiles of (rows, D)."""
    return TensorDescriptor.from_tensor(x, [1, rows, D]) if tma else x


def _grid(B: int, H: int, T: int, rows: int) -> tuple[int]:
    """One program for each tile of each head, a head's tiles one after the other.

    All on the first axis: CUDA's other two end at 65,535, and B * H passes that at 5,462 sequences
    of GPT-2 124M.
    """
    return (B * H * triton.cdiv(T, rows),)


def _dense(x: Tensor) -> Tensor:
    """x, contiguous and at a multiple of 16 bytes, as descriptors and 128-bit loads demand."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _tile(kernel: str, x: Tensor, D: int) -> tiles.Tile:
    suffix = "_fp32" if x.dtype == torch.float32 else ""
    return tiles.pick(kernel + suffix, tiles.arch(x.device), D)


@torch.library.custom_op("gpt2::attention_forward", mutates_args=())
def _forward(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    """qkv (B, T, 3C) -> out (B, T, C), lse (B, H, T) in units of ln 2."""
    out, lse = _forward_outputs(qkv, n_head)
    B, T, C = out.shape
    if out.numel() == 0:  # no sequence: nothing to launch
        return out, lse
    qkv, D = _dense(qkv), C // n_head
    t = _tile("attention_forward", qkv, D)
    attention_forward[_grid(B, n_head, T, t.m)](
        _operand(qkv, t.m, D, t.tma), _operand(qkv, t.n, D, t.tma), out, lse, T, n_head,
        D=D, M=t.m, N=t.n, TMA=t.tma, TMEM=tiles.tensor_memory_rows(tiles.arch(qkv.device), t),
        num_warps=t.warps, num_stages=t.stages,
    )
    return out, lse


@_forward.register_fake
def _forward_outputs(qkv, n_head):
    B, T, C3 = qkv.shape
    return qkv.new_empty(B, T, C3 // 3), qkv.new_empty(B, n_head, T, dtype=torch.float32)


@torch.library.custom_op("gpt2::attention_backward", mutates_args=())
def _backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int) -> Tensor:
    """dqkv (B, T, 3C). dq comes first, since it makes delta, which dk and dv need."""
    dqkv = _backward_outputs(dout, qkv, out, lse, n_head)
    B, T, C = out.shape
    if out.numel() == 0:
        return dqkv
    dout, qkv, out, delta = _dense(dout), _dense(qkv), _dense(out), torch.empty_like(lse)
    D = C // n_head
    t = _tile("attention_dq", qkv, D)
    attention_dq[_grid(B, n_head, T, t.m)](
        _operand(qkv, t.m, D, t.tma), _operand(qkv, t.n, D, t.tma), out, dout, lse, delta, dqkv,
        T, n_head, D=D, M=t.m, N=t.n, TMA=t.tma, num_warps=t.warps, num_stages=t.stages,
    )
    t = _tile("attention_dkdv", qkv, D)
    attention_dkdv[_grid(B, n_head, T, t.n)](
        _operand(qkv, t.m, D, t.tma), _operand(qkv, t.n, D, t.tma), _operand(dout, t.m, D, t.tma),
        lse, delta, dqkv, T, n_head,
        D=D, M=t.m, N=t.n, TMA=t.tma, num_warps=t.warps, num_stages=t.stages,
    )
    return dqkv


@_backward.register_fake
def _backward_outputs(dout, qkv, out, lse, n_head):
    return qkv.new_empty(qkv.shape)


def _remember(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output)
    ctx.n_head = inputs[1]


def _gradient(ctx, dout, dlse):
    return torch.ops.gpt2.attention_backward(dout, *ctx.saved_tensors, ctx.n_head), None


_forward.register_autograd(_gradient, setup_context=_remember)


# As PyTorch counts its own attention: every score, though a causal kernel skips nearly half.
@register_flop_formula(torch.ops.gpt2.attention_forward)
def _forward_flops(qkv_shape, n_head, *args, **kwargs) -> int:
    """Two products of T x T x C."""
    B, T, C3 = qkv_shape
    return 2 * 2 * B * T * T * (C3 // 3)


@register_flop_formula(torch.ops.gpt2.attention_backward)
def _backward_flops(dout_shape, *args, **kwargs) -> int:
    """Five products of T x T x C: the scores once more, dv, dp, dq and dk."""
    B, T, C = dout_shape
    return 5 * 2 * B * T * T * C


def attention(qkv: Tensor, n_head: int) -> Tensor:
    """Causal self-attention out of the packed projection.

    qkv: (B, T, 3C), queries, keys and values side by side, bf16, fp16 or fp32. Returns (B, T, C):
    softmax(q k^T / sqrt(D)) v per head, each position seeing itself and what precedes it.
    ValueError for another dtype, or a head width C / n_head other than 64 and 128. Defined by
    kernels/reference.py.
    """
    D = qkv.shape[-1] // 3 // n_head
    if D not in HEAD_WIDTHS:
        raise ValueError(f"attention kernel: head width 64 or 128, not {D}; use --kernels torch")
    tiles.check_dtype("attention", qkv.dtype)
    return torch.ops.gpt2.attention_forward(qkv, n_head)[0]
