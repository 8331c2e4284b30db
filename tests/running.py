"""Running the program as a user does, and reading what it leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from launch.cli import as_flags
from launch.tracker import read_rows
from launch.world import World
from model.gpt2 import GPTConfig
from train_gpt2 import TrainConfig

ROOT = Path(__file__).parent.parent
ALONE = World(0, 1, torch.device("cpu"))
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=32)  # of the model that tests judge


class Silent:
    """A tracker that keeps nothing."""

    world = ALONE

    def log(self, step: int, **values: object) -> None:
        pass


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


def same_weights(one: Path, two: Path, step: int) -> bool:
    """Bit for bit, in the checkpoints of two runs."""
    a, b = weights(one, step), weights(two, step)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def events(run: Path) -> list[str]:
    """What a run wrote down of what happened to it."""
    return [row["event"] for row in read_rows(run / "metrics.jsonl") if "event" in row]


def run_several(
    configs: list[TrainConfig], folder: Path, ranks: int, timeout: float = 200, **more: str
) -> subprocess.CompletedProcess:
    """tests/several.py: these runs one after the other, under one torchrun."""
    listed = folder / f"several-{ranks}.json"
    listed.write_text(json.dumps([flags(config) for config in configs]))
    code, printed = wait_for_ranks(subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={ranks}", "-m", "tests.several", str(listed)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=environment(PYTHONFAULTHANDLER="1", **more),
    ), timeout)
    return subprocess.CompletedProcess([], code, printed, printed)


def wait_for_ranks(
    process: subprocess.Popen, timeout: float, ranks: list[int] | None = None
) -> tuple[int, str]:
    """Exit code and output of a torchrun; one that hangs is a failure that shows its stacks.

    ranks: its workers, where it may be dead, and they would still hold its output.
    """
    try:
        printed = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        for pid in children(process.pid) or ranks or []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
        process.terminate()
        stacks = process.communicate(timeout=60)[0]
        raise AssertionError(f"hung for {timeout:.0f} s:\n{stacks}") from None
    return process.returncode, printed


def children(pid: int) -> list[int]:
    """Process numbers of a process's children, in the order they were started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(number) for number in path.read_text().split()] if path.exists() else []


def start(config: TrainConfig, ranks: int, restarts: int = 0, **more: str) -> subprocess.Popen:
    """tests/faulty.py under torchrun, as launch/torchrun.sh starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.1",
         "-m", "tests.faulty", *flags(config)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
                        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2", PYTHONFAULTHANDLER="1", **more),
    )


def run(config: TrainConfig, ranks: int, restarts: int = 0, **more: str) -> tuple[int, str]:
    """The exit code and everything that was printed. A hang is what takes longer than 4 seconds a
    step (0.1 on two idle cores) and two minutes to start in."""
    return wait_for_ranks(start(config, ranks, restarts, **more), timeout=120 + 4 * config.steps)
