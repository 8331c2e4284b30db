"""Sums over the rows of two matrices in one launch: the gradients of biases that nobody else makes.

    partial[p] = sums of every P-th tile of rows of first and second, side by side

fp32 throughout, per program and then over programs, without atomics.

Shapes: N rows (B * T), first (N, W1), second (N, W2), P programs a column of blocks.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels import launcher, tiles


@triton.jit
def _sums(x, columns, N, W, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums of these columns of x (N, W) over this program's rows."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # added across threads once, at the end
    for start in range(tl.program_id(0) * BLOCK_M, N, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows[:, None] < N) & (columns[None, :] < W)
        cells = rows[:, None].to(tl.int64) * W + columns[None, :]
        total += tl.load(x + cells, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def column_sums(
    first, second, partial, width, N, W1, W2, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program, one tile of columns of one matrix, every P-th tile of its rows: grid (P, tiles
    of columns of first, then of second). It alone writes these cells of partial, whose rows are
    `width` apart and hold W1 + W2."""
    sums = partial + tl.program_id(0) * width
    tiles_of_first = tl.cdiv(W1, BLOCK_N)
    if tl.program_id(1) < tiles_of_first:
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = _sums(first, columns, N, W1, BLOCK_M, BLOCK_N)
        tl.store(sums + columns, total, mask=columns < W1)
    else:
        columns = (tl.program_id(1) - tiles_of_first) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = _sums(second, columns, N, W2, BLOCK_M, BLOCK_N)
        tl.store(sums + W1 + columns, total, mask=columns < W2)


def launch(first: Tensor, second: Tensor, partial: Tensor) -> None:
    """first: (N, W1), second: (N, W2), contiguous; partial: (P, W1 + W2), perhaps columns of a
    wider one."""
    (N, W1), W2 = first.shape, second.shape[1]
    tile = tiles.pick("column_sums", tiles.arch(first.device), 1)
    columns = tiles.cdiv(W1, tile.n) + tiles.cdiv(W2, tile.n)
    launcher.launch(column_sums, (partial.shape[0], columns),
        first, second, partial, partial.stride(0), N, W1, W2,
        BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps,
    )
