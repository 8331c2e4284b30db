"""The parts of the check, each a process of its own with a time limit.

    python -m tests.gpucheck.parts steps FOLDER     # one of them, here: FOLDER/measured.json

FOLDER/settings.json says how large it is. A part that fails, hangs or fills the card takes nothing
from the others.
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

from launch.errors import one_line_errors
from tests.gpucheck.settings import Settings
from tests.running import ROOT

LEAVING = 10  # seconds that a part's processes have to end once they are told to
KEPT = 4000  # characters of what a part said that has failed


class Part(NamedTuple):
    """A function of runs.py or measure.py, and the seconds after which it has failed."""

    name: str
    module: str
    function: str
    seconds: int


# In the order in which they would be missed; where time is up the last are left out.
PARTS = [
    Part("errors", "measure", "kernel_errors", 120),
    Part("steps", "runs", "steps", 120),
    Part("all GPUs", "runs", "steps_on_all", 120),
    Part("rates", "measure", "rates", 40),
    Part("losses", "runs", "first_losses", 180),
    Part("sampling", "measure", "sampling", 60),
    Part("HellaSwag", "measure", "hellaswag", 60),
    Part("saving", "measure", "saving", 60),
    Part("largest", "measure", "largest_batch", 60),
    Part("kernels", "measure", "kernel_times", 150),
]


def measure(part: Part, settings: Settings, folder: Path, seconds: float) -> dict[str, Any]:
    """What a part measured, or {"fault": why not, "output": the end of what it said}.

    folder: of the part, which is removed: runs leave checkpoints.
    """
    folder.mkdir(parents=True)
    settings.write(folder / "settings.json")
    command = [sys.executable, "-m", "tests.gpucheck.parts", part.name, str(folder)]
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
    """Ends a part's process and those that it started; torchrun ends its ranks by itself, given
    time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LEAVING)


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
    name, folder = words[0], Path(words[1])
    (part,) = [part for part in PARTS if part.name == name]
    module = importlib.import_module(f"tests.gpucheck.{part.module}")
    found = getattr(module, part.function)(Settings.read(folder / "settings.json"), folder)
    (folder / "measured.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
