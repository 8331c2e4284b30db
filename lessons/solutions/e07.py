"""Lesson 7, solved. The questions stand in lessons/exercises/e07.py."""

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from model.gpt2 import GPT, GPTConfig

SYMBOLS = "0123456789+="  # number of a symbol: its place here
QUESTION = 6  # symbols of "ab+cd="


def all_heads(qkv: Tensor, n_head: int) -> Tensor:
    B, T, C3 = qkv.shape
    qkv = qkv.view(B, T, 3, n_head, -1)  # (B, T, 3C) -> (B, T, 3, H, D)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    scores = q @ k.mT * q.shape[-1] ** -0.5  # (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    y = scores.masked_fill(future, -torch.inf).softmax(-1) @ v  # (B, H, T, D)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)  # heads side by side


def write_sum(a: int, b: int) -> str:
    digits = f"{a + b:03}"
    return f"{a:02}+{b:02}={digits[::-1]}"


def answer_targets(rows: Tensor) -> Tensor:
    targets = rows[:, 1:].clone()  # what follows each symbol but the last
    targets[:, : QUESTION - 1] = -100  # position QUESTION - 1, the "=", foretells the first digit
    return targets


def exact_match(answers: list[str], sums: list[str]) -> float:
    right = [answer == written[QUESTION:] for answer, written in zip(answers, sums, strict=True)]
    return sum(right) / len(right)


def fit(
    model: GPT, steps: int, lr: float, warm_up: int, loss_of_a_batch: Callable[[], Tensor]
) -> list[float]:
    """AdamW; lr rises over warm_up steps and falls along a cosine to a tenth. The losses."""
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    losses = []
    for step in range(steps):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        share = min(1, (step + 1) / warm_up) * cosine
        optimizer.param_groups[0]["lr"] = lr * share
        loss = loss_of_a_batch()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


def adder(sums: list[str], seed: int = 3, steps: int = 500):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=64, n_ctx=10, n_vocab=len(SYMBOLS)))
    rows = torch.tensor([[SYMBOLS.index(symbol) for symbol in written] for written in sums])

    def loss_of_a_batch() -> Tensor:
        x = rows[torch.randint(len(rows), (128,))]  # (B, 9)
        return model(x[:, :-1], answer_targets(x))

    fit(model, steps, 3e-3, 50, loss_of_a_batch)

    @torch.no_grad()
    def answer(questions: list[str]) -> list[str]:
        x = torch.tensor([[SYMBOLS.index(s) for s in question] for question in questions])
        for _ in range(3):
            likeliest = model(x)[:, -1].argmax(-1, keepdim=True)  # (B, 1)
            x = torch.cat([x, likeliest], 1)
        return ["".join(SYMBOLS[i] for i in row[QUESTION:]) for row in x.tolist()]

    return answer


def held_out(write, seed: int = 0) -> tuple[list[str], list[str]]:
    """9,000 sums to learn from and 1,000 others to be asked."""
    sums = [write(a, b) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(sums)
    return sums[1000:], sums[:1000]
