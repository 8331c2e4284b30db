"""Attention while text is drawn, in Triton: one query a stream and head, against a cache.

For every stream and head, with the new token at position t, its q, k, v of shape (D,), and k_j, v_j
of the positions before it in the cache:

    s_j = q k_j / sqrt(D),   o = sum_j exp(s_j) v_j / sum_j exp(s_j),   j = 0 ... t

k and v are put into the cache on the way. t is read from the device, so that a captured graph and
a compiled kernel serve every length; of the cache that much is read, once. Each lane of a tile
keeps a running softmax of its own, and they meet at the end: in the loop no warp waits for another.
Arithmetic is fp32, whatever is stored. The read is all there is to do, so products are no matter
for tensor cores.

Shapes: B streams, H heads, D head width (64 or 128), L positions that the cache has room for, N of
them in a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launcher, tiles
from kernels.attention import HEAD_WIDTHS, LOG2E
from kernels.columns import dense


@triton.jit(do_not_specialize=["H", "L"])
def decode_attention_forward(
    qkv, kv, out, position, H, L, D: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program, one head of one stream: grid (B * H,).

    It alone writes the head's columns of out (B, C), and its row `position` of kv (2, B, H, L, D).
    qkv: (B, 3C); position: (1,) int64.
    """
    batch_head = tl.program_id(0)
    columns = tl.arange(0, D)
    first = qkv + batch_head // H * (3 * H * D) + batch_head % H * D + columns
    SCALE: tl.constexpr = LOG2E / D**0.5
    q = tl.load(first).to(tl.float32) * SCALE  # (D,)
    k_new = tl.load(first + H * D)
    v_new = tl.load(first + 2 * H * D)
    t = tl.load(position).to(tl.int32)
    keys = kv + batch_head.to(tl.int64) * L * D
    values = keys + tl.num_programs(0).to(tl.int64) * L * D
    tl.store(keys + tl.cast(t, tl.int64) * D + columns, k_new)
    tl.store(values + tl.cast(t, tl.int64) * D + columns, v_new)

    # What a lane's maximum begins with is finite, so that it never subtracts -inf from -inf.
    s_new = tl.sum(q * k_new.to(tl.float32))
    m = tl.full([BLOCK_N], 0.0, tl.float32) + s_new
    l_lane = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, D], tl.float32)
    for start in range(0, t, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        cells = rows[:, None] * D + columns[None, :]
        k = tl.load(keys + cells, mask=rows[:, None] < t, other=0.0).to(tl.float32)
        v = tl.load(values + cells, mask=rows[:, None] < t, other=0.0).to(tl.float32)
        s = tl.where(rows < t, tl.sum(k * q[None, :], 1), float("-inf"))  # (BLOCK_N,)
        larger = tl.maximum(m, s)
        shrink, p = tl.exp2(m - larger), tl.exp2(s - larger)
        l_lane = l_lane * shrink + p
        acc = acc * shrink[:, None] + v * p[:, None]
        m = larger
    m_all = tl.max(m)  # at least s_new
    share = tl.exp2(m - m_all)
    share_new = tl.exp2(s_new - m_all)
    o = tl.sum(acc * share[:, None], 0) + share_new * v_new.to(tl.float32)  # (D,)
    o /= tl.sum(l_lane * share) + share_new
    tl.store(out + batch_head * D + columns, o.to(out.dtype.element_ty))


def decode_attention(qkv: Tensor, kv: Tensor, position: Tensor, n_head: int) -> Tensor:
    """Attention of one new token of each stream to those before it and to itself.

    qkv: (B, 1, 3C), of kv's dtype; kv: (2, B, H, L, D), bf16, fp16 or fp32, which takes the new
    keys and values; position: (1,) int64, where the token stands. Returns (B, 1, C). ValueError for
    another dtype or head width. Defined by kernels/reference.py.
    """
    D = kv.shape[-1]
    if D not in HEAD_WIDTHS:
        raise ValueError(f"decode_attention kernel: head width 64 or 128, not {D}; use --kernels "
                         "torch")
    tiles.check_dtype("decode_attention", kv.dtype)
    B, _, C3 = qkv.shape
    qkv = dense(qkv.to(kv.dtype))
    out = torch.empty((B, 1, C3 // 3), dtype=kv.dtype, device=kv.device)
    name = "decode_attention_fp32" if kv.dtype == torch.float32 else "decode_attention"
    tile = tiles.pick(name, tiles.arch(kv.device), D)
    launcher.launch(decode_attention_forward, (B * n_head,),
        qkv, kv, out, position, n_head, kv.shape[3], D=D, BLOCK_N=tile.n, num_warps=tile.warps
    )
    return out
