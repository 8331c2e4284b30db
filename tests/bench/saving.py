"""A checkpoint of GPT-2 124M and its optimizer, 1.5 GB: how long training waits for it.

    python -m tests.bench saving

The plain way is torch.save of a dict of state dicts. Ours waits for the copy into memory; the file
is written, flushed and hashed while training goes on, and no turn begins before it is.
"""

import itertools
import time
from functools import partial

import torch

from launch.world import keep_freed_memory
from model.config import GPTConfig, OptimConfig
from model.gpt2 import GPT
from model.optim import LossScaler, configure_optimizers
from model.parallel import ParallelModel
from model.saving import Saver
from model.train_state import TrainState
from tests.bench.pairs import Done, Row, Work, scratch
from tests.bench.training import QUICK
from tests.running import ALONE, Silent


def rows(quick: bool = False) -> list[Row]:
    """The table's rows of checkpoints."""
    config, name = (QUICK, "quick") if quick else (GPTConfig(), "124M")
    return [Row(f"saving {name}: training waits", "saves", partial(torch_save, config),
                partial(ours, config), by_cpu=False)]


def state_of(config: GPTConfig) -> TrainState:
    """A model with its moments."""
    model = ParallelModel(GPT(config), "ddp", ALONE, "fp32")
    return TrainState(model, configure_optimizers(model, OptimConfig()), LossScaler())


def torch_save(config: GPTConfig) -> Work:
    """The plain way."""
    state = state_of(config)
    folder = scratch()

    def work() -> Done:
        states = {"model": state.model.module.state_dict(),
                  "optimizer": [*state.optimizer.state.values()]}
        torch.save(states, folder / "ckpt.pt")
        return Done(1)

    return work


def ours(config: GPTConfig) -> Work:
    """As train_gpt2.py does it: save() is timed, and what follows in its thread is not."""
    keep_freed_memory()
    run = scratch()
    (run / "config.json").write_text("{}")
    saver = Saver(run, state_of(config), Silent(), keep=1)  # type: ignore[arg-type]
    steps = itertools.count(1)

    def work() -> Done:
        step = next(steps)
        began = time.perf_counter()
        saver.save(step, {"step": step, "tokens": 0}, wait=False)
        stalled = time.perf_counter() - began
        saver.wait()
        return Done(1, seconds=stalled)

    return work
