"""The parts of the check, each a process of its own with a time limit.

    python -m tests.gpucheck.parts tests.gpucheck.runs steps FOLDER     # one of them, in this one

FOLDER/settings.json says how large it is, FOLDER/measured.json what was measured. A part that
fails, hangs or fills the card takes nothing from the others.
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from launch.errors import run_command
from tests.gpucheck.settings import Settings
from tests.nullgpu.venv import ROOT

KEPT = 4000  # characters of what a part said that has failed


class Part(NamedTuple):
    """A function of a module, and the seconds after which it has failed."""

    name: str
    module: str
    function: str
    seconds: int


RUNS, MEASURE = "tests.gpucheck.runs", "tests.gpucheck.measure"
# In the order in which they would be missed; where time is up the last are left out.
PARTS = [
    Part("errors", MEASURE, "kernel_errors", 120),
    Part("steps", RUNS, "steps", 120),
    Part("all GPUs", RUNS, "steps_on_all", 120),
    Part("rates", MEASURE, "rates", 90),
    Part("losses", RUNS, "first_losses", 180),
    Part("sampling", MEASURE, "sampling", 90),
    Part("HellaSwag", MEASURE, "hellaswag", 90),
    Part("saving", MEASURE, "saving", 120),
    Part("largest", MEASURE, "largest_batch", 90),
    Part("kernels", MEASURE, "kernel_times", 150),
]


def measure(part: Part, settings: Settings, folder: Path, seconds: float) -> dict[str, Any]:
    """What a part measured, or {"fault": why not, "output": the end of what it said}.

    folder: of the part, which is removed: runs leave checkpoints.
    """
    folder.mkdir(parents=True)
    settings.write(folder / "settings.json")
    command = [sys.executable, "-m", "tests.gpucheck.parts", part.module, part.function,
               str(folder)]
    fault = ""
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            if code := process.wait(seconds):
                fault = f"exit code {code}"
        except subprocess.TimeoutExpired:
            fault = f"not done after {seconds:.0f} s"
        finally:
            end(process)
    found = result(folder, fault)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def result(folder: Path, fault: str) -> dict[str, Any]:
    """What a part left in its folder. fault: what became of its process, "" for nothing bad."""
    if not fault:
        return json.loads((folder / "measured.json").read_text())
    said = (folder / "output").read_text(errors="replace").strip()
    if last := said.splitlines()[-1:]:
        fault += f": {last[0]}"
    return {"fault": fault, "output": said[-KEPT:]}


def end(process: subprocess.Popen) -> None:
    """Ends a part's process and those that it started; of torchrun the ranks leave when it dies."""
    with contextlib.suppress(ProcessLookupError):  # all are gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure_all(
    parts: list[Part], settings: Settings, folder: Path, minutes: float
) -> dict[str, dict[str, Any]]:
    """Part -> what it measured, or {"fault": why not}; a line each as they come."""
    until = time.monotonic() + 60 * minutes
    measured = {}
    for part in parts:
        began = time.monotonic()
        seconds = min(part.seconds, until - began)
        if seconds > 0:
            print(f"{part.name} ...", end=" ", flush=True)
            found = measure(part, settings, folder / part.name.replace(" ", "_"), seconds)
            print(found.get("fault", "done"), f"({time.monotonic() - began:.0f} s)", flush=True)
        else:
            found = {"fault": f"left out: {minutes:g} minutes are over"}
        measured[part.name] = found
    return measured


def main(words: list[str]) -> None:
    """Measures a part in this process."""
    module, function, folder = words[0], words[1], Path(words[2])
    measured_by = getattr(importlib.import_module(module), function)
    found = measured_by(Settings.read(folder / "settings.json"), folder)
    (folder / "measured.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
