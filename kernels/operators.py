"""Who computes the expensive operators of our networks: plain PyTorch, or Triton.

    ops = operators.choose("auto", torch.device("cuda"))
    y = ops.attention(qkv, n_head)                            # (B, T, 3C) -> (B, T, C)
    x, y = ops.layer_norm(x, weight, bias, branch)            # x + branch, LayerNorm(x + branch)
    loss = ops.linear_cross_entropy(h, wte, targets, vocab)   # (N, C) -> scalar
    x, head = ops.embedding(idx, wte, wpe, order)             # (B, T) -> (B, T, C); wte once more

two that GPT-2 itself has no use for, qk_norm_rotary and relu_squared, and two that text is drawn
with, decode_attention and draw.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from kernels import reference
from kernels.constants import Choice


class Operators(NamedTuple):
    """The operators of one implementation; signatures as in kernels/reference.py."""

    attention: Callable
    layer_norm: Callable
    linear_cross_entropy: Callable
    # Of model/speedrun.py's network.
    qk_norm_rotary: Callable = reference.qk_norm_rotary
    relu_squared: Callable = reference.relu_squared
    embedding: Callable = reference.embedding
    # Of drawing text (model/generate.py); no gradients.
    decode_attention: Callable = reference.decode_attention
    draw: Callable = reference.draw


TORCH = Operators(reference.attention, reference.layer_norm, reference.linear_cross_entropy)


def choose(
    choice: Choice,
    device: torch.device,
    head_width: int | None = None,
    weights: torch.dtype = torch.float32,
) -> Operators:
    """The operators for this device, these weights, and attention heads of this width if given.

    "torch" is the reference. "triton" is the kernels, or a ValueError that says in one line why
    they cannot run here. "auto" and "fastest" are the kernels on a GPU that can run them, else the
    reference.
    """
    if choice == "torch":
        return TORCH
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    obstacle = _obstacle(device, head_width, weights, interpreted)
    if choice != "triton" and (obstacle or interpreted):  # the interpreter is for tests: asked for
        return TORCH
    if obstacle:
        raise ValueError(f"--kernels triton: {obstacle}")
    from kernels.attention import attention
    from kernels.cross_entropy import linear_cross_entropy
    from kernels.decode_attention import decode_attention
    from kernels.draw import draw
    from kernels.embedding import embedding
    from kernels.layernorm import layer_norm
    from kernels.qk_norm_rotary import qk_norm_rotary
    from kernels.relu_squared import relu_squared

    return Operators(attention, layer_norm, linear_cross_entropy, qk_norm_rotary, relu_squared,
                     embedding, decode_attention, draw)


def by_reference(ops: Operators) -> list[str]:
    """Which operators are the reference's."""
    return [name for name in ops._fields if getattr(ops, name) is getattr(TORCH, name)]


def without(ops: Operators, names: Iterable[str]) -> Operators:
    """The same with the reference's in the place of these."""
    return ops._replace(**{name: getattr(TORCH, name) for name in names})


def _obstacle(
    device: torch.device, head_width: int | None, weights: torch.dtype, interpreted: bool
) -> str | None:
    """Why the kernels cannot run here and what to do about it, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install triton`, or use --kernels torch"
    if head_width is not None and head_width not in (64, 128):
        return f"attention heads are 64 or 128 wide, not {head_width}: use --kernels torch"
    if weights == torch.float64:
        return "the kernels compute in bf16, fp16 and fp32, not in fp64: use --kernels torch"
    if device.type == "cuda":
        if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
            return "the GPU is older than sm_80 (A100, RTX 30): use --kernels torch"
    elif not interpreted:
        return (
            f"no GPU ({device.type}): set TRITON_INTERPRET=1 to interpret, or use --kernels torch"
        )
    return None
