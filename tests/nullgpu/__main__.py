"""Runs the unchanged program on a stand-in for a GPU, and holds what it asks of it against a table.

    make cuda-check                                # all rows; exit code 1 where a count differs
    make cuda-check ARGS=--update                  # writes the table anew: the diff is the change
    make cuda-check ARGS="'gpt2-124m, h100'"       # one row
    make cuda-check CUDA_PYTHON=~/cuda/bin/python  # an interpreter with a CUDA build of torch

Needs Linux, gcc and a CUDA build of torch, for which it sets up build/cuda-check/venv by itself; no
GPU. docs/cuda_check.md says what is counted and what can't be known without a card.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.errors import BadInput, Failed, run_command
from tests.nullgpu import counts, table
from tests.nullgpu.build import build, site_packages
from tests.nullgpu.largest import OtherProblem, largest_batch
from tests.nullgpu.rows import ROWS, Largest, Row
from tests.nullgpu.running import Workplace, start, write_inputs
from tests.nullgpu.venv import ROOT, cuda_python

FOLDER = ROOT / "build" / "cuda-check"
TABLE = table.TABLE.relative_to(ROOT)


class Unable(Exception):
    """Why a row has no counts."""


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("make cuda-check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="of the table; all, if none is named")
    parser.add_argument("--update", action="store_true", help="write the table anew")
    parser.add_argument("--where-possible", action="store_true",
                        help="where it can't run, say why and exit with 0")
    return parser.parse_args(words)


def chosen(names: list[str]) -> list[Row]:
    """The rows of these names. Raises BadInput."""
    known = [row.name for row in ROWS]
    for name in names:
        if name not in known:
            raise BadInput(f"there is no row {name!r}: the rows are " + "; ".join(known))
    return [row for row in ROWS if not names or row.name in names]


def prepared() -> Workplace:
    """An interpreter, the library, and the runs' inputs. Raises BadInput."""
    place = Workplace(cuda_python(FOLDER), FOLDER)
    build(place.python, FOLDER / "lib")
    write_inputs(place)
    return place


def count_row(row: Row, place: Workplace, cuobjdump: Path, before: table.Counts) -> table.Counts:
    """The counts of a row; before: the table's. Raises Unable."""
    if isinstance(row, Largest):
        try:
            return {"sequences": largest_batch(row, place, before.get("sequences", row.batch))}
        except OtherProblem as problem:
            raise Unable(str(problem)) from None
    out, problem = start(row, place)
    if problem:
        raise Unable(problem)
    try:
        return counts.count(out, row.parts, cuobjdump)
    except counts.Missing as missing:
        raise Unable(str(missing)) from None


def count_and_say(
    row: Row, place: Workplace, cuobjdump: Path, before: table.Counts
) -> table.Counts | str:
    """The counts of a row, or why it has none; prints either."""
    started = time.monotonic()
    counted: table.Counts | str
    try:
        counted = count_row(row, place, cuobjdump, before)
        line = table.summary(counted)
    except Unable as reason:
        counted = line = str(reason)
    print(f"{row.name}: {line} ({time.monotonic() - started:.0f} s)", flush=True)
    return counted


def count_all(
    rows: list[Row], place: Workplace, before: dict[str, table.Counts]
) -> dict[str, table.Counts | str]:
    """Row -> its counts, or why it has none. As many at a time as there are cores, at most two:
    each takes some GB of memory."""
    cuobjdump = site_packages(place.python) / "triton/backends/nvidia/bin/cuobjdump"
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        counted = [(row.name, pool.submit(count_and_say, row, place, cuobjdump,
                                          before.get(row.name, {}))) for row in rows]
        return {name: done.result() for name, done in counted}


def report(counted: dict[str, table.Counts | str], before: dict[str, table.Counts]) -> int:
    """Prints what differs from the table; the exit code."""
    differ = 0
    for name, now in counted.items():
        if isinstance(now, str):
            lines = [f"did not run: {now}"]
        else:
            lines = table.differences(before.get(name, {}), now)
        if lines:
            differ += 1
            print(f"\n{name}\n    " + "\n    ".join(lines))
    if differ:
        print(f"\n{differ} of {len(counted)} rows differ from {TABLE}. Where that is meant: "
              "make cuda-check ARGS=--update, and commit the diff")
        return 1
    print(f"all {len(counted)} rows are as in {TABLE}")
    return 0


def update(counted: dict[str, table.Counts | str], before: dict[str, table.Counts]) -> int:
    """Writes the table with the rows that were counted, in the order of ROWS; the exit code."""
    failed = [name for name, now in counted.items() if isinstance(now, str)]
    good = {name: now for name, now in counted.items() if not isinstance(now, str)}
    rows = before | good
    table.write({row.name: rows[row.name] for row in ROWS if row.name in rows})
    print(f"wrote {len(good)} rows to {TABLE}: git diff shows what changed")
    return 1 if failed else 0


def main(words: list[str]) -> int:
    arguments = parse(words)
    rows = chosen(arguments.rows)
    started = time.monotonic()
    try:
        place = prepared()
    except BadInput as reason:
        if not arguments.where_possible or isinstance(reason, Failed):
            raise
        print(f"cuda-check is left out: {reason}")
        return 0
    before = table.read()
    counted = count_all(rows, place, before)
    print(f"{time.monotonic() - started:.0f} s in all")
    return update(counted, before) if arguments.update else report(counted, before)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
