"""Lesson 5: gradients in closed form, and the lines of a GPU kernel that hold them.

All tensors are fp64 and are compared to 1e-12: no step of h, no autograd is needed.
"""

from __future__ import annotations

import contextlib

from torch import Tensor

with contextlib.suppress(ImportError):  # Triton, which there is for Linux
    import triton.language as tl

    from kernels.attention import IEEE, LOG2E
    from kernels.columns import load


def cross_entropy_backward(logits: Tensor, targets: Tensor) -> Tensor:
    """The gradient (n, V) of the mean cross-entropy of softmax(logits) and targets in the logits.

    logits: (n, V); targets: (n,), the right column of each row. Leave logits as they are.
    """
    raise NotImplementedError


def batchnorm_backward(dy: Tensor, xhat: Tensor, gain: Tensor, inv: Tensor) -> Tensor:
    """The gradient (n, C) in x of y = gain * xhat + bias, where xhat = (x - mean) * inv.

    mean and inv = (var + eps)^-0.5, each (1, C), are those of the n rows of x, and var is the
    unbiased one. dy: (n, C), the gradient in y; gain: (1, C). One line is enough.
    """
    raise NotImplementedError


def layernorm_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of y = weight * (x - mean) / sqrt(var + 1e-5) + bias.

    x, dy: (N, C); weight: (C,). mean and var are those of each row, and var is the biased one,
    divided by C, as GPT-2 has it.
    """
    raise NotImplementedError


def attention_delta(o: Tensor, do: Tensor) -> Tensor:
    """delta (H, T), with delta_i = sum_j p_ij dp_ij, for o = p v and dp = do v^T.

    o, do: (H, T, D), attention's output and the gradient in it. There is neither p nor v here.
    """
    raise NotImplementedError


def dkdv_step(
    dk, dv, k, v, query_side, q_start, k_start, BLOCK_M: tl.constexpr, DIAGONAL: tl.constexpr
):
    """kernels/attention.py's _dkdv_step with its last lines left out.

    Adds what BLOCK_M queries contribute to dk and dv (BLOCK_N, D) of a tile of keys. Scores are
    transposed: p_t is p^T, (BLOCK_N, BLOCK_M), and holds 0 where a query doesn't see a key.
    q, do: (BLOCK_M, D); k, v: (BLOCK_N, D); delta_i: (BLOCK_M,).

        dv += p^T do,   dp = do v^T,   ds = p (dp - delta),   dk += ds^T q

    (the kernel divides dk by sqrt(D) at its end). Products are tl.dot(a, b, input_precision=IEEE),
    with a third argument that the product is added to; a transpose is x.T.
    """
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
    do = load(douts, q_start, BLOCK_M, D, EDGE=True)  # noqa: F841
    delta_i = tl.load(delta + rows, mask=rows < queries.T, other=0.0)  # noqa: F841
    raise NotImplementedError  # four lines
    return dk, dv
