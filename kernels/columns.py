"""The columns of one head inside (B, T, width), and how the attention kernels read and write them.

q, k, v lie side by side in qkv (B, T, 3C), and o goes to (B, T, C) with the heads side by side: the
kernels reach them by strides, without a transpose or a copy, through plain pointers or through
tensor descriptors (TMA, from sm_90 on: one instruction a tile).

    keys = Columns(operand(qkv, 64, D, tma), batch, C + head * D, T, 3 * C)
    k = load(keys, k_start, 64, D, EDGE=False)        # (64, D), inside a kernel

Shapes: B batch, T time, C = H * D width, H heads, D head width.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Columns(NamedTuple):
    """Where a head's rows lie: D columns of x (B, T, width), out of which load() takes tiles."""

    x: Any  # a pointer, or the descriptor of a tile (TMA)
    batch: Any
    first: Any  # column
    T: Any
    width: Any


@triton.jit
def load(rows_of, start, ROWS: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr):
    """The tile (ROWS, D) of some Columns from row `start` on; rows from T on are zero.

    EDGE: the tile may reach past T. A descriptor always looks; a pointer only where it has to,
    since masks cost instructions in the loop.
    """
    x, batch, first, T, width = rows_of
    if isinstance(x, tl.tensor_descriptor):
        return x.load([batch, start, first]).reshape(ROWS, D)
    else:
        rows = start + tl.arange(0, ROWS)
        # int64: B * T * 3C passes 2^31 at 911 sequences of GPT-2 124M.
        corner = x + batch.to(tl.int64) * T * width + first
        cells = corner + rows[:, None] * width + tl.arange(0, D)[None, :]
        if EDGE:
            return tl.load(cells, mask=rows[:, None] < T, other=0.0)
        else:
            return tl.load(cells)


@triton.jit
def store(rows_of, start, tile):
    """Writes a tile (ROWS, D) to some Columns from row `start` on, up to row T."""
    x, batch, first, T, width = rows_of
    ROWS: tl.constexpr = tile.shape[0]
    D: tl.constexpr = tile.shape[1]
    if isinstance(x, tl.tensor_descriptor):  # which ends at T by itself
        x.store([batch, start, first], tile.to(x.dtype).reshape(1, ROWS, D))
    else:
        rows = start + tl.arange(0, ROWS)
        corner = x + batch.to(tl.int64) * T * width + first
        cells = corner + rows[:, None] * width + tl.arange(0, D)[None, :]
        tl.store(cells, tile.to(x.dtype.element_ty), mask=rows[:, None] < T)


class _Tiles(TensorDescriptor):
    """Of a tensor that dense() has let through and shapes that shipped: to look at each number
    again at every launch takes the host most of a descriptor's time."""

    def __post_init__(self) -> None:
        pass


def operand(x: Tensor, rows: int, D: int, tma: bool) -> Tensor | TensorDescriptor:
    """What load() and store() take: x (B, T, width), which is dense(), itself, or a descriptor of
    its tiles of (rows, D)."""
    return _Tiles(x, x.shape, x.stride(), [1, rows, D]) if tma else x


def dense(x: Tensor) -> Tensor:
    """x, contiguous and at a multiple of 16 bytes, as descriptors and 128-bit loads demand."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
