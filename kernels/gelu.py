"""GPT-2's GELU with the bias that comes before it, in one pass over memory in each direction.

    u = x + b,   y = u (1 + t) / 2,   t = tanh(sqrt(2 / pi) (u + 0.044715 u^3))
    dx = dy ((1 + t) / 2 + u (1 - t^2) sqrt(2 / pi) (1 + 3 * 0.044715 u^2) / 2),   db = sum dx

The backward pass makes y once more beside dx, so that only x has to be kept: y is what the gradient
of the next matrix product needs. Arithmetic is fp32, whatever is stored; db is summed per program
and then over programs, without atomics. GELU: arXiv 1606.08415, its tanh form as GPT-2 has it.

Shapes: N rows (B * T), W columns (4C), P programs a column of blocks backward.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launcher, tiles

ROOT = tl.constexpr(math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tanh(u):
    """tanh(sqrt(2 / pi) (u + 0.044715 u^3)): 1 - 2 / (e + 1) with e = exp(2 ...), which ends at
    exp(80), where tanh has long been 1; NaN stays."""
    e = tl.exp(tl.minimum((u + u * u * u * CUBIC) * (2 * ROOT), 80.0, tl.PropagateNan.ALL))
    return 1 - 2 / (e + 1)


@triton.jit
def gelu_forward(
    x, bias, y, N, W, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program, a tile of (BLOCK_M, BLOCK_N): grid (tiles of rows, tiles of columns). It alone
    writes these cells of y. x, y: (N, W); bias: (W,)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < N) & (columns[None, :] < W)
    cells = rows[:, None] * W + columns[None, :]
    b = tl.load(bias + columns, mask=columns < W, other=0.0).to(tl.float32)
    u = tl.load(x + cells, mask=inside, other=0.0).to(tl.float32) + b[None, :]  # u = x + b
    tl.store(y + cells, (0.5 * u * (1 + _tanh(u))).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(
    x, bias, dy, dx, y, partial, width, N, W, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program, every P-th tile of rows: grid (P, tiles of columns).

    It alone writes those cells of dx and y (N, W), and its cells of the partial sums of db, whose
    rows are `width` apart. dx may be dy itself: a cell is read before it is written.
    """
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.load(bias + columns, mask=columns < W, other=0.0).to(tl.float32)
    db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # added across threads once, at the end
    for start in range(tl.program_id(0) * BLOCK_M, N, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows[:, None] < N) & (columns[None, :] < W)
        cells = rows[:, None].to(tl.int64) * W + columns[None, :]
        u = tl.load(x + cells, mask=inside, other=0.0).to(tl.float32) + b[None, :]  # u = x + b
        g = tl.load(dy + cells, mask=inside, other=0.0).to(tl.float32)
        t = _tanh(u)
        tl.store(y + cells, (0.5 * u * (1 + t)).to(y.dtype.element_ty), mask=inside)
        slope = (1 + u * u * (3 * CUBIC)) * ROOT  # of t's argument
        du = g * 0.5 * (1 + t + u * (1 - t * t) * slope)
        db += du  # db = sum dx; 0 outside, where dy is
        tl.store(dx + cells, du.to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * width + columns, tl.sum(db, 0), mask=columns < W)


def launch_forward(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), in x's dtype. x: (N, W), contiguous; bias: (W,)."""
    N, W = x.shape
    y = torch.empty_like(x)
    tile = tiles.pick("gelu_forward", tiles.arch(x.device), 1)
    launcher.launch(gelu_forward, (tiles.cdiv(N, tile.m), tiles.cdiv(W, tile.n)),
        x, bias, y, N, W, BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps
    )
    return y


def launch_backward(
    x: Tensor, bias: Tensor, dy: Tensor, partial: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx, gelu(x + bias)). dx takes dy's place. partial: (P, W), perhaps columns of a wider one:
    takes the sums of P shares of db."""
    N, W = x.shape
    y = torch.empty_like(x)
    tile = tiles.pick("gelu_backward", tiles.arch(x.device), 1)
    launcher.launch(gelu_backward, (partial.shape[0], tiles.cdiv(W, tile.n)),
        x, bias, dy, dy, y, partial, partial.stride(0), N, W,
        BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps,
    )
    return dy, y
