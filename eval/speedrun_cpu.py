"""How much sooner the speedrun has a faithful GPT-2's loss, measured on a CPU.

    make speedrun-cpu                       # half an hour of one core; started again, it goes on
    make speedrun-cpu ARGS=--short          # two runs, a minute or two: what the tests ask for
    python -m eval.speedrun_cpu --text input.txt --out runs/mine

Goes in: the embedded corpus or a text, by character. Every run is train_gpt2.py's, in a process of
its own on one thread: GPT-2 with AdamW and a cosine (preset demo, but for GPT-2's own weight decay
and beta2), whose rate and warm-up are tuned first, and the speedrun as it is (speedrun-demo) in
runs of several lengths, each with its own decay. Comes out, in runs/speedrun-cpu/: the table that
is printed, results.json, speedrun_cpu.png and every run. Expect 4 times fewer tokens, or more.

Fewer by how much: between two lengths the loss falls in a line over the logarithm of the tokens, so
that line says where a run of the speedrun would end at the faithful loss. Seed by seed.
"""

import json
import math
import operator
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from matplotlib.figure import Figure

from launch import flags
from launch.errors import BadInput, Failed, run_command
from launch.files import atomic_write, folder_lock, sha256
from launch.tracker import read_rows

TRAIN = Path(__file__).parent.parent / "train_gpt2.py"
BATCH_TOKENS = 1024  # of both presets
# fp32: the same losses on every CPU. Evaluated before the first step and after the last, only. What
# is compared is two recipes, and neither has a guard that leaves out large gradients.
COMMON = ["--data.vocab", "char", "--dtype", "fp32", "--val_tokens", "32768", "--prompt", "",
          "--eval_every", "99999", "--save_every", "99999", "--on_spike", "ignore"]
FAITHFUL = ["demo", "--optim.weight_decay", "0.1", "--optim.beta2", "0.95"]
SPEEDRUN = ["speedrun-demo"]


@dataclass(frozen=True)
class Arguments:
    """Trains a faithful GPT-2 and the speedrun's, and says how much sooner the latter is there."""

    text: str = ""
    """A text file to train on; by default the World English Bible."""
    out: Path = Path("runs/speedrun-cpu")
    """Folder for the runs, results.json and the picture. Runs that it holds aren't run again."""
    short: bool = False
    """One run of each, the speedrun with half the tokens."""


@dataclass(frozen=True)
class Plan:
    """What is run. The speedrun's lengths are shares of the faithful steps, of which the longer
    ones are left out once all seeds have the faithful loss."""

    steps: int
    settings: tuple[tuple[float, float], ...]  # faithful learning rates and warm-ups (shares)
    seeds: tuple[int, ...]
    shares: tuple[float, ...]


FULL = Plan(
    640, ((3e-3, 0.04), (3e-3, 0.1), (3e-3, 0.2), (1.5e-3, 0.1), (6e-3, 0.1), (6e-3, 0.2)),
    (1, 2, 3), (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0))
SHORT = Plan(160, ((3e-3, 0.1),), (1,), (1 / 2,))
# A result is kept under this too: where the same seed has other first weights it's another.
FIRST_WEIGHTS = "drawn in pieces"


@dataclass(frozen=True)
class Training:
    """A run of train_gpt2.py; name: its folder in --out."""

    name: str
    flags: list[str]
    steps: int
    seed: int = 1

    def command(self, out: Path) -> list[str]:
        """What starts it."""
        return [sys.executable, str(TRAIN), *self.flags, *COMMON, "--steps", str(self.steps),
                "--seed", str(self.seed), "--out_dir", str(out), "--name", self.name]


@dataclass(frozen=True)
class Result:
    """How a run ended. cpu_seconds: of its process, start and evaluations included."""

    val_loss: float
    cpu_seconds: float


@dataclass(frozen=True)
class Point:
    """A side's runs of one length: a loss and the CPU seconds of training for each seed."""

    steps: int
    losses: list[float]
    seconds: list[float]

    @property
    def tokens(self) -> int:
        """That a run has trained on."""
        return self.steps * BATCH_TOKENS


# ---- runs, and what is known of them ----

