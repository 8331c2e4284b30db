"""How cost grows: a picture and a verdict for each thing that a run may have more of.

    make bench ARGS=growth          # runs/bench/growth_*.png and growth.json

On a CPU, with a network of 4 layers and 256 wide: a training step against T, batch, width and
threads (time and peak memory); the loader against the number of shards; HellaSwag against the
number of questions; a checkpoint against its size. Every point has a process of its own. A verdict
says how straight the points lie in log-log, and with which slope: 1 where twice as much costs
twice as much. Where they aren't straight it says why that is to be expected.
"""

import itertools
import json
import math
import os
import resource
import statistics
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.loader import Loader
from data.shard_file import shard_bytes
from data.shards import open_folder
from data.stream import Stream
from model.config import GPTConfig
from model.saving import Saver
from tests.bench import hellaswag
from tests.bench.pairs import Done, Way, Work, scratch
from tests.bench.saving import state_of
from tests.bench.training import our_steps
from tests.running import Silent

GROWTH = "growth"
TURNS = 3  # of each point, after one that warms up
STRAIGHT = math.log10(1.25)  # points that lie this near to their line are called straight
BASE = GPTConfig(n_layer=4, n_head=4, n_embd=256, n_ctx=128)


@dataclass(frozen=True)
class Curve:
    """What is measured against what. make(x) prepares one point; why: what bends the curve."""

    name: str
    x: str
    values: tuple[int, ...]
    make: Callable[[int], Work]
    why: str
    memory: bool = False  # peak memory is drawn too


@dataclass(frozen=True)
class Measured:
    """A curve's points: the median seconds, and the peak memory in MiB."""

    name: str
    x: str
    values: list[int]
    seconds: list[float]
    mib: list[float]
    verdict: str
    memory_verdict: str


def curves(quick: bool = False) -> list[Curve]:
    """All there are; quick: three points of each, and small ones."""
    few = 3 if quick else None
    cores = os.cpu_count() or 1
    found = [
        Curve("context", "T, one sequence", (128, 256, 512, 1024, 2048, 4096)[:few], against_T,
              "products grow with T and attention with T^2, which wins in the end", True),
        Curve("batch", "sequences of 128 tokens", (1, 2, 4, 8, 16, 32)[:few], against_batch,
              "a step has a part that no batch changes: the update of the weights, which reads "
              "and writes all of them", True),
        Curve("width", "C", (64, 128, 256, 512, 1024)[:few], against_width,
              "the head's V C comes before the blocks' C^2, and narrow products are slow", True),
        Curve("threads", "threads", tuple(range(1, cores + 1)), against_threads,
              "threads share memory and caches, and others may use the cores"),
        Curve("loader", "shards of 4,096 tokens", (1, 10, 100, 1000)[:few], against_shards,
              "up to some hundred shards the fixed part of a batch is more than opening them"),
        Curve("evaluation", "questions", (2, 8, 32, 128)[:few], against_questions,
              "few questions don't fill a packed row, so that they cost less than their share"),
        Curve("checkpoint", "millions of parameters", (1, 4, 16, 64)[:few], against_size,
              "small files cost what opening, flushing and renaming cost"),
    ]
    return found


def draw_all(out: Path, quick: bool) -> list[Measured]:
    """Measures and draws every curve; prints the verdicts."""
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for curve in curves(quick):
        print(f"{curve.name} ...", flush=True)
        one = measure(curve)
        draw(one, out / f"growth_{curve.name}.png")
        print(f"  time: {one.verdict}")
        if one.memory_verdict:
            print(f"  memory: {one.memory_verdict}")
        found.append(one)
        (out / "growth.json").write_text(
            json.dumps([asdict(measured) for measured in found], indent=1) + "\n")
    return found


def measure(curve: Curve) -> Measured:
    """Every point of a curve, each in a process of its own."""
    seconds, mib = [], []
    for value in curve.values:
        way = Way(partial(curve.make, value))
        try:
            way.turn()
            turns = [way.turn() for _ in range(TURNS)]
        finally:
            way.close()
        seconds.append(statistics.median(turn.seconds for turn in turns))
        mib.append(turns[-1].value)
    return Measured(curve.name, curve.x, list(curve.values), seconds, mib,
                    judge(curve.values, seconds, curve.why),
                    judge(curve.values, mib, "PyTorch itself and the weights take memory that "
                          "doesn't grow") if curve.memory else "")


