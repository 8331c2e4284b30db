"""The three operators in plain PyTorch: the definition, the CPU path and the oracle.

Every Triton kernel in this folder is tested against these functions in fp64. They
never downcast: fp64 in, fp64 arithmetic throughout. Under autocast the matrix products run in
the autocast dtype and everything else in fp32.

Shapes: B batch, T time, C width, H heads, D = C / H head width, N = B * T tokens,
V vocabulary, Vp vocabulary padded to a multiple of 128.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that is no target (torch.nn.functional.cross_entropy's default)

# Below this length the T x T scores fit into the caches of a CPU core, and matmul + softmax
# beats PyTorch's blocked SDPA (12 % of a whole GPT-2 124M step at T = 256).
SHORT = 256

# Logits computed at once: 2^25 fp32 values are 128 MiB, whatever the number of tokens.
CHUNK_ELEMENTS = 2**25
CACHED_ROWS = 16  # rows of logits whose fp32 copy (3 MiB) stays in a CPU's cache


@functools.lru_cache(maxsize=8)
def _causal_mask(T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T, T): -inf where a query would see a later key, 0 elsewhere."""
    return torch.full((T, T), -math.inf, dtype=dtype, device=device).triu(1)


def attention(qkv: Tensor, n_head: int) -> Tensor:
    """Causal self-attention out of the packed projection.

    qkv: (B, T, 3C), queries, keys and values side by side. Returns (B, T, C).
    softmax(q k^T / sqrt(D)) v per head, each position seeing itself and what precedes it.
    """
    B, T, C3 = qkv.shape
    D = C3 // 3 // n_head
    q, k, v = qkv.view(B, T, 3, n_head, D).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    if qkv.device.type == "cpu" and T <= SHORT:
        q, k, v = (z.reshape(B * n_head, T, D) for z in (q, k, v))
        scores = torch.baddbmm(_causal_mask(T, qkv.dtype, qkv.device), q, k.mT, alpha=D**-0.5)
        y = (scores.softmax(-1) @ v).view(B, n_head, T, D)  # (B, H, T, T) @ (B, H, T, D)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, branch: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream and normalises the sum.

    x, branch: (..., C); weight, bias: (C,). Returns (x + branch, LayerNorm(x + branch)), both
    (..., C); without a branch the first is x itself. LayerNorm: arXiv 1607.06450, biased variance.
    """
    if branch is not None:
        x = x + branch
    dtype = torch.promote_types(x.dtype, weight.dtype)  # weights may be bf16 under FSDP
    return x, F.layer_norm(x, x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)


def _softmax_in_place(logits: Tensor, exact: torch.dtype) -> Tensor:
    """Replaces logits (rows, Vp) by their softmax and returns their log-sum-exp, (rows, 1), exact.

    On a CPU a few rows at a time, so that their fp32 copy stays in the cache (measured: 1.6 times
    as fast at 512 rows of 50,304).
    """
    sums = []
    for rows in logits.split(CACHED_ROWS if logits.device.type == "cpu" else len(logits)):
        wide = rows.to(exact)
        p = wide.softmax(-1)
        # The largest p is 1 / sum(exp(logit - largest logit)), and at least 1 / Vp: safe to log.
        sums.append(wide.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log())
        rows.copy_(p)
    return torch.cat(sums)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the token losses; the gradients are computed beside the loss, chunk by chunk.

    Softmax minus one-hot needs the logits that the loss has just made, so the backward pass is a
    multiplication, and no (N, Vp) matrix is ever kept (Liger-Kernel's idea, arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx, h, weight, targets, vocab, dtype, need_grad):
        exact = torch.promote_types(dtype, torch.float32)  # fp32, or fp64 for fp64
        low_h, low_w = h.to(dtype), weight.to(dtype)  # what the matrix products see
        total = h.new_zeros((), dtype=exact)
        dh = torch.empty_like(low_h) if need_grad else low_h
        dw = torch.zeros_like(weight, dtype=exact) if need_grad else weight
        chunks = max(1, -(-h.shape[0] * weight.shape[0] // CHUNK_ELEMENTS))
        parts = (t.tensor_split(chunks) for t in (low_h, targets, dh))
        for x, target, dx in zip(*parts, strict=True):
            logits = x @ low_w.t()  # (rows, Vp)
            logits[:, vocab:] = -math.inf  # the padding takes no probability
            index, valid = target.clamp(min=0).unsqueeze(1), (target != IGNORE).unsqueeze(1)
            at_target = logits.gather(1, index).to(exact)  # (rows, 1)
            losses = _softmax_in_place(logits, exact) - at_target
            total += (losses * valid).sum()
            if need_grad:
                # p - 1 at the target, subtracted before it is rounded.
                dlogits = logits.scatter_(1, index, torch.expm1(-losses).to(dtype))
                dx.copy_((dlogits @ low_w) * valid)
                dw += dlogits.t() @ (x * valid)
        if need_grad:
            ctx.save_for_backward(dh, dw)
        return total

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return dh * grad, dw * grad, None, None, None, None


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, vocab: int, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of softmax(h @ weight.T) against targets, without ever holding all logits.

    h: (N, C); weight: (Vp, C), of which the rows from `vocab` on are padding that takes no
    probability; targets: (N,) in [0, vocab) or -100, which counts for nothing. Returns a scalar in
    nats, fp32 or fp64: the sum, or the mean over the targets that count (0 where none does).
    """
    autocast = torch.is_autocast_enabled(h.device.type)
    dtype = torch.get_autocast_dtype(h.device.type) if autocast else h.dtype
    # Inside forward() gradient mode is always off, so the question is asked here.
    need_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    total = _LinearCrossEntropy.apply(h, weight, targets, vocab, dtype, need_grad)
    if reduction == "sum":
        return total
    return total / (targets != IGNORE).sum().clamp(min=1)
