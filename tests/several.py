"""Several runs, one after the other, in the processes of one torchrun: starting them costs most.

    torchrun --standalone --nproc_per_node=2 -m tests.several CONFIGS.json

CONFIGS.json: a list of the flags of each run. STOP_AT=N in the environment: rank 1 gets a SIGTERM
in step N. PRETEND_LOCAL_WORLD_SIZE=N: the ranks are told that a node has N of them. BY_HAND=1:
blocks have their backward pass by hand, as on a GPU, out of the reference's passes.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

import train_gpt2
from kernels.passes import REFERENCE
from launch import cli
from launch.errors import exit_process, one_line_errors
from launch.world import World, init_distributed
from model import training
from train_gpt2 import PRESETS, TrainConfig, train


class Kept(World):
    """Lasts through all runs: a group can't be left and joined again under one torchrun."""

    def destroy(self) -> None:
        pass


def stop_at(step: int) -> None:
    """Has rank 1 signalled while it is in this step, counted from 1."""
    original = train_gpt2.get_lr

    def signalled(now, *rest):
        if now == step - 1 and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        return original(now, *rest)

    train_gpt2.get_lr = signalled


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = os.environ.get(
        "PRETEND_LOCAL_WORLD_SIZE", os.environ["LOCAL_WORLD_SIZE"]
    )
    if "BY_HAND" in os.environ:
        training.blocks_by_hand = lambda *_: True
        training.triton_passes = lambda: REFERENCE
    if "STOP_AT" in os.environ:
        stop_at(int(os.environ["STOP_AT"]))
    world = init_distributed()
    kept = Kept(world.rank, world.size, world.device)
    train_gpt2.init_distributed = lambda deterministic: kept
    with one_line_errors():
        for flags in json.loads(Path(sys.argv[1]).read_text()):
            code = train(cli.parse(TrainConfig, PRESETS, flags))
            if code:
                exit_process(code)
        world.destroy()
        exit_process(0)
