"""The operators in plain PyTorch: the definition, the CPU path and the oracle.

Every Triton kernel in this folder is tested against these functions in fp64. They never downcast:
fp64 in, fp64 arithmetic throughout. Under autocast the matrix products take and return the autocast
dtype; sums, statistics, softmax and loss are fp32. Outputs and gradients have the same dtypes here
and there (tests/test_kernels_dtypes.py).

Shapes: B batch, T time, C width, H heads, D = C / H head width, N = B * T tokens,
V vocabulary, Vp vocabulary padded to a multiple of 128.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.constants import (
    CACHED_ELEMENTS,
    CHUNK_ELEMENTS,
    DRAW_UNITS,
    GPU_CHUNK_ELEMENTS,
    IGNORE,
    SHORT,
)

# Logits divided by less than fp32's smallest normal number are no numbers; the largest stands
# alone long before that.
GREEDY_BELOW = torch.finfo(torch.float32).tiny
# What attends while text is drawn, where every token makes a new length: for each, cuDNN's would
# make a plan of its own.
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@functools.lru_cache(maxsize=8)
def _causal_mask(T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T, T): -inf where a query would see a later key, 0 elsewhere."""
    return torch.full((T, T), -math.inf, dtype=dtype, device=device).triu(1)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a matrix product takes: the autocast dtype where that is on, else the tensor's own.

    fp64 stays fp64, as torch.autocast leaves it; the meta device knows no autocast.
    """
    if dtype == torch.float64 or device.type == "meta":
        return dtype
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32 for bf16, fp16 and fp32; fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v on a CPU, holding all scores: for T up to SHORT.

    q, k, v: (B H, T, D); mask: 0 or -inf, (T, T) or (B H, T, T); dropout: the probability with
    which an entry of the softmax is left out. Returns (B H, T, D) in q's dtype, rounded once: bf16
    and fp16 are widened first and all is computed in fp32, since PyTorch has no product of bf16 on
    a CPU that leaves fp32 scores.
    """
    exact = at_least_fp32(q.dtype)
    with torch.autocast("cpu", enabled=False):  # it would round the scores to bf16
        wide_q, wide_k, wide_v = q.to(exact), k.to(exact), v.to(exact)  # each (B H, T, D)
        scale = q.shape[-1] ** -0.5
        scores = torch.baddbmm(mask.to(exact), wide_q, wide_k.mT, alpha=scale)  # (B H, T, T)
        p = scores.softmax(-1)  # (B H, T, T)
        if dropout:
            p = F.dropout(p, dropout)
        y = p @ wide_v  # (B H, T, D)
    return y.to(q.dtype)


