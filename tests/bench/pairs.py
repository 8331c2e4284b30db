"""Times two ways of doing the same work in pairs, A B A B, so that a machine that slows down slows
both; and what is said of them: medians, the ratio of each pair, and how far the ratios spread.

    result = measure(row, pairs=5)
    print(table([result]))

Each way runs in a process of its own, which prepares itself once and then waits for its turns: what
one sets (malloc's thresholds, threads, caches) doesn't help or hinder the other.
"""

import atexit
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Done(NamedTuple):
    """What one turn of a way has done."""

    work: float  # how much of it: tokens, questions
    value: float = 0.0  # what another way of doing the same work comes to as well: a loss
    seconds: float | None = None  # by its own clock, where not all of the turn counts


Work = Callable[[], Done]


@dataclass(frozen=True)
class Row:
    """One line of the table. plain, ours and limit prepare a way, in its own process."""

    name: str
    unit: str  # of the work: tokens, questions, starts
    plain: Callable[[], Work]  # what everybody does
    ours: Callable[[], Work]
    limit: Callable[[], Work] | None = None  # what the same work takes of the machine at least
    tolerance: float | None = None  # between the values of plain and ours; None: no values
    by_cpu: bool = True  # whether CPU seconds tell anything: not of a wait


class Turn(NamedTuple):
    """What one turn of one way took."""

    work: float
    value: float
    seconds: float  # by the clock
    cpu: float  # user and system, of the process and its children


@dataclass(frozen=True)
class Result:
    """A row, measured. ratio: ours over plain, pair by pair, sorted."""

    name: str
    unit: str
    plain: float  # units a second, median
    ours: float
    ratios: list[float]
    cpu_ratios: list[float]
    share_of_limit: float | None  # median of ours over limit, round by round
    difference: float | None  # of the values, the largest


def summarise(row: Row, plain: list[Turn], ours: list[Turn], limit: list[Turn]) -> Result:
    """What the turns of a row come to. Raises ValueError where the two did different work."""
    difference = None
    if row.tolerance is not None:
        difference = max(abs(a.value - b.value) for a, b in zip(plain, ours, strict=True))
        if not difference <= row.tolerance:
            raise ValueError(f"{row.name}: ours and the plain way differ by {difference:.3g}, "
                             f"and {row.tolerance:.3g} at most is right")
    ratios = sorted(speed(b) / speed(a) for a, b in zip(plain, ours, strict=True))
    cpu_ratios: list[float] = []
    if row.by_cpu:
        cpu_ratios = sorted((b.work / b.cpu) / (a.work / a.cpu)
                            for a, b in zip(plain, ours, strict=True))
    share = None
    if limit:
        share = statistics.median(
            speed(b) / speed(c) for b, c in zip(ours, limit, strict=True))
    return Result(row.name, row.unit, statistics.median(map(speed, plain)),
                  statistics.median(map(speed, ours)), ratios, cpu_ratios, share, difference)


def speed(turn: Turn) -> float:
    """Units a second, by the clock."""
    return turn.work / turn.seconds


def measure(row: Row, pairs: int) -> Result:
    """Runs a row's ways in turn, after one turn each that warms up."""
    makers = [row.plain, row.ours] + ([row.limit] if row.limit else [])
    ways = [Way(make) for make in makers]
    try:
        for way in ways:
            way.turn()
        rounds = [[way.turn() for way in ways] for _ in range(pairs)]
    finally:
        for way in ways:
            way.close()
    columns = [list(turns) for turns in zip(*rounds, strict=True)]
    return summarise(row, columns[0], columns[1], columns[2] if row.limit else [])


class Way:
    """One way of doing a row's work, in a process that waits for its turns."""

    def __init__(self, make: Callable[[], Work]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(make, other))
        self.process.start()
        other.close()

    def turn(self) -> Turn:
        """Does the work once. Raises RuntimeError where its process has died of an error."""
        try:
            self.pipe.send("turn")
            return Turn(*self.pipe.recv())
        except (EOFError, OSError):
            raise RuntimeError("a way of the bench has failed: its error is above") from None

    def close(self) -> None:
        """Ends the process."""
        self.pipe.close()
        self.process.join()


def serve(make: Callable[[], Work], pipe: Any) -> None:
    """In a way's process: prepares it, then one turn for each message, until the pipe is closed."""
    sys.stdout = open(os.devnull, "w")  # what a run says of itself is none of the table's
    work = make()
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(tuple(timed(work)))


def timed(work: Work) -> Turn:
    """One turn."""
    began, used = time.perf_counter(), cpu_seconds()
    done = work()
    seconds = time.perf_counter() - began if done.seconds is None else done.seconds
    return Turn(done.work, done.value, seconds, cpu_seconds() - used)


def scratch() -> Path:
    """A folder for as long as this process lives."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def cpu_seconds() -> float:
    """User and system, of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


HEADINGS = ("", "plain", "ours", "ratio (spread)", "in CPU time", "of the limit")


def table(results: list[Result]) -> str:
    """The results, a line each."""
    rows = [HEADINGS]
    for one in results:
        share = "" if one.share_of_limit is None else f"{one.share_of_limit:.0%}"
        rows.append((one.name, f"{rate(one.plain)} {one.unit}/s", f"{rate(one.ours)} {one.unit}/s",
                     spread(one.ratios), spread(one.cpu_ratios), share))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows)


def rate(value: float) -> str:
    """Three digits: 0.123, 12.3, 1,230."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def spread(ratios: list[float]) -> str:
    """Median, least and largest: 3.60 (3.51 to 3.72)."""
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def keep(results: list[Result], path: Path, machine: dict[str, Any]) -> None:
    """Writes them as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "rows": [asdict(one) for one in results]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
