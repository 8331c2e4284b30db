"""LayerNorm fused with the residual add in Triton, forward and backward.

With s = x + r (r the branch that joins the residual stream), for every row of C values:

    mean = sum s / C,   rstd = 1 / sqrt(sum (s - mean)^2 / C + eps)
    n = (s - mean) rstd,   y = n w + b

and backward, with g = dy w and the means taken over the row:

    ds = rstd (g - mean(g) - n mean(g n)) + ds_residual
    dw = sum dy n,   db = sum dy   (over rows)

LayerNorm: arXiv 1607.06450. One pass over memory in each direction: a row stays in registers. All
arithmetic and both statistics are fp32, whatever is stored. dw and db are summed per program and
then over programs, without atomics: every run gives the same bits.

Shapes: N rows (B * T), C width, BLOCK the power of two that holds C, P programs backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.reference import product_dtype

MAX_WIDTH = 8192  # a row is held in registers: 16 values in each of 512 threads


@triton.jit
def layer_norm_forward(
    x, branch, weight, bias, total, y, mean, rstd, C, eps,
    BLOCK: tl.constexpr, BRANCH: tl.constexpr,
):
    """One program, one row: grid (N,). It alone writes this row of total, y, mean and rstd.

    x, branch, total, y: (N, C); weight, bias: (C,); mean, rstd: (N,). total = x + branch is
    written only where there is a branch.
    """
    row = tl.program_id(0).to(tl.int64)  # N * C passes 2^31 at 2.8 million tokens of width 768
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    cells = row * C + columns
    s = tl.load(x + cells, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        s += tl.load(branch + cells, mask=inside, other=0.0).to(tl.float32)  # s = x + r
        stored = s.to(total.dtype.element_ty)
        tl.store(total + cells, stored, mask=inside)
        s = stored.to(tl.float32)  # what backward will read, and what the next layer adds to
    mean_row = tl.sum(s) / C  # mean = sum s / C
    centred = tl.where(inside, s - mean_row, 0.0)
    rstd_row = 1 / tl.sqrt(tl.sum(centred * centred) / C + eps)
    n = centred * rstd_row  # n = (s - mean) rstd
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + cells, (n * w + b).to(y.dtype.element_ty), mask=inside)  # y = n w + b
    tl.store(mean + row, mean_row)
    tl.store(rstd + row, rstd_row)


@triton.jit
def layer_norm_backward(
    dy, dtotal, total, weight, mean, rstd, dx, dbranch, dweight, dbias, N, C,
    BLOCK: tl.constexpr, DTOTAL: tl.constexpr, DBRANCH: tl.constexpr,
):
    """One program, every P-th row: grid (P,).

    It alone writes those rows of dx and dbranch (N, C), and its own row of the partial sums dweight
    and dbias (P, C). dtotal, the gradient that comes down the residual stream, may be absent;
    dbranch is dx in the branch's dtype, written only where the two differ.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    if BLOCK <= 4096:
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        cells = tl.cast(row, tl.int64) * C + columns
        s = tl.load(total + cells, mask=inside, other=0.0).to(tl.float32)
        dy_row = tl.load(dy + cells, mask=inside, other=0.0).to(tl.float32)
        rstd_row = tl.load(rstd + row)
        n = (s - tl.load(mean + row)) * rstd_row  # n = (s - mean) rstd
        db += dy_row  # db = sum dy
        dw += dy_row * n  # dw = sum dy n; 0 outside the row, where dy is
        if BLOCK > 4096:  # too long to stay in registers: read again for every row, out of L1
            w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        g = dy_row * w  # g = dy w
        # ds = rstd (g - mean(g) - n mean(g n)) + ds_residual
        ds = (g - tl.sum(g) / C - n * (tl.sum(g * n) / C)) * rstd_row
        if DTOTAL:
            ds += tl.load(dtotal + cells, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + cells, ds.to(dx.dtype.element_ty), mask=inside)
        if DBRANCH:
            tl.store(dbranch + cells, ds.to(dbranch.dtype.element_ty), mask=inside)
    partial = tl.program_id(0) * C + columns
    tl.store(dweight + partial, dw, mask=inside)
    tl.store(dbias + partial, db, mask=inside)


