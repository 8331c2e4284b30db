"""LayerNorm fused with the residual add in Triton, forward and backward.

With s = x + r (r the branch that joins the residual stream; its bias c too, where the product that
made it left that to us), for every row of C values:

    mean = sum s / C,   rstd = 1 / sqrt(sum (s - mean)^2 / C + eps)
    n = (s - mean) rstd,   y = n w + b

and backward, with g = dy w and the means taken over the row:

    ds = rstd (g - mean(g) - n mean(g n)) + ds_residual
    dw = sum dy n,   db = sum dy,   dc = sum ds   (over rows)

LayerNorm: arXiv 1607.06450. One pass over memory in each direction: a row stays in registers. All
arithmetic and both statistics are fp32, whatever is stored. dw, db and dc are summed per program
and then over programs, without atomics: every run gives the same bits.

Shapes: N rows (B * T), C width, BLOCK the power of two that holds C, P programs backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launcher, tiles
from kernels.direct import direct, operator_wanted
from kernels.reference import product_dtype

MAX_WIDTH = 8192  # a row is held in registers: 16 values in each of 512 threads


@triton.jit
def layer_norm_forward(
    x, branch, branch_bias, weight, bias, total, y, mean, rstd, C, eps,
    BLOCK: tl.constexpr, BRANCH: tl.constexpr, BRANCH_BIAS: tl.constexpr,
):
    """One program, one row: grid (N,). It alone writes this row of total, y, mean and rstd.

    x, branch, total, y: (N, C); branch_bias, weight, bias: (C,); mean, rstd: (N,). total = x +
    branch (+ branch_bias) is written only where there is a branch.
    """
    row = tl.program_id(0).to(tl.int64)  # N * C passes 2^31 at 2.8 million tokens of width 768
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    cells = row * C + columns
    s = tl.load(x + cells, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        s += tl.load(branch + cells, mask=inside, other=0.0).to(tl.float32)  # s = x + r
        if BRANCH_BIAS:
            s += tl.load(branch_bias + columns, mask=inside, other=0.0).to(tl.float32)  # + c
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
    dy, dtotal, total, weight, mean, rstd, dx, dbranch, partial, width, N, C,
    BLOCK: tl.constexpr, DTOTAL: tl.constexpr, DBRANCH: tl.constexpr, BRANCH_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program, every P-th row: grid (P,). STAGES: rows that are on their way at once, for a row
    is read in the time in which the reductions of those before it wait for each other.

    It alone writes those rows of dx and dbranch (N, C), and its own row of the partial sums, whose
    rows are `width` apart: dw, db and with BRANCH_BIAS dc, C of each. dtotal, the gradient that
    comes down the residual stream, may be absent; dbranch is dx in the branch's dtype, written only
    where the two differ.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    if BLOCK <= 4096:
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    dc = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=STAGES):
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
        if BRANCH_BIAS:
            dc += tl.where(inside, ds, 0.0)  # dc = sum ds
        tl.store(dx + cells, ds.to(dx.dtype.element_ty), mask=inside)
        if DBRANCH:
            tl.store(dbranch + cells, ds.to(dbranch.dtype.element_ty), mask=inside)
    sums = partial + tl.program_id(0) * width + columns
    tl.store(sums, dw, mask=inside)
    tl.store(sums + C, db, mask=inside)
    if BRANCH_BIAS:
        tl.store(sums + 2 * C, dc, mask=inside)


def _dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty, as large as x; new_empty(x.shape) takes the host twice as long."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def launch_forward(
    x: Tensor, branch: Tensor | None, branch_bias: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x + branch + branch_bias, y, mean, rstd); without a branch the first is empty. y: dtype."""
    total, y, mean, rstd = _forward_outputs(x, weight, bias, branch, eps, dtype)
    block = tiles.next_power_of_2(x.shape[-1])
    kernel = "layer_norm_forward" if branch_bias is None else "layer_norm_forward_bias"
    tile = tiles.pick(kernel, tiles.arch(x.device), block)
    launcher.launch(layer_norm_forward, (mean.numel(),),
        x.contiguous(), None if branch is None else branch.contiguous(), branch_bias,
        weight.contiguous(), bias.contiguous(), total, y, mean, rstd, x.shape[-1], eps,
        BLOCK=block, BRANCH=branch is not None, BRANCH_BIAS=branch_bias is not None,
        num_warps=tile.warps,
    )
    return total, y, mean, rstd


