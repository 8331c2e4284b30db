"""How long a checkpoint stops training: ours against torch.save, GPT-2 124M and its optimizer.

    python -m tests.baseline_saving [ROUNDS] [FOLDER]

Both write 1.5 GB (fp32 weights and two moments). torch.save as nanoGPT does it: a dict of state
dicts, training waits for it. Ours: training waits for the copy into memory. Medians of the rounds
after the first, which pays for fresh memory.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from launch.world import keep_freed_memory
from model.gpt2 import GPT, GPTConfig
from model.optim import LossScaler, OptimConfig, configure_optimizers
from model.parallel import ParallelModel
from model.saving import Saver
from model.train_state import TrainState
from tests.running import ALONE, Silent


def main(rounds: int, folder: Path) -> None:
    keep_freed_memory()
    model = ParallelModel(GPT(GPTConfig()), "ddp", ALONE, "fp32")
    state = TrainState(model, configure_optimizers(model, OptimConfig()), LossScaler())
    (folder / "config.json").write_text("{}")
    saver = Saver(folder, state, Silent(), keep=1)  # type: ignore[arg-type]
    stalls, wholes, blocking = [], [], []
    for step in range(rounds + 1):
        began = time.perf_counter()
        saver.save(step, {"step": step, "tokens": 0}, wait=False)
        stalls.append(time.perf_counter() - began)
        saver.wait()
        wholes.append(time.perf_counter() - began)
        began = time.perf_counter()
        states = {"model": model.module.state_dict(), "optimizer": state.optimizer.state_dict()}
        torch.save(states, folder / "ckpt.pt")
        blocking.append(time.perf_counter() - began)
    ours, theirs = statistics.median(stalls[1:]), statistics.median(blocking[1:])
    print(f"ours: training stalls {ours:.2f} s (the first time {stalls[0]:.2f} s), on the disk, "
          f"flushed and hashed after {statistics.median(wholes[1:]):.2f} s")
    print(f"torch.save: training stalls {theirs:.2f} s, {theirs / ours:.1f} times as long")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as made:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, Path(made))
