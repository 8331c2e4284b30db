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
recomputed p. Nothing is added atomically: the same tiles give the same bits.

q, k, v lie side by side in qkv (B, T, 3C) and are read from there: kernels/columns.py. Products
take the inputs' dtype and accumulate in fp32; softmax is fp32. Exponentials are powers of two, as
the hardware makes them: `lse` holds lse_i / ln 2.

Shapes: B batch, T time, C = H * D width, H heads, D head width (64 or 128), M queries and N keys of
one tile.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import launcher, schedule, tiles
from kernels.columns import Columns, dense, load, operand, store
from kernels.reference import product_dtype

HEAD_WIDTHS = (64, 128)

LOG2E = tl.constexpr(1 / math.log(2))
IEEE = tl.constexpr("ieee")  # fp32 products in fp32, not in TF32's 10 bits; bf16 and fp16 ignore it


@triton.jit
def _place(T, group, ROWS: tl.constexpr):
    """(tile, batch * H + head) of this program: kernels/schedule.py says in which order and why."""
    tiles = tl.cdiv(T, ROWS)
    first = tl.program_id(0) // (group * tiles) * group  # head of its group
    heads = min(group, tl.num_programs(0) // tiles - first)  # of which the last may have fewer
    inside = tl.program_id(0) - first * tiles
    return inside // heads, first + inside % heads


@triton.jit
def _scores(
    q, keys, q_start, k_start, BLOCK_N: tl.constexpr, TMEM: tl.constexpr, DIAGONAL: tl.constexpr
):
    """s (BLOCK_M, BLOCK_N) of queries q (BLOCK_M, D) and BLOCK_N keys: q k^T, not scaled yet."""
    BLOCK_M: tl.constexpr = q.shape[0]
    k = load(keys, k_start, BLOCK_N, q.shape[1], EDGE=DIAGONAL)  # (BLOCK_N, D)
    s = tl.dot(q, k.T, input_precision=IEEE)
    if DIAGONAL:  # s_ij = -inf for j > i
        i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        # The side that takes the offset is made anew: the one of which a thread holds little (the
        # rows, out of tensor memory: a thread a row). Else the compiler keeps the other, 32 numbers
        # or more, in registers through the loop above.
        if TMEM:
            seen = q_start - k_start + i >= j
        else:
            seen = i >= k_start - q_start + j
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _softmax(s, l_i, m_i, D: tl.constexpr):
    """Takes scores s (BLOCK_M, BLOCK_N) into the running sum l_i and maximum m_i, both (BLOCK_M,).

    Returns p_ij = exp(s_ij - m_i), the factor for what was summed before, and the new l_i and m_i.
    """
    SCALE: tl.constexpr = LOG2E / D**0.5
    # m_i = max_j s_ij, finite from the first keys on: each query sees one of them.
    m_new = tl.maximum(m_i, tl.max(s, 1) * SCALE)
    p = tl.exp2(s * SCALE - m_new[:, None])  # exp(s_ij - m_i)
    shrink = tl.exp2(m_i - m_new)
    l_i = l_i * shrink + tl.sum(p, 1)  # l_i = sum_j exp(s_ij - m_i)
    return p, shrink, l_i, m_new


@triton.jit
def _forward_step(
    running, q, kv, q_start, k_start,
    BLOCK_N: tl.constexpr, TMEM: tl.constexpr, DIAGONAL: tl.constexpr,
):
    """Takes BLOCK_N keys into the running (acc, l_i, m_i) of a tile of queries q (BLOCK_M, D)."""
    acc, l_i, m_i = running
    keys, values = kv
    D: tl.constexpr = q.shape[1]
    s = _scores(q, keys, q_start, k_start, BLOCK_N, TMEM, DIAGONAL)
    p, shrink, l_i, m_i = _softmax(s, l_i, m_i, D)
    v = load(values, k_start, BLOCK_N, D, EDGE=DIAGONAL)
    # acc = sum_j exp(s_ij - m_i) v_j
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=IEEE)
    return acc, l_i, m_i


@triton.jit
def _forward_delayed(running, q, kv, q_start):
    """Takes all keys that a tile of queries q (BLOCK, D) sees into its running (acc, l_i, m_i).

    p v comes one step late: the tensor cores make it during the next scores' softmax. acc is scaled
    just before it and not just after, and p kept in fp32: else Triton waits for each product.
    The BLOCK keys on the diagonal come first and key 0 last: one step alone has a mask.
    """
    acc, l_i, m_i = running
    keys, values = kv
    BLOCK: tl.constexpr = q.shape[0]
    D: tl.constexpr = q.shape[1]
    s = _scores(q, keys, q_start, q_start, BLOCK, TMEM=False, DIAGONAL=True)
    p, shrink, l_i, m_i = _softmax(s, l_i, m_i, D)
    for taken in range(0, q_start, BLOCK):
        k_start = q_start - taken  # of p
        s = _scores(q, keys, q_start, k_start - BLOCK, BLOCK, TMEM=False, DIAGONAL=False)
        v = load(values, k_start, BLOCK, D, EDGE=True)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=IEEE)
        p, shrink, l_i, m_i = _softmax(s, l_i, m_i, D)
    v = load(values, 0, BLOCK, D, EDGE=True)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=IEEE)
    return acc, l_i, m_i