def judge(xs: tuple[int, ...] | list[int], ys: list[float], why: str) -> str:
    """The verdict on points (x, y): their slope in log-log, and whether they are straight."""
    if len(xs) < 2:
        return "one point says nothing of growth"
    x, y = np.log10(np.array(xs, float)), np.log10(np.array(ys, float))
    slope, offset = np.polyfit(x, y, 1)
    if np.abs(y - (slope * x + offset)).max() <= STRAIGHT:
        return f"straight in log-log with slope {slope:.2f}"
    steps = np.diff(y) / np.diff(x)
    return (f"not straight: the slope is {steps[0]:.2f} at the small end and {steps[-1]:.2f} at "
            f"the large one. What bends it by nature: {why}")


def draw(one: Measured, path: Path) -> None:
    """A PNG: time, and memory where it was asked for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("seconds", one.seconds, one.verdict)]
    if one.memory_verdict:
        panels.append(("peak memory, MiB", one.mib, one.memory_verdict))
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for axis, (label, values, verdict) in zip(axes[0], panels, strict=True):
        axis.loglog(one.values, values, "o-")
        axis.set(xlabel=one.x, ylabel=label)
        axis.set_title("\n".join(wrapped(verdict)), fontsize=9)
        axis.grid(True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def wrapped(text: str, width: int = 70) -> list[str]:
    """In lines that fit over a picture."""
    return textwrap.wrap(text, width)


# ---- one point of each curve ----

def peak_mib() -> float:
    """The most memory that this process has had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def with_memory(work: Work) -> Work:
    """The same, whose value is the peak memory."""
    def and_look() -> Done:
        done = work()
        return Done(done.work, peak_mib(), done.seconds)

    return and_look


def against_T(T: int) -> Work:
    """A training step on one sequence."""
    return with_memory(our_steps(GPTConfig(4, 4, 256, T), 1, T, "fp32"))


def against_batch(B: int) -> Work:
    """A training step on B sequences."""
    return with_memory(our_steps(BASE, B, BASE.n_ctx, "fp32"))


def against_width(C: int) -> Work:
    """A training step of a network C wide."""
    return with_memory(our_steps(GPTConfig(4, C // 64, C, 128), 4, 128, "fp32"))


def against_threads(threads: int) -> Work:
    """A training step with so many threads."""
    torch.set_num_threads(threads)
    return with_memory(our_steps(BASE, 8, BASE.n_ctx, "fp32"))


def against_shards(count: int) -> Work:
    """Opens a folder of so many shards, and takes ten batches."""
    folder = scratch()
    tokens = np.arange(50256 - 4095, 50257).astype(np.uint16)  # up to GPT-2's last
    for number in range(count + 1):  # the first is for validation
        kind = "train" if number else "val"
        (folder / f"made_{kind}_{number:06d}.bin").write_bytes(shard_bytes(tokens))

    def work() -> Done:
        shards, _, _ = open_folder(folder)
        loader = Loader(Stream(shards), T=256, batch_tokens=2048, micro_batch=8, seed=1)
        for step in range(10):
            loader.get_batch(step)
        loader.close()
        return Done(1, peak_mib())

    return work


def against_questions(count: int) -> Work:
    """HellaSwag with so many questions."""
    return with_memory(hellaswag.packed(BASE, "fp32", count))


def against_size(millions: int) -> Work:
    """A whole checkpoint, on the disk, flushed and hashed, of about so many parameters."""
    width = 64 * round(math.sqrt(millions * 1e6 / 48) / 64 + 0.5)
    folder = scratch()
    (folder / "config.json").write_text("{}")
    state = state_of(GPTConfig(4, width // 64, width, 128, 1000))
    saver = Saver(folder, state, Silent(), keep=1)  # type: ignore[arg-type]
    steps = itertools.count(1)

    def work() -> Done:
        saver.save(next(steps), {"step": 1, "tokens": 0}, wait=True)
        return Done(1, peak_mib())

    return work
