"""The validation loss: the same tokens at every evaluation, on any number of ranks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from data.loader import Stream, validation_batch
from kernels.constants import IGNORE
from launch.world import World
from model.gpt2 import GPT


@torch.no_grad()
def validation_loss(
    model: GPT, stream: Stream, sequences: int, micro_batch: int, world: World,
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss in nats a token over the first `sequences` sequences of T = n_ctx tokens.

    `stop` is asked between batches on all ranks; where it says so the answer is None.

    Rank r takes every size-th of them; the last batch is filled up with targets that count for
    nothing, so every batch has one shape and a compiled model is compiled once. Losses are summed,
    not averaged by batch, so the batch size and the number of ranks don't matter.
    """
    T = model.config.n_ctx
    mine = range(world.rank, sequences, world.size)
    longest = -(-sequences // world.size)  # of any rank: all take as many batches
    total, count = 0.0, 0.0
    for start in range(0, longest, micro_batch):
        numbers = list(mine[start : start + micro_batch])
        rows = validation_batch(stream, T, numbers) if numbers else torch.zeros(0, T + 1).long()
        fill = (0, 0, 0, micro_batch - len(numbers))
        idx = F.pad(rows[:, :-1], fill).to(world.device)  # (B, T)
        targets = F.pad(rows[:, 1:], fill, value=IGNORE).to(world.device)  # (B, T)
        total += model(idx, targets, reduction="sum").item()
        count += len(numbers) * T
        if stop():
            return None
    total, count = world.sum(total, count)
    return total / count
