"""The head's matrix product and the cross-entropy in one, a chunk of tokens at a time, in Triton.

For a token with hidden state h, target t, and logits z = h W^T over the V true tokens:

    loss = log sum_j exp(z_j) - z_t,   dz = softmax(z) - onehot(t),   dh = dz W,   dW = dz^T h

or, with a softcap c (Gemma 2, arXiv 2408.00118), of c tanh(z / c) in the place of z: then dz is
multiplied by the cap's slope, 1 - tanh^2(z / c).

A chunk's logits are made by one matrix product, the kernel turns them into dz in place, and two
products take them into dh and dW: the chunk is all that is ever in memory of the (N, V) matrix, and
the backward pass is a multiplication. Liger-Kernel, arXiv 2410.10989; the running maximum and
sum of a row from arXiv 1805.02867. Logits and dz have the matrix products' dtype; what happens
between them, and the sum of dW over chunks, is fp32.

Shapes: N tokens, C width, V vocabulary, Vp vocabulary padded (GPT-2: 50,257 in 50,304).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import launcher, tiles
from kernels.constants import GPU_CHUNK_ELEMENTS as CHUNK_ELEMENTS
from kernels.constants import IGNORE
from kernels.direct import direct, operator_wanted
from kernels.reference import product_dtype

NO_TARGET = tl.constexpr(IGNORE)
LOG2E = tl.constexpr(1 / math.log(2))


@triton.jit
def _cap(z, SOFTCAP: tl.constexpr):
    """The capped logits in units of ln 2, and the cap's slope there: 1 for all without a cap.

    With e = exp(2 z / c) and r = 2 / (1 + e): tanh = 1 - r, to 2^-23 at worst, and 1 - tanh^2 =
    e r^2, to some 2^-20 of itself however near to 0. e ends at 2^60, where tanh is 1 and the slope
    2^-58: at 2^128 that would be inf * 0. The compiler drops the slope where nobody takes it.
    Three exponentials or quotients a logit for one: 768 cycles per 4,096 logits in each pass, in
    which an H100 reads them 1.3 times, and a B200 2.7 times.
    """
    if SOFTCAP > 0:
        e = tl.exp2(tl.minimum(z * (2 / SOFTCAP * LOG2E), 60.0, tl.PropagateNan.ALL))
        r = 2 / (1 + e)
        return r * (-SOFTCAP * LOG2E) + SOFTCAP * LOG2E, e * r * r
    else:
        return z * LOG2E, 1.0


@triton.jit
def _logits(
    row, start, V: tl.constexpr, Vp: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
    EDGE: tl.constexpr,
):
    """What _cap makes of the BLOCK logits from start on; the logits are -inf in the padding.

    Loads are masked by Vp, a multiple of 128, never by V: a mask that ends at 50,257 makes the
    compiler load 16 bits at a time.
    """
    columns = start + tl.arange(0, BLOCK)
    if EDGE:
        z = tl.load(row + columns, mask=columns < Vp, other=0.0).to(tl.float32)
        z, slope = _cap(z, SOFTCAP)
        return tl.where(columns < V, z, float("-inf")), slope
    else:
        return _cap(tl.load(row + columns).to(tl.float32), SOFTCAP)


@triton.jit
def _take(z, top, total):
    """(top, total) with the block z taken in: top = max_j z_j, total = sum_j 2^(z_j - top)."""
    new_top = tl.maximum(top, tl.max(z))
    return new_top, total * tl.exp2(top - new_top) + tl.sum(tl.exp2(z - new_top))


@triton.jit
def _softmax(
    row, start, lse, V: tl.constexpr, Vp: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Puts the probabilities, times the cap's slope, in the place of the BLOCK logits from start
    on, 0 in the padding."""
    z, slope = _logits(row, start, V, Vp, BLOCK, SOFTCAP, EDGE)
    p = tl.exp2(z - lse)  # softmax(z)
    if SOFTCAP > 0:
        p *= slope
    p = p.to(row.dtype.element_ty)
    columns = start + tl.arange(0, BLOCK)
    if EDGE:
        tl.store(row + columns, p, mask=columns < Vp)
    else:
        tl.store(row + columns, p)