def launch_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    partial: Tensor, dtype: torch.dtype, branch_dtype: torch.dtype, branch_bias: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dbranch); dbranch is empty where it is dx.

    partial: (P, 2C), with branch_bias (P, 3C), perhaps columns of a wider one: takes the sums of P
    shares of the rows, dw, db and dc side by side.
    """
    dx = _dense_like(total, dtype)
    other = dtype != branch_dtype
    dbranch = _dense_like(total, branch_dtype) if other else total.new_empty(0, dtype=branch_dtype)
    N, C = mean.numel(), total.shape[-1]
    block = tiles.next_power_of_2(C)
    kernel = "layer_norm_backward_bias" if branch_bias else "layer_norm_backward"
    tile = tiles.pick(kernel, tiles.arch(total.device), block)
    launcher.launch(layer_norm_backward, (partial.shape[0],),
        dy.contiguous(), None if dtotal is None else dtotal.contiguous(), total.contiguous(),
        weight.contiguous(), mean, rstd, dx, dbranch, partial, partial.stride(0), N, C,
        BLOCK=block, DTOTAL=dtotal is not None, DBRANCH=other,
        BRANCH_BIAS=branch_bias, STAGES=tile.stages, num_warps=tile.warps,
    )
    return dx, dbranch


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, branch: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x + branch, y, mean, rstd); without a branch the first is empty. y is of dtype."""
    return launch_forward(x, branch, None, weight, bias, eps, dtype)


_forward = torch.library.custom_op("gpt2::layer_norm_forward", _launch_forward, mutates_args=())


@_forward.register_fake
def _forward_outputs(x, weight, bias, branch, eps, dtype):
    if branch is None:
        total = x.new_empty(0)
    else:
        total = _dense_like(x, torch.promote_types(x.dtype, branch.dtype))
    y = _dense_like(x, dtype)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return total, y, mean, torch.empty_like(mean)


def _launch_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    dtype: torch.dtype, branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dweight, dbias); dbranch is empty where it is dx."""
    P, C = min(mean.numel(), tiles.programs(total.device)), total.shape[-1]
    partial = total.new_empty((P, 2 * C), dtype=torch.float32)
    dx, dbranch = launch_backward(
        dy, dtotal, total, weight, mean, rstd, partial, dtype, branch_dtype, branch_bias=False
    )
    return dx, dbranch, partial[:, :C].sum(0), partial[:, C:].sum(0)


_backward = torch.library.custom_op(
    "gpt2::layer_norm_backward", _launch_backward, mutates_args=())


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
    backward = torch.ops.gpt2.layer_norm_backward if operator_wanted(dy) else _launch_backward
    dx, dbranch, dweight, dbias = backward(
        dy, dtotal, total, weight, mean, rstd, dtype, branch_dtype
    )
    if not ctx.has_branch:
        dbranch = None
    elif dtype == branch_dtype:
        dbranch = dx
    return dx, dweight.to(weight.dtype), dbias.to(bias_dtype), dbranch, None, None


_forward.register_autograd(_gradients, setup_context=_remember)
_direct = direct("layer_norm", _launch_forward, _remember, _gradients)


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
    forward = torch.ops.gpt2.layer_norm_forward if operator_wanted(x) else _direct
    total, y, _, _ = forward(x, weight, bias, branch, eps, y_dtype)
    return (x if branch is None else total), y
