"""Lessons run as their readers run them."""

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from tests.running import ROOT


def run_lesson(name: str, pictures: Collection[str] = (), arguments: Collection[str] = ()) -> str:
    """Runs lessons/NAME in the repository's root, on one thread; what it printed.

    AssertionError where a figure is outside its band, or a picture isn't drawn.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [sys.executable, f"lessons/{name}", *arguments]
    done = subprocess.run(started, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    drawn = {Path(line.split(": ")[1]).stem for line in done.stdout.splitlines()
             if line.startswith("picture: ")}
    assert drawn == set(pictures)
    return done.stdout
