"""Running the program as a user does, and reading what it leaves."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file

from launch.cli import as_flags
from launch.tracker import read_rows
from train_gpt2 import TrainConfig

ROOT = Path(__file__).parent.parent


def flags(config: TrainConfig) -> list[str]:
    """The command line that asks for this configuration."""
    return as_flags(asdict(config))


def environment(**more: str) -> dict[str, str]:
    """One thread a process; kernel tests in this process may have asked for the interpreter."""
    own = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more


def run_program(
    arguments: list[str], ranks: int = 1, timeout: float = 120
) -> subprocess.CompletedProcess:
    """train_gpt2.py in a process of its own, under torchrun where ranks > 1."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*start, str(ROOT / "train_gpt2.py"), *arguments],
        capture_output=True, text=True, timeout=timeout, env=environment(), cwd=ROOT,
    )


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, train loss) of every training row."""
    rows = read_rows(run / "metrics.jsonl")
    return [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]


def weights(run: Path, step: int) -> dict:
    """The weights of a run's checkpoint."""
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def run_several(
    configs: list[TrainConfig], folder: Path, ranks: int, timeout: float = 240, **more: str
) -> subprocess.CompletedProcess:
    """tests/several.py: these runs one after the other, under one torchrun."""
    listed = folder / f"several-{ranks}.json"
    listed.write_text(json.dumps([flags(config) for config in configs]))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={ranks}", "-m", "tests.several", str(listed)],
        capture_output=True, text=True, timeout=timeout, env=environment(**more), cwd=ROOT,
    )
