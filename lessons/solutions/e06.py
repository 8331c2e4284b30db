"""Solutions of lesson 6."""

import torch
from torch import Tensor


def flatten_consecutive(x: Tensor, n: int) -> Tensor:
    N, T, C = x.shape
    if T == n:
        return x.reshape(N, n * C)
    return x.reshape(N, T // n, n * C)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])  # (N T, C)
    return rows.mean(0), rows.var(0)


def dilated(x: Tensor, weights: list[Tensor]) -> Tensor:
    for i, W in enumerate(weights):
        apart = 2**i
        pairs = torch.cat([x[:-apart], x[apart:]], 1)  # (T - apart, 2 C): the older, the newer
        x = torch.tanh(pairs @ W)
    return x


def next_output(x: Tensor, memory: list[list[Tensor]], weights: list[Tensor]) -> Tensor:
    for inputs, W in zip(memory, weights, strict=True):
        inputs.append(x)
        x = torch.tanh(torch.cat([inputs.pop(0), x]) @ W)
    return x
