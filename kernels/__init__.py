"""GPT-2's three expensive operators, each behind one signature, whatever computes it.

    ops = kernels.operators("auto", torch.device("cuda"))
    y = ops.attention(qkv, n_head)                            # (B, T, 3C) -> (B, T, C)
    x, y = ops.layer_norm(x, weight, bias, branch)            # x + branch, LayerNorm(x + branch)
    loss = ops.linear_cross_entropy(h, wte, targets, vocab)   # (N, C) -> scalar

kernels/reference.py defines what each computes.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from kernels import reference

Choice = Literal["auto", "triton", "torch"]


class Operators(NamedTuple):
    """The three operators of one implementation; signatures as in kernels/reference.py."""

    attention: Callable
    layer_norm: Callable
    linear_cross_entropy: Callable


TORCH = Operators(reference.attention, reference.layer_norm, reference.linear_cross_entropy)


def operators(choice: Choice, device: torch.device) -> Operators:
    """The operators for this device."""
    return TORCH
