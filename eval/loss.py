"""The validation loss: the same tokens at every evaluation, on any number of ranks."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from data.chat import inputs_and_targets
from data.loader import Stream, validation_batch
from kernels.constants import IGNORE
from launch.errors import Failed
from launch.progress import track
from launch.world import World
from model.gpt2 import GPT


@torch.no_grad()
def validation_loss(
    model: GPT, stream: Stream, sequences: int, micro_batch: int, world: World,
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss in nats a token over the first `sequences` sequences of T = n_ctx tokens; of
    conversations, over what the assistant says.

    `stop` is asked between batches on all ranks; where it says so the answer is None. Raises Failed
    on all ranks where the loss is no number.

    Rank r takes every size-th of them; the last batch is filled up with targets that count for
    nothing, so every batch has one shape and a compiled model is compiled once. Losses are summed,
    not averaged by batch, so the batch size and the number of ranks don't matter.
    """
    T = model.config.n_ctx
    local = range(world.rank, sequences, world.size)
    longest = -(-sequences // world.size)  # of any rank: all take as many batches
    total, count = 0.0, 0.0
    for start in track(range(0, longest, micro_batch), "validation", "batch"):
        numbers = list(local[start : start + micro_batch])
        rows = torch.zeros(0, T + 1).long()
        if numbers:
            rows = validation_batch(stream, T, numbers)  # (B or fewer, T + 1)
        inputs, targets = inputs_and_targets(rows)  # each (B or fewer, T)
        fill = (0, 0, 0, micro_batch - len(numbers))
        idx = F.pad(inputs, fill).to(world.device)  # (B, T)
        targets = F.pad(targets, fill, value=IGNORE)  # (B, T)
        total += model(idx, targets.to(world.device), reduction="sum").item()
        count += int((targets != IGNORE).sum())
        if stop():
            return None
    total, count = world.all_reduce_sum(total, count)
    require_numbers([total])
    return total / count


def require_numbers(losses: list[float]) -> None:
    """Raises Failed where a loss is NaN or infinite.

    Every comparison with NaN is false, so a model of broken weights would get a score like any
    other: a quarter of HellaSwag's questions right.
    """
    if not all(math.isfinite(loss) for loss in losses):
        raise Failed("the model's losses are no numbers: its weights hold NaN or infinity, or "
                     "overflow in this number format (does --dtype fp32 give numbers?)")
