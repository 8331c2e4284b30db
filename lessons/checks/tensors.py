"""Tensors to ask with, and tensors that come back: in fp64, within 1e-12."""

from typing import Any

import torch
from torch import Tensor

from lessons.checks import expect_shape
from lessons.course import Wrong

ROUNDING = 1e-12  # fp64 rounds by 1e-16; sums of some hundred numbers below 10


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """From a normal distribution, always the same."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def expect_tensor(what: str, seen: Any, right: Tensor, mistakes: dict[str, Tensor]) -> None:
    """Raises Wrong unless `seen` is the right tensor, and says which mistake gives what it is.

    mistakes: what was done wrong -> the tensor which that gives.
    """
    if isinstance(seen, Tensor) and seen.shape == right.shape:
        off = (seen - right).abs().max().item()
        if off <= ROUNDING:
            return
        line = f"{what} is off by {off:.2g}, and may be by {ROUNDING}"
    else:
        line = what
    for mistake, wrong in mistakes.items():
        same_shape = isinstance(seen, Tensor) and seen.shape == wrong.shape
        if same_shape and (seen - wrong).abs().max().item() <= ROUNDING:
            raise Wrong(f"{line}: {mistake}")
    expect_shape(what, seen, tuple(right.shape))
    raise Wrong(line)