def attention(qkv: Tensor, n_head: int, dropout: float = 0.0) -> Tensor:
    """Causal self-attention out of the packed projection.

    qkv: (B, T, 3C), queries, keys and values side by side. Returns (B, T, C), in qkv's dtype or
    under autocast in its dtype: softmax(q k^T / sqrt(D)) v per head, each position seeing itself
    and what precedes it. Scores and softmax are at least fp32. dropout: the probability with which
    an entry of the softmax is left out, and the others divided by 1 - dropout; kernels have none.
    """
    B, T, C3 = qkv.shape
    D = C3 // 3 // n_head
    qkv = qkv.to(product_dtype(qkv.dtype, qkv.device))
    q, k, v = qkv.view(B, T, 3, n_head, D).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    if qkv.device.type == "cpu" and T <= SHORT:
        q, k, v = (z.reshape(B * n_head, T, D) for z in (q, k, v))
        mask = _causal_mask(T, at_least_fp32(qkv.dtype), qkv.device)  # (T, T)
        y = short_attention(q, k, v, mask, dropout).view(B, n_head, T, D)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, branch: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream and normalises the sum.

    x, branch: (..., C); weight, bias: (C,). Returns (x + branch, LayerNorm(x + branch)), both
    (..., C): the sum in the wider of both dtypes (x itself without a branch), the other in the
    autocast dtype, since matrix products alone read it, or without autocast in that of the sum.
    LayerNorm: arXiv 1607.06450, biased variance.
    """
    if branch is not None:
        x = x + branch
    wide = torch.promote_types(x.dtype, weight.dtype)  # either may be bf16: weights under FSDP
    y = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return x, y.to(product_dtype(x.dtype, x.device))


def _softcap(logits: Tensor, exact: torch.dtype, softcap: float) -> Tensor:
    """Presses logits into (-softcap, softcap), where there is one; -inf (the padding) stays."""
    if not softcap:
        return logits
    logits = logits.to(exact)
    return torch.where(logits == -math.inf, logits, softcap * torch.tanh(logits / softcap))


def rows_at_once(logits: Tensor) -> int:
    """How many rows of the logits (rows, Vp) go through a softmax together."""
    if logits.device.type != "cpu":
        return len(logits)
    return max(1, CACHED_ELEMENTS // logits.shape[1])


def loss_of_chunk(
    logits: Tensor, index: Tensor, vocab: int, softcap: float, need_grad: bool
) -> Tensor:
    """The losses of some tokens, (rows, 1), at least fp32: -log p of their targets.

    logits: (rows, Vp), which with need_grad become the losses' gradient, p minus one-hot; index:
    (rows, 1), the targets. p: softmax of the logits, or with softcap of softcap * tanh(logits /
    softcap); 0 in the padding, from column `vocab` on.

    On a CPU rows_at_once(), so that their fp32 copy stays in the cache (measured: 16 of 50,304 are
    1.6 times as fast as 512).
    """
    exact = at_least_fp32(logits.dtype)
    logits[:, vocab:] = -math.inf
    at_target = _softcap(logits.gather(1, index), exact, softcap)  # (rows, 1)
    if softcap and need_grad:  # the slope of the cap, 1 - tanh^2; 0 in the padding
        slope = 1 - torch.tanh(logits / softcap).square()  # (rows, Vp)
    sums = []  # log of the sum of exp(logits)
    for rows in logits.split(rows_at_once(logits)):
        capped = _softcap(rows, exact, softcap)
        largest = capped.amax(-1, keepdim=True).to(exact)
        p = (capped - largest).exp_()
        total = p.sum(-1, keepdim=True)
        sums.append(largest + total.log())
        if need_grad:
            rows.copy_(p.div_(total))
    losses = torch.cat(sums) - at_target
    if need_grad:
        # p - 1 at the target, subtracted before it is rounded. Not by scatter_, which copies a bf16
        # tensor twice on a CPU.
        row = torch.arange(len(logits), device=logits.device)
        logits[row, index[:, 0]] = torch.expm1(-losses[:, 0]).to(logits.dtype)
        if softcap:
            logits *= slope
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the token losses; the gradients are computed beside the loss, chunk by chunk.

    Softmax minus one-hot needs the logits that the loss has just made, so the backward pass is a
    multiplication, and no (N, Vp) matrix is ever kept (Liger-Kernel's idea, arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx, h, weight, targets, vocab, dtype, need_grad, softcap, of_chunk):
        valid = (targets != IGNORE).unsqueeze(1)  # (N, 1)
        indices = targets.clamp(min=0).unsqueeze(1)  # (N, 1), any token where there is no target
        # What the matrix products see: of tokens without a target 0, so dW has nothing of them.
        low_h, low_w = h.to(dtype) * valid, weight.to(dtype)
        dh = torch.empty_like(low_h) if need_grad else low_h
        dw = torch.zeros_like(weight, dtype=at_least_fp32(dtype)) if need_grad else weight
        losses = []  # (rows, 1) of each chunk
        at_once = GPU_CHUNK_ELEMENTS if h.is_cuda else CHUNK_ELEMENTS
        chunks = max(1, -(-h.shape[0] * weight.shape[0] // at_once))
        parts = (t.tensor_split(chunks) for t in (low_h, indices, dh))
        for x, index, dx in zip(*parts, strict=True):
            logits = x @ low_w.t()  # (rows, Vp)
            losses.append(of_chunk(logits, index, vocab, softcap, need_grad))
            if need_grad:  # the logits are their gradient now
                torch.mm(logits, low_w, out=dx)
                dw += logits.t() @ x
        if need_grad:
            ctx.save_for_backward(dh.mul_(valid), dw)
        return (torch.cat(losses) * valid).sum()

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return dh * grad, dw * grad, None, None, None, None, None, None


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, vocab: int, reduction: str = "mean",
    softcap: float = 0.0, of_chunk: Callable = loss_of_chunk,
) -> Tensor:
    """Cross-entropy of softmax(h @ weight.T) against targets, without ever holding all logits.

    softcap: of softmax(softcap * tanh(h @ weight.T / softcap)) instead; 0: no cap. of_chunk:
    loss_of_chunk, perhaps compiled.

    h: (N, C); weight: (Vp, C), of which the rows from `vocab` on are padding that takes no
    probability; targets: (N,) in [0, vocab) or -100, which counts for nothing. Returns a scalar in
    nats, fp32 or fp64: the sum, or the mean over the targets that count (0 where none does).
    """
    # Inside forward() gradient mode is always off, so the question is asked here.
    need_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    dtype = product_dtype(h.dtype, h.device)
    total = _LinearCrossEntropy.apply(
        h, weight, targets, vocab, dtype, need_grad, softcap, of_chunk)
    if reduction == "sum":
        return total
    return total / (targets != IGNORE).sum().clamp(min=1)


def embedding(
    idx: Tensor, wte: Tensor, wpe: Tensor | None = None, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Looks up tokens and adds their positions.

    idx: (B, T) int64, below V; wte: (V, C); wpe: (n_ctx, C), or none for a network without such.
    order: of no use here. Returns (x (B, T, C), wte for the output head): who has the head take it
    from here lets the kernel add up its two gradients in place.
    """
    x = F.embedding(idx, wte)  # (B, T, C)
    if wpe is not None:
        x = x + wpe[: idx.shape[1]]
    return x, wte