class Runs:
    """The runs in a folder: those that have ended are read, the others are trained."""

    def __init__(self, out: Path, text: str) -> None:
        """text: a file, or "" for the embedded corpus."""
        self.out, self.path = out, out / "results.json"
        self.data = ["--data.text", text] if text else []
        self.text_hash = sha256(Path(text)) if Path(text).is_file() else ""
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.known = json.loads(self.path.read_text()) if self.path.exists() else {}
        except OSError as error:
            raise BadInput(f"--out {out}: {error.strerror}") from None
        except ValueError:
            raise BadInput(f"{self.path} is damaged: remove it, and all is trained anew") from None

    def train(self, wanted: list[Training]) -> list[Result]:
        """The results of these runs, after training those that have none: one on each core."""
        waiting = [run for run in wanted if not self._is_done(run)]
        running: list[tuple[Training, subprocess.Popen]] = []
        try:
            while waiting or running:
                while waiting and len(running) < (os.cpu_count() or 1):
                    running.append((waiting[0], self._start(waiting.pop(0))))
                run, process = running[0]
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                running.pop(0)
                self._record(run, process.returncode, usage.ru_utime + usage.ru_stime)
        finally:
            for _, process in running:  # another one failed, or Ctrl-C
                process.terminate()
                process.wait()
        return [Result(**self.known[run.name]["result"]) for run in wanted]

    def _is_done(self, run: Training) -> bool:
        return run.name in self.known and self.known[run.name]["of"] == self._inputs(run)

    def _inputs(self, run: Training) -> list[str]:
        """What a result is the result of, wherever it lies."""
        return [FIRST_WEIGHTS, *run.command(Path())[2:], *self.data, self.text_hash]

    def _start(self, run: Training) -> subprocess.Popen:
        """From the first step: CPU seconds that a cut run took are nowhere."""
        shutil.rmtree(self.out / run.name, ignore_errors=True)
        log: IO[bytes]
        with (self.out / f"{run.name}.log").open("wb") as log:
            return subprocess.Popen(
                [*run.command(self.out), *self.data], stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})

    def _record(self, run: Training, exit_code: int, cpu_seconds: float) -> None:
        """Keeps a run's result. Raises BadInput or Failed, with the run's own last line."""
        losses = [row["val_loss"] for row in read_rows(self.out / run.name / "metrics.jsonl")
                  if row["step"] == run.steps and "val_loss" in row]
        if exit_code or not losses:
            log = self.out / f"{run.name}.log"
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            if exit_code == BadInput.exit_code:
                raise BadInput(last.removeprefix("error: "))
            raise Failed(f"{run.name} ended with exit code {exit_code}, see {log}: {last}")
        result = Result(losses[-1], cpu_seconds)
        self.known[run.name] = {"of": self._inputs(run), "result": asdict(result)}
        atomic_write(self.path, json.dumps(self.known, indent=1) + "\n")
        print(f"{run.name}: validation loss {result.val_loss:.4f}, {cpu_seconds:.0f} CPU s",
              flush=True)


# ---- the two sides ----

def faithful(steps: int, rate: float, warmup: float, seed: int) -> Training:
    """GPT-2 with AdamW and a cosine. warmup: the share of its steps."""
    return Training(
        f"faithful-{steps}-lr-{rate:g}-warmup-{warmup:g}-seed-{seed}",
        [*FAITHFUL, "--optim.lr", f"{rate:g}", "--optim.warmup_steps", f"{warmup * steps:.0f}"],
        steps, seed)


def speedrun(steps: int, seed: int) -> Training:
    """The speedrun's network, Muon, and a decay over the last 70 % of these steps."""
    return Training(f"speedrun-{steps}-seed-{seed}", SPEEDRUN, steps, seed)


def tune(runs: Runs, plan: Plan) -> tuple[float, float]:
    """The faithful side's best rate and warm-up, by the validation loss of the first seed."""
    results = runs.train([faithful(plan.steps, *one, plan.seeds[0]) for one in plan.settings])
    losses = [result.val_loss for result in results]
    return plan.settings[losses.index(min(losses))]


def measure(runs: Runs, make: Callable[[int, int], Training], steps: int,
            seeds: tuple[int, ...]) -> Point:
    """A side's runs of so many steps. make(steps, seed): one of them.

    What a run of one step takes is start and evaluation, and no training: it is subtracted.
    """
    start, *results = runs.train([make(1, seeds[0]), *[make(steps, seed) for seed in seeds]])
    seconds = [result.cpu_seconds - start.cpu_seconds for result in results]
    return Point(steps, [result.val_loss for result in results], seconds)


