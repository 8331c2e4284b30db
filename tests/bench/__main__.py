"""Times everything that can be timed on a CPU, each beside its plain baseline, in pairs.

    make bench                                  # python -m tests.bench
    python -m tests.bench training sampling --pairs 7
    python -m tests.bench growth                # how cost grows: pictures, and a verdict on each

Rows: training sampling hellaswag saving startup shards, a script each in tests/bench. Prints a
table: units a second the plain way and ours, the ratio of the two in each pair (median, least and
largest), the same in CPU time, and ours as a share of what the machine could do at most, measured
in the same run. Written to runs/bench/bench.json. Rows whose two ways come to different losses are
an error. OMP_NUM_THREADS chooses the threads.
"""

import importlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from launch import cli, flags
from launch.errors import BadInput, run_command
from tests.bench.growth import GROWTH, draw_all
from tests.bench.pairs import Result, keep, measure, table

SCRIPTS = ("startup", "training", "sampling", "hellaswag", "saving", "shards")


@dataclass(frozen=True)
class Arguments:
    """What to time."""

    rows: tyro.conf.Positional[tuple[str, ...]] = SCRIPTS
    """Scripts in tests/bench, or growth."""
    pairs: int = 5
    """Turns of each way."""
    quick: bool = False
    """A tiny model: shows that it works, and times nothing worth knowing."""
    out: Path = Path("runs/bench")
    """Where JSON and pictures are written."""

    def __post_init__(self) -> None:
        cli.within("pairs", self.pairs, 1, 1000)
        for name in self.rows:
            if name not in (*SCRIPTS, GROWTH):
                raise BadInput(f"no row is called {name!r}: there are {', '.join(SCRIPTS)}, and "
                               f"{GROWTH}")


def main(arguments: Arguments) -> None:
    """Prints the table."""
    results: list[Result] = []
    for name in arguments.rows:
        if name == GROWTH:
            draw_all(arguments.out, arguments.quick)
            continue
        script = importlib.import_module(f"tests.bench.{name}")
        for row in script.rows(arguments.quick):
            print(f"{row.name} ...", flush=True)
            results.append(measure(row, arguments.pairs))
            keep(results, arguments.out / "bench.json", machine())  # after each: it takes minutes
    if results:
        print(f"\n{describe(machine())}, {arguments.pairs} pairs\n{table(results)}")


def machine() -> dict[str, Any]:
    """What it was timed on."""
    names, file = [], Path("/proc/cpuinfo")
    if file.exists():  # on Linux
        lines = [line.partition(": ") for line in file.read_text().splitlines()]
        names = [value for key, _, value in lines if key.startswith("model name")]
    return {"cpu": names[0] if names else platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version()}


def describe(found: dict[str, Any]) -> str:
    """In a line."""
    return (f"{found['cpu']} ({found['capability']}), {found['threads']} threads, PyTorch "
            f"{found['torch']}")


if __name__ == "__main__":
    run_command(lambda: main(flags.parse(Arguments)))
