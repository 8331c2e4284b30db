"""Lessons run as their readers run them."""

import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from lessons.stand_in import BANDS
from tests.running import ROOT


def run_lesson(name: str, pictures: Collection[str] = (), folder: Path = ROOT,
               environment: Mapping[str, str] = os.environ) -> str:
    """Runs lessons/NAME in a folder, on one thread; what it printed.

    AssertionError where a figure is outside its band, a picture isn't drawn, or a band of
    lessons/stand_in.py is of no figure that was printed.
    """
    environment = {**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [sys.executable, ROOT / "lessons" / name]
    done = subprocess.run(started, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    drawn = {Path(line.split(": ")[1]).stem for line in done.stdout.splitlines()
             if line.startswith("picture: ")}
    assert drawn == set(pictures)
    assert set(BANDS.get(name[:2], {})) <= figures(done.stdout)
    return done.stdout


def figures(printed: str) -> set[str]:
    """The names of the figures that a lesson has printed, as lessons/stand_in.py has them."""
    names, above = set(), ""
    for line in printed.splitlines():
        found = re.match(r"(.*\S) +\S+  \((lecture|band|exactly|on the embedded)", line)
        if found:
            name = found[1]
            above = above if name.startswith(" ") else name
            names.add(above + name if name.startswith(" ") else name)
    return names