def rotary_angles(
    T: int, D: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's rotations, each (T, D/2), fp32. arXiv 2104.09864.

    Half of the pairs turn, from a radian a position down to 1 / base; the others stand still, and
    carry content without position (modded-nanogpt).
    """
    frequency = base ** -torch.linspace(0, 1, math.ceil(D / 4), device=device)
    frequency = F.pad(frequency, (0, D // 2 - len(frequency)))  # (D/2,)
    angle = torch.arange(T, device=device)[:, None] * frequency  # (T, D/2)
    return angle.cos(), angle.sin()


def qk_norm_rotary(
    qkv: Tensor, n_head: int, cos: Tensor, sin: Tensor, gain: float = 1.0, eps: float = 1e-6
) -> Tensor:
    """Normalises the queries and keys of every head, and turns them by their positions.

    qkv: (B, T, 3C); cos, sin: (T, D/2) or (B, T, D/2). Each q and k (D,) is divided by its root
    mean square, then its pairs (x_i, x_{i + D/2}) are turned by their angle; q is multiplied by
    gain. Values are handed on. Returns (B, T, 3C) in the dtype of a matrix product's output;
    arithmetic at least in fp32. QK-norm: arXiv 2010.04245; rotary positions: arXiv 2104.09864.
    """
    B, T, C3 = qkv.shape
    D = C3 // 3 // n_head
    dtype = product_dtype(qkv.dtype, qkv.device)
    q, k, v = qkv.to(dtype).view(B, T, 3, n_head, D).unbind(2)  # each (B, T, H, D)
    exact = at_least_fp32(dtype)
    cos, sin = cos.to(exact).unsqueeze(-2), sin.to(exact).unsqueeze(-2)  # (..., T, 1, D/2)

    def turned(x: Tensor, gain: float) -> Tensor:
        x = x.to(exact)
        x = x * (torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain)
        first, second = x.chunk(2, -1)  # each (B, T, H, D/2)
        x = torch.cat((first * cos + second * sin, second * cos - first * sin), -1)
        return x.to(dtype)

    return torch.stack((turned(q, gain), turned(k, 1.0), v), 2).view(B, T, C3)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2, in x's dtype. (..., C) -> (..., C). Primer: arXiv 2109.08668."""
    return F.relu(x).square()


def decode_attention(qkv: Tensor, kv: Tensor, position: Tensor, n_head: int) -> Tensor:
    """Attention of one new token of each stream to those before it and to itself.

    qkv: (B, 1, 3C); kv: (2, B, H, L, D), keys and values of up to L positions, into which the new
    ones are put; position: (1,) int64, where the token stands: what kv holds from there on counts
    for nothing. Returns (B, 1, C), in kv's dtype.
    """
    B, _, C3 = qkv.shape
    new = qkv.to(kv.dtype).view(B, 3, n_head, 1, -1).transpose(0, 1)  # (3, B, H, 1, D)
    if qkv.device.type == "cpu":
        at = int(position)
        kv[:, :, :, at : at + 1] = new[1:]
        keys, values = kv[:, :, :, : at + 1]  # each (B, H, at + 1, D)
        y = F.scaled_dot_product_attention(new[0], keys, values)
    else:  # the host must not wait for the position, so all L are read, and most under a mask
        kv.index_copy_(3, position, new[1:])
        seen = torch.arange(kv.shape[3], device=kv.device) <= position  # (L,)
        with sdpa_kernel(NOT_CUDNN):
            y = F.scaled_dot_product_attention(new[0], kv[0], kv[1], seen.expand(B, 1, 1, -1))
    return y.reshape(B, 1, C3 // 3)  # (B, H, 1, D) -> (B, 1, C)


def int8_linear(x: Tensor, whole: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, where row o of the weight is scale[o] whole[o]. (..., C) -> (..., O).

    whole: (O, C) int8; scale: (O,); bias: (O,) or None. In x's dtype, the scale and the bias in
    fp32 at least; whole numbers of 8 bits have no rounding in bf16.
    """
    y = F.linear(x, whole.to(x.dtype))  # (..., O)
    y = y.to(at_least_fp32(y.dtype)) * scale
    return (y if bias is None else y + bias).to(x.dtype)


def draw(
    logits: Tensor, u: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Draws a token of each row: the one in whose interval of the cumulative sum u lies.

    logits: (B, V); u: (B,) fp64, multiples of 2^-32 from 0 to below 1. Returns (B,) int64, -1 where
    a row's logits are no numbers (NaN, or the largest infinite).

    A token weighs exp((its logit - the largest) / temperature); below fp32's smallest normal number
    the likeliest alone. Kept are the top_k likeliest (0: all), then the fewest of those that hold
    top_p of their weight (nucleus sampling, 1904.09751), and whatever is as likely as the last
    kept. Intervals lie in the order of the vocabulary. What weighs nothing is never drawn.
    """
    largest = logits.amax(-1, keepdim=True)  # (B, 1); NaN where any is NaN
    if temperature < GREEDY_BELOW:
        drawn = logits.argmax(-1, keepdim=True)
    else:
        V = logits.shape[-1]
        k = min(top_k or V, V)
        logits, largest = (x.to(at_least_fp32(x.dtype)) for x in (logits, largest))
        weight = _weights(logits, largest, temperature)  # (B, V)
        if k < V or top_p < 1:
            best = logits.topk(k).values  # (B, k), the likeliest first
            least = best[:, -1:]
            if top_p < 1:
                total = (weight * (logits >= least)).long().sum(-1, keepdim=True)  # (B, 1)
                share = _weights(best, largest, temperature).long()
                before = share.cumsum(-1) - share  # of the likelier ones: 0 for the likeliest
                kept = (before < top_p * total.double()).sum(-1, keepdim=True)  # at least 1
                least = best.gather(-1, (kept - 1).clamp(min=0))
            weight *= logits >= least
        sums = weight.long().cumsum(-1)  # (B, V)
        total = sums[:, -1:]  # (B, 1)
        # Below the total, should u be 1 or the product round up to it: the last that weighs
        # anything is drawn then.
        target = torch.minimum((u[:, None] * total.double()).long(), total - 1)
        drawn = torch.searchsorted(sums, target, right=True)  # (B, 1): the first sum above it
    return torch.where(largest.isfinite(), drawn, -1)[:, 0]


def _weights(logits: Tensor, largest: Tensor, temperature: float) -> Tensor:
    """exp((logits - largest) / temperature) in DRAW_UNITS, of which whole ones count."""
    below = logits - largest  # the largest becomes 0, which any temperature divides
    return below.mul_(1 / temperature).exp_().mul_(DRAW_UNITS)  # a power of two: exact
