"""Lesson 10, solved."""

import math
from collections.abc import Iterable
from contextlib import nullcontext

from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel as DDP


def parameters(n_layer: int, n_embd: int, n_ctx: int, n_vocab: int) -> int:
    """Embeddings, then blocks, then the last LayerNorm."""
    C = n_embd
    attention = C * 3 * C + 3 * C + C * C + C  # c_attn, c_proj
    mlp = C * 4 * C + 4 * C + 4 * C * C + C  # c_fc, c_proj
    block = attention + mlp + 2 * 2 * C  # two LayerNorms of weight and bias
    return (n_vocab + n_ctx) * C + n_layer * block + 2 * C


def init_std(name: str, n_layer: int) -> float:
    """Two writers a block."""
    if name.endswith("c_proj.weight"):
        return 0.02 / math.sqrt(2 * n_layer)
    return 0.02


def rows(tokens: Tensor, step: int, rank: int, ranks: int, B: int, T: int) -> tuple[Tensor, Tensor]:
    """One token more than inputs: the last target."""
    start = (step * ranks + rank) * B * T
    piece = tokens[start : start + B * T + 1]
    return piece[:-1].view(B, T), piece[1:].view(B, T)


def get_lr(step: int, steps: int, warmup: int, peak: float, final: float) -> float:
    """A line, then half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))


def decayed(parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
    """By axes, not by name: a LayerNorm's weight is called weight too."""
    return [name for name, parameter in parameters if parameter.dim() == 2]


def accumulate(model: Module, micro_batches: Tensor) -> float:
    """DDP looks at its switch in the forward pass, where it prepares the backward pass: the switch
    has to be set before. Set after it, as in the film, each value reaches the next micro-step: the
    first one's gradients are averaged alone, and the others never. (A model without DDP has nothing
    to average.)"""
    mean = 0.0
    for i, tokens in enumerate(micro_batches):
        more = i < len(micro_batches) - 1
        with model.no_sync() if isinstance(model, DDP) and more else nullcontext():
            loss = model(tokens[:, :-1], tokens[:, 1:]) / len(micro_batches)
            loss.backward()
        mean += loss.item()
    return mean
