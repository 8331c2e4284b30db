"""relu(x)^2 in one pass over memory, forward and backward.

    y = relu(x)^2,   dx = 2 relu(x) dy

The backward pass makes relu(x) anew from x. Bytes a value in bf16: 4 forward, 6 backward. In
PyTorch's eager mode, 8 and 16 or so: relu and square are a pass each. torch.compile fuses both
itself in as few, and keeps x and y as well: under it launches and memory of a step are the same
(counted: docs/decisions.md), so this operator is for blocks that aren't compiled. Primer: arXiv
2109.08668.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launcher, tiles


@triton.jit
def _cells(count, BLOCK: tl.constexpr):
    """The BLOCK values of this program, and which of them exist."""
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # may pass 2^31
    return cells, cells < count


@triton.jit
def _relu(x):
    """In fp32; NaN stays, as in PyTorch: a run that has gone wrong has to show it."""
    return tl.maximum(x.to(tl.float32), 0.0, tl.PropagateNan.ALL)


@triton.jit
def relu_squared_forward(x, y, count, BLOCK: tl.constexpr):
    """One program, BLOCK values: grid (cdiv(count, BLOCK),). It alone writes these of y."""
    cells, inside = _cells(count, BLOCK)
    positive = _relu(tl.load(x + cells, mask=inside, other=0.0))
    tl.store(y + cells, (positive * positive).to(y.dtype.element_ty), mask=inside)


@triton.jit
def relu_squared_backward(dy, x, dx, count, BLOCK: tl.constexpr):
    """One program, BLOCK values: grid (cdiv(count, BLOCK),). It alone writes these of dx."""
    cells, inside = _cells(count, BLOCK)
    positive = _relu(tl.load(x + cells, mask=inside, other=0.0))
    slope = 2 * positive * tl.load(dy + cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + cells, slope.to(dx.dtype.element_ty), mask=inside)


@torch.library.custom_op("gpt2::relu_squared_forward", mutates_args=())
def _forward(x: Tensor) -> Tensor:
    y, count = _forward_outputs(x), x.numel()
    tile = tiles.pick("relu_squared_forward", tiles.arch(x.device), 1)
    if count:
        launcher.launch(relu_squared_forward, (tiles.cdiv(count, tile.n),),
            x.contiguous(), y, count, BLOCK=tile.n, num_warps=tile.warps
        )
    return y


@_forward.register_fake
def _forward_outputs(x):
    return x.new_empty(x.shape)


@torch.library.custom_op("gpt2::relu_squared_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor) -> Tensor:
    dx, count = _backward_outputs(dy, x), x.numel()
    tile = tiles.pick("relu_squared_backward", tiles.arch(x.device), 1)
    if count:
        launcher.launch(relu_squared_backward, (tiles.cdiv(count, tile.n),),
            dy.contiguous(), x.contiguous(), dx, count, BLOCK=tile.n, num_warps=tile.warps
        )
    return dx


@_backward.register_fake
def _backward_outputs(dy, x):
    return x.new_empty(x.shape)


def _remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dy):
    return torch.ops.gpt2.relu_squared_backward(dy, *ctx.saved_tensors)


_forward.register_autograd(_gradient, setup_context=_remember)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2. (..., C) -> (..., C), in x's dtype: bf16, fp16 or fp32, ValueError for another.

    Defined by kernels/reference.py.
    """
    tiles.check_dtype("relu_squared", x.dtype)
    return torch.ops.gpt2.relu_squared_forward(x)
