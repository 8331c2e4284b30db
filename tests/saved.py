"""A run folder with checkpoints of a tiny model, for the tests of what writes and reads them."""

import json
from pathlib import Path

import torch

from model.gpt2 import GPT, GPTConfig
from model.optim import LossScaler, OptimConfig, configure_optimizers
from model.parallel import ParallelModel
from model.saving import Saver
from model.train_state import TrainState
from tests.running import ALONE, Silent

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=16)


def trained(seed: int = 0) -> TrainState:
    """After two steps."""
    torch.manual_seed(seed)
    model = ParallelModel(GPT(CONFIG), "ddp", ALONE, "fp32")
    optimizer = configure_optimizers(model, OptimConfig())
    idx = torch.randint(50257, (2, 17))
    for _ in range(2):
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        model.zero_grad()
    return TrainState(model, optimizer, LossScaler.of("fp16"))


def progress(step):
    return {"step": step, "tokens": step * 32, "skipped": []}


def save(run, step, state, keep=3):
    Saver(run, state, Silent(), keep).save(step, progress(step), wait=True)


def names(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def make_run(folder: Path) -> None:
    """A run with checkpoints of steps 1 and 2."""
    config = {"config": {"model": vars(CONFIG)}}
    (folder / "config.json").write_text(json.dumps(config))
    for step in (1, 2):
        save(folder, step, trained(step))


def truncate(folder: Path) -> str:
    """Damages a checkpoint; what will be said of it."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "model.safetensors has"