def at_loss(target: float, losses: list[float], costs: list[float]) -> float:
    """What it costs to reach a loss, where runs of rising costs ended at these losses.

    Between two runs the loss is a line over log(cost). Where the cheapest run is there already
    it's that one's cost, and the truth is less; infinite where the dearest isn't.
    """
    if losses[0] <= target:
        return costs[0]
    for i in range(1, len(losses)):
        if losses[i] <= target:
            part = (losses[i - 1] - target) / (losses[i - 1] - losses[i])  # of the way
            return costs[i - 1] * (costs[i] / costs[i - 1]) ** part
    return math.inf


def times_fewer(goal: Point, points: list[Point]) -> tuple[list[float], list[float]]:
    """For each seed: how many times fewer tokens, and CPU seconds, the points need for its loss."""
    tokens, seconds = [], []
    for seed, target in enumerate(goal.losses):
        losses = [point.losses[seed] for point in points]
        needed = at_loss(target, losses, [float(point.tokens) for point in points])
        tokens.append(goal.tokens / needed)
        needed = at_loss(target, losses, [point.seconds[seed] for point in points])
        seconds.append(goal.seconds[seed] / needed)
    return tokens, seconds


# ---- what is shown ----

def spread(values: list[float], digits: int) -> str:
    """'1.8250 +- 0.0031': mean and standard deviation; of one value just it."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(goal: Point, points: list[Point]) -> list[str]:
    """A line for each side's lengths."""
    lines = [f"{'':9}{'steps':>6}{'tokens':>11}{'validation loss':>20}{'CPU s':>14}"]
    for side, point in [("faithful", goal), *[("speedrun", point) for point in points]]:
        lines.append(f"{side:9}{point.steps:>6,}{point.tokens:>11,}{spread(point.losses, 4):>20}"
                     f"{spread(point.seconds, 1):>14}")
    return lines


def verdict(goal: Point, points: list[Point]) -> list[str]:
    """The faithful loss with how much less: seed by seed, and whether that is a bound only."""
    lines: list[str] = []
    seeds = range(len(goal.losses))
    bound = "at least " * any(points[0].losses[seed] <= goal.losses[seed] for seed in seeds)
    for what, times in zip(("fewer tokens", "less CPU time"), times_fewer(goal, points),
                           strict=True):
        if 0 in times:  # an infinite cost
            return [f"the faithful loss was not reached with {points[-1].tokens:,} tokens"]
        each = ", ".join(f"{one:.2f}" for one in times)
        lines.append(f"the faithful loss with {bound}{spread(times, 2)} times {what} "
                     f"(seed by seed: {each})")
    return lines


def draw(goal: Point, points: list[Point], path: Path) -> None:
    """Validation losses over tokens and over CPU seconds: every run a dot, the means a line."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, unit in zip(panels, ("tokens", "CPU seconds"), strict=True):
        axes.set(xscale="log", xlabel=f"{unit} of a whole run")
        axes.set_xticks([], minor=True)
        ticks = []
        for label, colour, side in [("GPT-2, AdamW, cosine", "tab:red", [goal]),
                                    ("speedrun, Muon, linear decay", "tab:blue", points)]:
            places, dots, heights = [], [], []
            for point in side:
                costs = point.seconds
                if unit == "tokens":
                    costs = [float(point.tokens)] * len(point.losses)
                dots += costs
                heights += point.losses
                places.append((statistics.mean(costs), statistics.mean(point.losses)))
            axes.plot(dots, heights, ".", color=colour, label=label)
            axes.plot(*zip(*places, strict=True), color=colour, linewidth=1)
            ticks += [cost for cost, _ in places]
        axes.axhline(statistics.mean(goal.losses), color="tab:red", linestyle=":", linewidth=1)
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    panels[0].set_ylabel("validation loss at its end")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=140)


def main(arguments: Arguments) -> None:
    plan = SHORT if arguments.short else FULL
    runs = Runs(arguments.out, arguments.text)
    with folder_lock(arguments.out):
        rate, warmup = tune(runs, plan)

        def tuned(steps: int, seed: int) -> Training:
            return faithful(steps, rate, warmup, seed)

        goal = measure(runs, tuned, plan.steps, plan.seeds)
        points: list[Point] = []
        for share in plan.shares:
            points.append(measure(runs, speedrun, round(share * plan.steps), plan.seeds))
            if all(map(operator.le, points[-1].losses, goal.losses)):
                break
    print(f"\nfaithful: learning rate {rate:g}, warm-up {100 * warmup:g} % of the steps "
          f"(the best of {len(plan.settings)} tried)\n")
    print("\n".join([*table(goal, points), "", *verdict(goal, points)]))
    picture = arguments.out / "speedrun_cpu.png"
    draw(goal, points, picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    run_command(lambda: main(flags.parse(Arguments)))