# T, H and group differ from call to call (generation) and between models: no variant for each.
@triton.jit(do_not_specialize=["T", "H", "group"])
def attention_forward(
    queries, keys, out, lse, T, H, group,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMEM: tl.constexpr,
    DELAYED: tl.constexpr,
):
    """One program, one tile of BLOCK_M queries of one head: see _place. queries and keys are both
    qkv, as operand() hands it out. TMEM: each thread holds a whole row of the scores. DELAYED: by
    _forward_delayed.

    It alone writes these rows of the head's columns in out (B, T, C) and of lse (B, H, T). The last
    queries see the most keys: they come first.
    """
    tile, batch_head = _place(T, group, BLOCK_M)
    q_start = (tl.cdiv(T, BLOCK_M) - 1 - tile) * BLOCK_M
    batch, column, C = batch_head // H, batch_head % H * D, H * D
    q = load(Columns(queries, batch, column, T, 3 * C), q_start, BLOCK_M, D, EDGE=True)
    kv = Columns(keys, batch, C + column, T, 3 * C), Columns(keys, batch, 2 * C + column, T, 3 * C)
    acc, l_i = tl.zeros([BLOCK_M, D], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    running = acc, l_i, tl.full([BLOCK_M], float("-inf"), tl.float32)  # m_i
    if DELAYED:
        tl.static_assert(BLOCK_M == BLOCK_N)
        running = _forward_delayed(running, q, kv, q_start)
    else:
        for k_start in range(0, q_start, BLOCK_N):  # every query of the tile sees all of these keys
            running = _forward_step(running, q, kv, q_start, k_start, BLOCK_N, TMEM, DIAGONAL=False)
        for k_start in range(q_start, min(q_start + BLOCK_M, T), BLOCK_N):
            running = _forward_step(running, q, kv, q_start, k_start, BLOCK_N, TMEM, DIAGONAL=True)
    acc, l_i, m_i = running
    store(Columns(out, batch, column, T, C), q_start, acc / l_i[:, None])  # o = p v
    rows = q_start + tl.arange(0, BLOCK_M)
    lse_i = m_i + tl.log2(l_i)
    tl.store(lse + batch_head.to(tl.int64) * T + rows, lse_i, mask=rows < T)


@triton.jit
def _dq_step(
    dq, query_tile, kv, q_start, k_start, BLOCK_N: tl.constexpr, DIAGONAL: tl.constexpr
):
    """Adds what BLOCK_N keys contribute to dq (BLOCK_M, D), without the last 1 / sqrt(D)."""
    q, do, lse_i, delta_i = query_tile
    keys, values = kv
    BLOCK_M: tl.constexpr = q.shape[0]
    D: tl.constexpr = q.shape[1]
    SCALE: tl.constexpr = LOG2E / D**0.5
    k = load(keys, k_start, BLOCK_N, D, EDGE=DIAGONAL)  # (BLOCK_N, D)
    v = load(values, k_start, BLOCK_N, D, EDGE=DIAGONAL)
    s = tl.dot(q, k.T, input_precision=IEEE)  # (BLOCK_M, BLOCK_N): q k^T
    p = tl.exp2(s * SCALE - lse_i[:, None])  # p_ij = exp(s_ij - lse_i)
    if DIAGONAL:
        i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        p = tl.where(q_start - k_start + i >= j, p, 0.0)  # p_ij = 0 for j > i
    dp = tl.dot(do, v.T, input_precision=IEEE)  # dp = do v^T
    ds = p * (dp - delta_i[:, None])  # ds = p * (dp - delta)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=IEEE)  # dq = ds k


@triton.jit(do_not_specialize=["T", "H", "group"])
def attention_dq(
    queries, keys, out, dout, lse, delta, dqkv, T, H, group,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program, one tile of BLOCK_M queries of one head: see _place.

    It alone writes these rows of delta (B, H, T) and of the head's dq in dqkv (B, T, 3C).
    """
    tile, batch_head = _place(T, group, BLOCK_M)
    q_start = (tl.cdiv(T, BLOCK_M) - 1 - tile) * BLOCK_M
    batch, column, C = batch_head // H, batch_head % H * D, H * D
    o = load(Columns(out, batch, column, T, C), q_start, BLOCK_M, D, EDGE=True)  # (BLOCK_M, D)
    do = load(Columns(dout, batch, column, T, C), q_start, BLOCK_M, D, EDGE=True)
    delta_i = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # delta_i = sum_d o_id do_id
    rows = q_start + tl.arange(0, BLOCK_M)
    start = batch_head.to(tl.int64) * T
    tl.store(delta + start + rows, delta_i, mask=rows < T)
    lse_i = tl.load(lse + start + rows, mask=rows < T, other=0.0)
    q = load(Columns(queries, batch, column, T, 3 * C), q_start, BLOCK_M, D, EDGE=True)
    query_tile = q, do, lse_i, delta_i
    kv = Columns(keys, batch, C + column, T, 3 * C), Columns(keys, batch, 2 * C + column, T, 3 * C)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for k_start in range(0, q_start, BLOCK_N):  # every query of the tile sees all of these keys
        dq = _dq_step(dq, query_tile, kv, q_start, k_start, BLOCK_N, DIAGONAL=False)
    for k_start in range(q_start, min(q_start + BLOCK_M, T), BLOCK_N):
        dq = _dq_step(dq, query_tile, kv, q_start, k_start, BLOCK_N, DIAGONAL=True)
    dq *= 1 / D**0.5  # dq = ds k / sqrt(D)
    store(Columns(dqkv, batch, column, T, 3 * C), q_start, dq)


@triton.jit
def _dkdv_step(
    dk, dv, k, v, query_side, q_start, k_start, BLOCK_M: tl.constexpr, DIAGONAL: tl.constexpr
):
    """Adds what BLOCK_M queries contribute to dk and dv (BLOCK_N, D).

    Scores are transposed, (BLOCK_N, BLOCK_M), so that p^T and ds^T are at hand for the products. A
    query past T has q = do = 0 and delta = 0, which contributes nothing.
    """
    queries, douts, lse, delta = query_side
    BLOCK_N: tl.constexpr = k.shape[0]
    D: tl.constexpr = k.shape[1]
    SCALE: tl.constexpr = LOG2E / D**0.5
    q = load(queries, q_start, BLOCK_M, D, EDGE=True)  # (BLOCK_M, D)
    s_t = tl.dot(k, q.T, input_precision=IEEE)  # (BLOCK_N, BLOCK_M): s^T = k q^T
    rows = q_start + tl.arange(0, BLOCK_M)
    lse_i = tl.load(lse + rows, mask=rows < queries.T, other=0.0)
    p_t = tl.exp2(s_t * SCALE - lse_i[None, :])  # p_ij = exp(s_ij - lse_i)
    if DIAGONAL:
        i, j = tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None]
        p_t = tl.where(q_start - k_start + i >= j, p_t, 0.0)  # p_ij = 0 for j > i
    do = load(douts, q_start, BLOCK_M, D, EDGE=True)
    dv = tl.dot(p_t.to(do.dtype), do, dv, input_precision=IEEE)  # dv = p^T do
    dp_t = tl.dot(v, do.T, input_precision=IEEE)  # dp^T = v do^T
    delta_i = tl.load(delta + rows, mask=rows < queries.T, other=0.0)
    ds_t = p_t * (dp_t - delta_i[None, :])  # ds = p * (dp - delta)
    dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=IEEE)  # dk = ds^T q
    return dk, dv


@triton.jit(do_not_specialize=["T", "H", "group"])
def attention_dkdv(
    queries, keys, dout, lse, delta, dqkv, T, H, group,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program, one tile of BLOCK_N keys of one head: see _place.

    It alone writes these rows of the head's dk and dv in dqkv (B, T, 3C). The first keys are seen
    by the most queries: they come first.
    """
    tile, batch_head = _place(T, group, BLOCK_N)
    k_start = tile * BLOCK_N
    batch, column, C = batch_head // H, batch_head % H * D, H * D
    k = load(Columns(keys, batch, C + column, T, 3 * C), k_start, BLOCK_N, D, EDGE=True)
    v = load(Columns(keys, batch, 2 * C + column, T, 3 * C), k_start, BLOCK_N, D, EDGE=True)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    start = batch_head.to(tl.int64) * T
    q_columns = Columns(queries, batch, column, T, 3 * C)
    do_columns = Columns(dout, batch, column, T, C)
    query_side = q_columns, do_columns, lse + start, delta + start
    for q_start in range(k_start, min(k_start + BLOCK_N, T), BLOCK_M):
        dk, dv = _dkdv_step(dk, dv, k, v, query_side, q_start, k_start, BLOCK_M, DIAGONAL=True)
    for q_start in range(k_start + BLOCK_N, T, BLOCK_M):  # every query of the tile sees all keys
        dk, dv = _dkdv_step(dk, dv, k, v, query_side, q_start, k_start, BLOCK_M, DIAGONAL=False)
    dk *= 1 / D**0.5  # dk = ds^T q / sqrt(D)
    store(Columns(dqkv, batch, C + column, T, 3 * C), k_start, dk)
    store(Columns(dqkv, batch, 2 * C + column, T, 3 * C), k_start, dv)


def _grid(B: int, H: int, T: int, rows: int) -> tuple[int]:
    """One program for each tile of each head, in _place's order.

    All on the first axis: CUDA's other two end at 65,535, and B * H passes that at 5,462 sequences
    of GPT-2 124M.
    """
    return (B * H * tiles.cdiv(T, rows),)


def _group(qkv: Tensor, D: int) -> int:
    """How many heads are a group of _place's."""
    head_bytes = 2 * qkv.shape[1] * D * qkv.element_size()  # of its keys and values
    return schedule.heads_in_group(head_bytes, tiles.l2_bytes(qkv.device))


def _tile(kernel: str, x: Tensor, D: int) -> tiles.Tile:
    suffix = "_fp32" if x.dtype == torch.float32 else ""
    return tiles.pick(kernel + suffix, tiles.arch(x.device), D)


def launch_forward(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    """qkv (B, T, 3C) -> out (B, T, C), lse (B, H, T) in units of ln 2."""
    out, lse = _forward_outputs(qkv, n_head)
    B, T, C = out.shape
    if out.numel() == 0:  # no sequence: nothing to launch
        return out, lse
    qkv, D = dense(qkv), C // n_head
    t = _tile("attention_forward", qkv, D)
    launcher.launch(attention_forward, _grid(B, n_head, T, t.m),
        operand(qkv, t.m, D, t.tma), operand(qkv, t.n, D, t.tma), operand(out, t.m, D, t.tma),
        lse, T, n_head, _group(qkv, D), D=D, BLOCK_M=t.m, BLOCK_N=t.n,
        TMEM=tiles.tensor_memory_rows(tiles.arch(qkv.device), t), DELAYED=t.delayed,
        num_warps=t.warps, num_stages=t.stages,
    )
    return out, lse


_forward = torch.library.custom_op("gpt2::attention_forward", launch_forward, mutates_args=())


@_forward.register_fake
def _forward_outputs(qkv, n_head):
    B, T, C3 = qkv.shape
    return qkv.new_empty(B, T, C3 // 3), qkv.new_empty(B, n_head, T, dtype=torch.float32)


def launch_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int) -> Tensor:
    """dqkv (B, T, 3C). dq comes first, since it makes delta, which dk and dv need."""
    dqkv = _backward_outputs(dout, qkv, out, lse, n_head)
    B, T, C = out.shape
    if out.numel() == 0:
        return dqkv
    dout, qkv, out, delta = dense(dout), dense(qkv), dense(out), torch.empty_like(lse)
    D = C // n_head
    group = _group(qkv, D)
    t = _tile("attention_dq", qkv, D)
    launcher.launch(attention_dq, _grid(B, n_head, T, t.m),
        operand(qkv, t.m, D, t.tma), operand(qkv, t.n, D, t.tma), out, dout, lse, delta,
        operand(dqkv, t.m, D, t.tma), T, n_head, group,
        D=D, BLOCK_M=t.m, BLOCK_N=t.n, num_warps=t.warps, num_stages=t.stages,
    )
    t = _tile("attention_dkdv", qkv, D)
    launcher.launch(attention_dkdv, _grid(B, n_head, T, t.n),
        operand(qkv, t.m, D, t.tma), operand(qkv, t.n, D, t.tma), operand(dout, t.m, D, t.tma),
        lse, delta, operand(dqkv, t.n, D, t.tma), T, n_head, group,
        D=D, BLOCK_M=t.m, BLOCK_N=t.n, num_warps=t.warps, num_stages=t.stages,
    )
    return dqkv


_backward = torch.library.custom_op("gpt2::attention_backward", launch_backward, mutates_args=())


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

    qkv: (B, T, 3C), queries, keys and values side by side, bf16, fp16 or fp32. Returns (B, T, C) in
    the same dtype, or under autocast in its dtype: softmax(q k^T / sqrt(D)) v per head, each
    position seeing itself and what precedes it. ValueError for another dtype, or a head width
    C / n_head other than 64 and 128. Defined by kernels/reference.py.
    """
    D = qkv.shape[-1] // 3 // n_head
    if D not in HEAD_WIDTHS:
        raise ValueError(f"attention kernel: head width 64 or 128, not {D}; use --kernels torch")
    qkv = qkv.to(product_dtype(qkv.dtype, qkv.device))
    tiles.check_dtype("attention", qkv.dtype)
    return torch.ops.gpt2.attention_forward(qkv, n_head)[0]
