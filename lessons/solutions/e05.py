"""Solutions of lesson 5."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

with contextlib.suppress(ImportError):  # Triton, which there is for Linux
    import triton.language as tl

    from kernels.attention import IEEE, LOG2E
    from kernels.columns import load


def cross_entropy_backward(logits: Tensor, targets: Tensor) -> Tensor:
    dlogits = logits.softmax(1)
    dlogits[torch.arange(len(targets)), targets] -= 1
    return dlogits / len(targets)


def batchnorm_backward(dy: Tensor, xhat: Tensor, gain: Tensor, inv: Tensor) -> Tensor:
    n = len(dy)
    along = xhat * (dy * xhat).sum(0) * n / (n - 1)
    return gain * inv / n * (n * dy - dy.sum(0) - along)


def layernorm_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inv = (x.var(1, correction=0, keepdim=True) + 1e-5) ** -0.5  # (N, 1)
    xhat = (x - x.mean(1, keepdim=True)) * inv
    g = dy * weight
    dx = inv * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))
    return dx, (dy * xhat).sum(0), dy.sum(0)


def attention_delta(o: Tensor, do: Tensor) -> Tensor:
    return (o * do).sum(-1)


def dkdv_step(
    dk, dv, k, v, query_side, q_start, k_start, BLOCK_M: tl.constexpr, DIAGONAL: tl.constexpr
):
    queries, douts, lse, delta = query_side
    BLOCK_N: tl.constexpr = k.shape[0]
    D: tl.constexpr = k.shape[1]
    SCALE: tl.constexpr = LOG2E / D**0.5
    q = load(queries, q_start, BLOCK_M, D, EDGE=True)
    s_t = tl.dot(k, q.T, input_precision=IEEE)
    rows = q_start + tl.arange(0, BLOCK_M)
    lse_i = tl.load(lse + rows, mask=rows < queries.T, other=0.0)
    p_t = tl.exp2(s_t * SCALE - lse_i[None, :])
    if DIAGONAL:
        i, j = tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None]
        p_t = tl.where(q_start - k_start + i >= j, p_t, 0.0)
    do = load(douts, q_start, BLOCK_M, D, EDGE=True)
    delta_i = tl.load(delta + rows, mask=rows < queries.T, other=0.0)
    dv = tl.dot(p_t.to(do.dtype), do, dv, input_precision=IEEE)
    dp_t = tl.dot(v, do.T, input_precision=IEEE)
    ds_t = p_t * (dp_t - delta_i[None, :])
    dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=IEEE)
    return dk, dv
