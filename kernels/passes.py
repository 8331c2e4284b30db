"""What a block whose backward pass is written by hand (model/fused_block.py) launches, one by one.

Each pass has one signature and two makers: REFERENCE is plain PyTorch, the definition, in any
dtype; triton_passes() launches the kernels of this folder. A backward pass returns the gradient of
its input, and puts those of its vectors (LayerNorm's weights, biases) into columns of `partial`, a
sum for each of P shares of the rows: who adds those up gets the vectors of a whole block at once.

Shapes: N rows (B * T), C width, x and branch (N, C), P programs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import reference


class Passes(NamedTuple):
    """The passes of one maker."""

    programs: Callable  # (device) -> the most rows that partial may have
    layer_norm_forward: Callable
    layer_norm_backward: Callable
    gelu_forward: Callable
    gelu_backward: Callable
    attention_forward: Callable
    attention_backward: Callable
    column_sums: Callable


def _layer_norm_forward(x, branch, branch_bias, weight, bias, eps, dtype):
    """(s = x + branch + branch_bias, LayerNorm(s) in dtype, mean, rstd); no branch: s is empty."""
    total = x if branch is None else x + branch
    if branch_bias is not None:
        total = total + branch_bias
    mean = total.mean(-1)
    rstd = (total.var(-1, correction=0) + eps).rsqrt()
    y = F.layer_norm(total, total.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), eps)
    return (total.new_empty(0) if branch is None else total), y.to(dtype), mean, rstd


def _layer_norm_backward(
    dy, dtotal, total, weight, mean, rstd, partial, dtype, branch_dtype, branch_bias
):
    """(ds in dtype, ds in branch_dtype if that is another, else empty); dw, db, dc in partial."""
    n = (total - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dy = dy.reshape(total.shape).to(total.dtype)
    g = dy * weight
    ds = rstd.unsqueeze(-1) * (g - g.mean(-1, True) - n * (g * n).mean(-1, True))
    if dtotal is not None:
        ds = ds + dtotal
    sums = [dy * n, dy, ds][: 3 if branch_bias else 2]
    rows = [part.reshape(-1, part.shape[-1]).sum(0) for part in sums]
    partial.zero_()[0] = torch.cat(rows)
    other = ds.to(branch_dtype) if branch_dtype != dtype else ds.new_empty(0)
    return ds.to(dtype), other


def _gelu_forward(x, bias):
    """gelu(x + bias), in x's dtype."""
    return F.gelu(x.to(bias.dtype) + bias, approximate="tanh").to(x.dtype)


def _gelu_backward(x, bias, dy, partial):
    """(dx, gelu(x + bias)); db in partial."""
    with torch.enable_grad():
        u = (x.detach().to(bias.dtype) + bias.detach()).requires_grad_()
        y = F.gelu(u, approximate="tanh")
    (du,) = torch.autograd.grad(y, u, dy.to(y.dtype))
    partial.zero_()[0] = du.sum(0)
    return du.to(dy.dtype), y.detach().to(x.dtype)


def _attention_forward(qkv, n_head):
    """(out (B, T, C), what the backward pass needs beside it)."""
    return reference.attention(qkv, n_head), qkv.new_empty(0)


def _attention_backward(dout, qkv, out, lse, n_head):
    """dqkv (B, T, 3C)."""
    with torch.enable_grad():
        qkv = qkv.detach().requires_grad_()
        out = reference.attention(qkv, n_head)
    return torch.autograd.grad(out, qkv, dout)[0]


def _column_sums(first, second, partial):
    """The sums over the rows of two matrices, side by side, in partial."""
    sums = [x.to(partial.dtype).sum(0) for x in (first, second)]
    partial.zero_()[0] = torch.cat(sums)


REFERENCE = Passes(
    lambda device: 1, _layer_norm_forward, _layer_norm_backward, _gelu_forward, _gelu_backward,
    _attention_forward, _attention_backward, _column_sums,
)


def triton_passes() -> Passes:
    """The kernels'. They compute in bf16, fp16 and fp32, with heads of 64 or 128."""
    from kernels import attention, column_sums, gelu, layernorm, tiles

    return Passes(
        tiles.programs, layernorm.launch_forward, layernorm.launch_backward, gelu.launch_forward,
        gelu.launch_backward, attention.launch_forward, attention.launch_backward,
        column_sums.launch,
    )
