"""Lesson 3, solved."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def contexts(names: list[str], size: int) -> tuple[Tensor, Tensor]:
    rows, targets = [], []
    for name in names:
        row = [0] * size
        for letter in [ord(c) - ord("a") + 1 for c in name] + [0]:
            rows.append(row)
            targets.append(letter)
            row = row[1:] + [letter]
    return torch.tensor(rows), torch.tensor(targets)


def rates(count: int) -> Tensor:
    return 10 ** torch.linspace(-3, 0, count)


def start(generator: Generator) -> list[Tensor]:
    embedding = torch.randn(27, 10, generator=generator)
    W1 = torch.randn(30, 200, generator=generator) * 0.2  # tanh is not saturated
    W2 = torch.randn(200, 27, generator=generator) * 0.01  # logits near 0: p near 1 / 27
    return [embedding, W1, torch.zeros(200), W2, torch.zeros(27)]


def train(batches: Iterator[tuple[Tensor, Tensor]]) -> list[Tensor]:
    parameters = start(torch.Generator().manual_seed(1))
    for p in parameters:
        p.requires_grad_()
    embedding, W1, b1, W2, b2 = parameters
    for step, (x, y) in enumerate(batches):
        h = (embedding[x].view(-1, 30) @ W1 + b1).tanh()  # (32, 200)
        loss = F.cross_entropy(h @ W2 + b2, y)
        rate = 0.2 * (1 - step / 20_000) + 0.002
        for p, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= rate * slope
    return parameters