@torch.library.custom_op("gpt2::layer_norm_forward", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, branch: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x + branch, y, mean, rstd); without a branch the first is empty. y is of dtype."""
    total, y, mean, rstd = _forward_outputs(x, weight, bias, branch, eps, dtype)
    N, C = mean.numel(), x.shape[-1]
    block = triton.next_power_of_2(C)
    tile = tiles.pick("layer_norm_forward", tiles.arch(x.device), block)
    layer_norm_forward[(N,)](
        x.contiguous(), None if branch is None else branch.contiguous(),
        weight.contiguous(), bias.contiguous(), total, y, mean, rstd, C, eps,
        BLOCK=block, BRANCH=branch is not None, num_warps=tile.warps,
    )
    return total, y, mean, rstd


@_forward.register_fake
def _forward_outputs(x, weight, bias, branch, eps, dtype):
    if branch is None:
        total = x.new_empty(0)
    else:
        sum_dtype = torch.promote_types(x.dtype, branch.dtype)
        total = x.new_empty(x.shape, dtype=sum_dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return total, y, mean, torch.empty_like(mean)


@torch.library.custom_op("gpt2::layer_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    dtype: torch.dtype, branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dweight, dbias); dbranch is empty where it is dx."""
    dx, dbranch, dweight, dbias = _backward_outputs(
        dy, dtotal, total, weight, mean, rstd, dtype, branch_dtype
    )
    N, C = mean.numel(), total.shape[-1]
    block = triton.next_power_of_2(C)
    tile = tiles.pick("layer_norm_backward", tiles.arch(total.device), block)
    P = min(N, tiles.programs(total.device))
    partial = total.new_empty((2, P, C), dtype=torch.float32)
    layer_norm_backward[(P,)](
        dy.contiguous(), None if dtotal is None else dtotal.contiguous(), total.contiguous(),
        weight.contiguous(), mean, rstd, dx, dbranch, partial[0], partial[1], N, C,
        BLOCK=block, DTOTAL=dtotal is not None, DBRANCH=dtype != branch_dtype,
        num_warps=tile.warps,
    )
    torch.sum(partial[0], 0, out=dweight)
    torch.sum(partial[1], 0, out=dbias)
    return dx, dbranch, dweight, dbias


@_backward.register_fake
def _backward_outputs(dy, dtotal, total, weight, mean, rstd, dtype, branch_dtype):
    dx = total.new_empty(total.shape, dtype=dtype)
    shape = total.shape if dtype != branch_dtype else 0
    dbranch = total.new_empty(shape, dtype=branch_dtype)
    dweight = weight.new_empty(weight.shape, dtype=torch.float32)
    return dx, dbranch, dweight, torch.empty_like(dweight)


def _remember(ctx, inputs, output):
    x, weight, bias, branch, _, _ = inputs
    total, _, mean, rstd = output
    ctx.set_materialize_grads(False)  # the last sum of a model has no gradient of its own
    ctx.save_for_backward(x if branch is None else total, weight, mean, rstd)
    ctx.dtypes = x.dtype, x.dtype if branch is None else branch.dtype, bias.dtype
    ctx.has_branch = branch is not None


def _gradients(ctx, dtotal, dy, dmean, drstd):
    total, weight, mean, rstd = ctx.saved_tensors
    dtype, branch_dtype, bias_dtype = ctx.dtypes
    if dy is None:
        dy = torch.zeros_like(total)
    dtotal = dtotal if ctx.has_branch else None
    dx, dbranch, dweight, dbias = torch.ops.gpt2.layer_norm_backward(
        dy, dtotal, total, weight, mean, rstd, dtype, branch_dtype
    )
    if not ctx.has_branch:
        dbranch = None
    elif dtype == branch_dtype:
        dbranch = dx
    return dx, dweight.to(weight.dtype), dbias.to(bias_dtype), dbranch, None, None


_forward.register_autograd(_gradients, setup_context=_remember)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, branch: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream and normalises the sum.

    x, branch: (..., C), C up to 8,192; weight, bias: (C,). Returns (x + branch, LayerNorm(x +
    branch)), both (..., C): the sum in the wider of both dtypes (x itself without a branch), the
    other in the autocast dtype, or without autocast in that of the sum. ValueError for a wider row
    or another dtype than bf16, fp16 and fp32. Defined by kernels/reference.py.
    """
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"layer_norm kernel: rows of at most {MAX_WIDTH}, not {x.shape[-1]}")
    sum_dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    tiles.check_dtype("layer_norm", sum_dtype)
    y_dtype = product_dtype(sum_dtype, x.device)
    total, y, _, _ = torch.ops.gpt2.layer_norm_forward(x, weight, bias, branch, eps, y_dtype)
    return (x if branch is None else total), y
