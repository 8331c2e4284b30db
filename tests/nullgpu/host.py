"""How long the host works on a step: CPU time, in turns with a plain script's.

    python -m tests.nullgpu.host                # on the stand-in for a GPU: the ratios of 3 pairs
    python -m tests.nullgpu.host --pairs 5
    CUDA_PYTHON=~/cuda/bin/python python -m tests.nullgpu.host

On the stand-in a launch returns at once and nothing is waited for: what a step takes there is what
the host does for it, and where that is more than the GPU needs, the GPU waits. CPU time of the
process and all its threads, because others use a machine too; 8 sequences a rank, of which the GPU
would have little to do. A first run of each way compiles its kernels and isn't counted.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from typing import NamedTuple

from launch.errors import Failed, run_command
from tests.nullgpu.__main__ import prepared
from tests.nullgpu.rows import TIMED, Row
from tests.nullgpu.running import ROOT, Workplace, environment

Clock = list[tuple[str, float]]  # marks of tests/nullgpu/inside.py, with CPU seconds
STEP = ("update", "update")
UNSYNCED = ("unsynced begins", "unsynced ends")
WARM = 14  # spans that don't count: DDP looks at its first ten steps
PLAIN = Row("timed plain loop, h100", "h100")
PLAIN_DDP = Row("timed plain loop, ddp, 8 h100", "h100", ranks=8)


class Compared(NamedTuple):
    """What is timed, from a mark to the next, of two ways."""

    what: str
    ours: Row
    other: Row
    marks: tuple[str, str]


one, ddp, fsdp, compiled_fsdp = TIMED
COMPARED = [
    Compared("gpt2-124m, a step, to a plain loop's", one, PLAIN, STEP),
    Compared("gpt2-124m, ddp on 8 ranks, a step, to a plain loop's", ddp, PLAIN_DDP, STEP),
    Compared("gpt2-1558m, fsdp on 8 ranks, a micro-step without exchange, to compiled blocks'",
             fsdp, compiled_fsdp, UNSYNCED),
]


def spans(clock: Clock, begin: str, end: str) -> list[float]:
    """Seconds from each mark `begin` to the next `end`."""
    found, since = [], None
    for mark, seconds in clock:
        if mark == end and since is not None:
            found.append(seconds - since)
            since = None
        if mark == begin:
            since = seconds
    return found


def clock_of(row: Row, place: Workplace) -> Clock:
    """Runs a row, without a log: writing it would be timed, too. Raises Failed."""
    out = place.out(row.name)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    inside = ["tests.nullgpu.inside", row.name, str(place.inputs), str(out)]
    command = inside if row in TIMED else ["tests.nullgpu.plain_loop", str(out)]
    surroundings = environment(row, place, out)
    del surroundings["NULLGPU_LOG"]
    with (out / "output").open("w") as output:
        done = subprocess.run([place.python, "-m", *command], cwd=ROOT, env=surroundings,
                              stdout=output, stderr=subprocess.STDOUT)
    if done.returncode or not (out / "found.json").exists():
        raise Failed(f"{row.name}: exit code {done.returncode}, see {out / 'output'}")
    return json.loads((out / "found.json").read_text())["clock"]


def milliseconds(clock: Clock, marks: tuple[str, str]) -> float:
    """A span that few were shorter than: what others use of a machine only ever adds to it."""
    return 1000 * statistics.quantiles(spans(clock, *marks)[WARM:], n=10)[0]


def compare(compared: Compared, pairs: int, place: Workplace) -> None:
    """Runs both ways in turns and prints a line."""
    for row in (compared.ours, compared.other):
        clock_of(row, place)  # compiles
    ours, others = [], []
    for _ in range(pairs):
        ours.append(milliseconds(clock_of(compared.ours, place), compared.marks))
        others.append(milliseconds(clock_of(compared.other, place), compared.marks))
    ratios = sorted(a / b for a, b in zip(ours, others, strict=True))
    print(f"{compared.what}: {statistics.median(ours):.2f} ms of CPU time, "
          f"{statistics.median(others):.2f} ms; {statistics.median(ratios):.2f} times "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.nullgpu.host", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    pairs = max(1, parser.parse_args(words).pairs)
    place = prepared()
    for compared in COMPARED:
        compare(compared, pairs, place)
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
