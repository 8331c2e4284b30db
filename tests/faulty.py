"""train_gpt2.py with a fault planted in it; the training loop knows nothing of this.

    FAULT='{"kind": "nan", "rank": 1, "step": 5}' torchrun ... -m tests.faulty FLAGS

kinds: nan (the rank's loss is no number in this step), stop (SIGSTOP: the rank hangs), full (the
disk takes no file of more than 1 MB while this step's checkpoint is written), late (the rank looks
at the run's folder when another has changed it), poison (these batches give a loss that is no
number, on every rank and as often as they come), data (the rank's data can't be read). "late": the
device decides whether a step is applied, and the host hears of it a step late. Steps count from 1;
a fault happens in the first process that gets there and not again after a restart.
"""

import json
import os
import resource
import signal

import torch

import train_gpt2
from data.loader import Loader
from launch import cli
from launch.errors import BadInput, exit_process, one_line_errors
from model.parallel import ParallelModel
from model.saving import Saver
from train_gpt2 import PRESETS, TrainConfig, train

FAULT = json.loads(os.environ.get("FAULT", "{}"))
FIRST_START = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
now = {"step": 0, "faults": 0}


def happens() -> bool:
    """Whether the fault is due; it is so once."""
    due = (
        FIRST_START
        and not now["faults"]
        and FAULT.get("step") == now["step"]
        and FAULT.get("rank", 0) == int(os.environ.get("RANK", "0"))
    )
    now["faults"] += due
    return due


def plant() -> None:
    """Puts the fault where it belongs."""
    rate, call = train_gpt2.get_lr, ParallelModel.__call__

    def counting(step, *rest):
        now["step"] = step + 1
        if FAULT["kind"] == "stop" and happens():
            signal.raise_signal(signal.SIGSTOP)
        return rate(step, *rest)

    def broken(self, *batch):
        loss = call(self, *batch)
        return loss * torch.nan if FAULT["kind"] == "nan" and happens() else loss

    train_gpt2.get_lr, ParallelModel.__call__ = counting, broken
    if FAULT["kind"] == "full":
        plant_full_disk()
    if FAULT["kind"] == "data":
        plant_damage()
    if FAULT.get("late"):
        train_gpt2.device_decides = lambda *_: True
    if FAULT["kind"] == "poison":
        plant_poison(FAULT["batches"])
    if FAULT["kind"] == "late" and FAULT["rank"] == int(os.environ["RANK"]):
        train_gpt2.was_stopped = lambda run: False


def plant_full_disk() -> None:
    """From this step's save to the next, both of which wait for the checkpoint before them."""
    begin = Saver._begin
    limits: list[tuple[int, int]] = []

    def limited(self, *given) -> None:
        if limits:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits.pop())
        elif happens():
            limits.append(resource.getrlimit(resource.RLIMIT_FSIZE))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[0][1]))
        begin(self, *given)

    Saver._begin = limited


def plant_damage() -> None:
    """A shard of the rank's is found to be damaged, in a step."""
    get_batch = Loader.get_batch

    def damaged(self, step):
        now["step"] = step + 1
        if happens():
            raise BadInput("toy_train_000001.bin is damaged")
        return get_batch(self, step)

    Loader.get_batch = damaged


def plant_poison(batches: list[int]) -> None:
    """Their loss is no number."""
    read, call, coming = Loader.try_get_batch, ParallelModel.__call__, [0]

    def counting(self, step):
        coming[0] = self._batch_number(step)
        return read(self, step)

    def poisoned(self, *batch):
        loss = call(self, *batch)
        return loss * torch.nan if coming[0] in batches else loss

    Loader.try_get_batch, ParallelModel.__call__ = counting, poisoned


if __name__ == "__main__":
    torch.set_num_threads(1)
    if FAULT:
        plant()
    with one_line_errors():
        exit_process(train(cli.parse(TrainConfig, PRESETS)))
