"""An interpreter with a CUDA build of torch: the one that is here, or one set up for this."""

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from launch.errors import BadInput, Failed

ROOT = Path(__file__).parent.parent.parent
TORCH = "2.14.1"  # counted.json holds what this one does: another's Inductor makes other launches
GIB = 2**30
ROOM = 12 * GIB  # free bytes that setting up wants: 6 GB stay, the rest is pip's at work


def cuda_python(folder: Path) -> str:
    """CUDA_PYTHON of the environment, this interpreter, or that of folder/venv, which is set up
    where it isn't there: the first that has a CUDA build of torch, and, unless it was asked for,
    TORCH. Raises BadInput where none can be had."""
    asked = os.environ.get("CUDA_PYTHON")
    if asked:
        if not shutil.which(asked):
            raise BadInput(f"CUDA_PYTHON={asked}: there is no such interpreter")
        version = cuda_build(asked)
        if not version:
            raise BadInput(f"CUDA_PYTHON={asked} has no CUDA build of torch")
        if version != TORCH:
            print(f"note: {asked} has torch {version}, and the table is of {TORCH}", flush=True)
        return asked
    own = folder / "venv" / "bin" / "python"
    for python in (sys.executable, str(own)):
        if cuda_build(python) == TORCH:
            return python
    set_up(own)
    if cuda_build(str(own)) != TORCH:
        raise BadInput(f"pip installed no CUDA build of torch {TORCH}: is it told to use PyTorch's "
                       "CPU index (PIP_EXTRA_INDEX_URL, pip config)?")
    return str(own)


def cuda_build(python: str) -> str:
    """The version of an interpreter's torch; "" where it has none, or one without CUDA."""
    ask = "import torch; print(torch.__version__.split('+')[0] if torch.version.cuda else '')"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def set_up(python: Path, torch: str = TORCH) -> None:
    """A virtual environment with this torch and what runs need. Raises BadInput."""
    if sys.platform != "linux":
        raise BadInput("the stand-in for a GPU needs Linux, where PyTorch has CUDA builds")
    venv = python.parent.parent
    venv.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(venv.parent).free
    if free < ROOM:
        raise BadInput(f"a CUDA build of torch wants {ROOM / GIB:.0f} GiB of disk while it is "
                       f"installed, and {venv.parent} has {free / GIB:.1f}; or name an interpreter "
                       "that has one: make cuda-check CUDA_PYTHON=...")
    print(f"setting up {venv} (once, some minutes; 6 GB)", flush=True)
    pins = venv.parent / "constraints.txt"
    pins.write_text(constraints())
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
           "--no-cache-dir", "-c", str(pins), f"torch=={torch}", *requirements()]
    run([sys.executable, "-m", "venv", str(venv)])
    run(pip)


def run(command: list[str]) -> None:
    """Raises BadInput where a command of the setting up fails, with its last line; Failed where
    the versions that are asked for exclude one another."""
    # The index that README names for CPUs has a torch of the same version, which pip prefers.
    environment = {k: v for k, v in os.environ.items() if k != "PIP_EXTRA_INDEX_URL"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        complaint = (done.stderr or done.stdout).strip()
        if "ResolutionImpossible" in complaint:  # no machine's fault: nobody may pass over it
            raise Failed(f"constraints.txt and PyTorch exclude one another: {complaint}")
        raise BadInput(f"{command[0]} can't be set up: {''.join(complaint.splitlines()[-1:])}")


def constraints() -> str:
    """The project's pins without torch's own: this torch brings its Triton, and says which
    setuptools it goes with (2.11: below 82)."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    own = re.compile("(torch|triton|setuptools)==")
    return "\n".join(line for line in lines if not own.match(line)) + "\n"


def requirements() -> list[str]:
    """What a run needs beside torch."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].splitlines()
    return [line for line in lines if line and not line.startswith(("torch", "#"))]