@triton.jit
def cross_entropy(
    logits, targets, losses,
    V: tl.constexpr, Vp: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """One program, one token: grid (rows,). It alone reads and writes this row of logits (rows, Vp)
    and this cell of losses (rows,), 0 for a token without target.

    With GRADIENT the logits become dz, 0 in the padding and in a row without target. Between the
    threads of a program: the target's logit is read before the reductions, whose barriers every
    warp reaches before any writes; a probability is written by the thread that read that logit for
    it; and the target's is overwritten behind a barrier of its own.
    """
    token = tl.program_id(0).to(tl.int64)  # rows * Vp passes 2^31 at 42,691 rows of GPT-2
    row = logits + token * Vp
    target = tl.load(targets + token)
    valid = target != NO_TARGET
    z_target = tl.load(row + tl.where(valid, target, 0)).to(tl.float32)
    z_target, slope_target = _cap(z_target, SOFTCAP)
    WHOLE: tl.constexpr = V // BLOCK * BLOCK
    top = float("-inf")
    total = 0.0
    for start in range(0, WHOLE, BLOCK):
        z, _ = _logits(row, start, V, Vp, BLOCK, SOFTCAP, False)
        top, total = _take(z, top, total)
    for start in tl.static_range(WHOLE, V, BLOCK):
        z, _ = _logits(row, start, V, Vp, BLOCK, SOFTCAP, True)
        top, total = _take(z, top, total)
    lse = top + tl.log2(total)  # log2 sum_j exp(z_j)
    loss = (lse - z_target) / LOG2E  # loss = log sum_j exp(z_j) - z_t
    tl.store(losses + token, tl.where(valid, loss, 0.0))
    if GRADIENT:
        shift = tl.where(valid, lse, float("inf"))  # 2^-inf: no gradient without a target
        # Last to first: what was read last is the likeliest to be in the L2 cache still.
        for start in tl.static_range(WHOLE, Vp, BLOCK):
            _softmax(row, start, shift, V, Vp, BLOCK, SOFTCAP, True)
        for done in range(0, WHOLE, BLOCK):  # a negative step would hide that start is aligned
            _softmax(row, WHOLE - BLOCK - done, shift, V, Vp, BLOCK, SOFTCAP, False)
        tl.debug_barrier()
        dz_target = tl.exp2(z_target - lse) - 1  # p_t - 1, subtracted before it is rounded
        if SOFTCAP > 0:
            dz_target *= slope_target
        tl.store(row + target, dz_target.to(row.dtype.element_ty), mask=valid)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out (fp32) = a @ b, or += where add; the product of bf16 is never rounded to bf16."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(out, a, b, beta=int(add), out_dtype=torch.float32, out=out)
    else:  # CPUs have no such product: exact in fp32
        torch.addmm(out, a.float(), b.float(), beta=int(add), out=out)


def _launch(
    h: Tensor, weight: Tensor, targets: Tensor, vocab: int, dtype: torch.dtype, gradient: bool,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of losses, dh, dW), all fp32, the last two empty without gradient.

    dtype: of the logits and of what the products take. dh is rounded to h's dtype only after the
    backward pass has scaled it: rounding twice would cost 1.4 x the error.
    """
    total, dh, dw = _fused_outputs(h, weight, targets, vocab, dtype, gradient, softcap)
    N, Vp = h.shape[0], weight.shape[0]
    if N == 0:  # no token: no loss, and nothing for the weight to learn
        return total.zero_(), dh, dw.zero_()
    losses = h.new_empty(N, dtype=torch.float32)
    h, weight, targets = (
        h.to(dtype).contiguous(),
        weight.to(dtype).contiguous(),
        targets.contiguous(),
    )
    chunks = -(-N * Vp // CHUNK_ELEMENTS)
    rows = -(-N // chunks // 128) * 128  # whole tiles of the matrix products
    logits = h.new_empty((min(rows, N), Vp))
    kernel = "cross_entropy_softcap" if softcap else "cross_entropy"
    tile = tiles.pick(kernel, tiles.arch(h.device), tiles.next_power_of_2(Vp))
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        z = logits[: part.stop - part.start]  # (rows, Vp)
        torch.mm(h[part], weight.t(), out=z)
        launcher.launch(cross_entropy, (z.shape[0],),
            z, targets[part], losses[part],
            V=vocab, Vp=Vp, SOFTCAP=softcap, BLOCK=tile.n, GRADIENT=gradient, num_warps=tile.warps,
        )
        if gradient:
            _product(z, weight, dh[part], add=False)
            _product(z.t(), h[part], dw, add=start > 0)
    torch.sum(losses, 0, out=total)
    return total, dh, dw


_fused = torch.library.custom_op("gpt2::linear_cross_entropy", _launch, mutates_args=())


@_fused.register_fake
def _fused_outputs(h, weight, targets, vocab, dtype, gradient, softcap):
    total = h.new_empty((), dtype=torch.float32)
    dh = h.new_empty(h.shape if gradient else 0, dtype=torch.float32)
    dw = weight.new_empty(weight.shape if gradient else 0, dtype=torch.float32)
    return total, dh, dw


def _remember(ctx, inputs, output):
    h, weight, *_ = inputs
    _, dh, dw = output
    ctx.set_materialize_grads(False)  # no zeros as large as dh and dw for gradients nobody takes
    ctx.save_for_backward(dh, dw)
    ctx.dtypes = h.dtype, weight.dtype


def _gradients(ctx, grad, ddh, ddw):
    dh, dw = ctx.saved_tensors
    h_dtype, weight_dtype = ctx.dtypes
    scaled_dh = torch.mul(dh, grad, out=torch.empty_like(dh, dtype=h_dtype))  # rounded once
    return scaled_dh, (dw * grad).to(weight_dtype), None, None, None, None, None


_fused.register_autograd(_gradients, setup_context=_remember)
_direct = direct("linear_cross_entropy", _launch, _remember, _gradients)


@register_flop_formula(torch.ops.gpt2.linear_cross_entropy)
def _flops(h_shape, weight_shape, targets_shape, vocab, dtype, gradient, softcap, **kwargs) -> int:
    """One product of (N, C) and (C, Vp) for the logits, and one each for dh and dW."""
    N, C = h_shape
    return 2 * N * C * weight_shape[0] * (3 if gradient else 1)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, vocab: int, reduction: str = "mean",
    softcap: float = 0.0,
) -> Tensor:
    """Cross-entropy of softmax(h @ weight.T) against targets, without ever holding all logits.

    h: (N, C); weight: (Vp, C), of which the rows from `vocab` on are padding that takes no
    probability; targets: (N,) in [0, vocab) or -100, which counts for nothing. Products run in the
    autocast dtype, or without autocast in h's (bf16, fp16 or fp32; ValueError for another). Returns
    a scalar in nats, fp32: the sum, or the mean over the targets that count (0 where none does).
    Gradients are made beside the loss, where they are on. softcap: of softcap * tanh(logits /
    softcap) in the place of the logits; 0: no cap. Defined by kernels/reference.py.
    """
    dtype = product_dtype(h.dtype, h.device)
    tiles.check_dtype("linear_cross_entropy", dtype)
    gradient = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    fused = torch.ops.gpt2.linear_cross_entropy if operator_wanted(h) else _direct
    total, _, _ = fused(h, weight, targets, vocab, dtype, gradient, softcap)
    if reduction == "sum":
        return total
    return total / (targets != IGNORE).sum().clamp(min=1)
