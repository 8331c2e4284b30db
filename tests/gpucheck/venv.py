"""An interpreter for gpu-check: the machine's own torch, and beside it what a run needs.

    python3 -m tests.gpucheck.venv build/gpu-check/venv     # what make gpu-check does first

An image for GPUs brings a torch and a Triton that go with its driver, and replacing them takes
minutes and gigabytes. So the virtual environment sees every package of the interpreter that makes
it, wherever that keeps them, and pip adds those alone that are missing: small wheels.
Needs nothing but Python's own library, and pip.
"""

import sys
from importlib import metadata
from pathlib import Path

from launch.errors import run_command
from tests.gpucheck.machine import find_machine
from tests.nullgpu.venv import constraints, requirements, run

OURS = "parent.pth"  # Python adds the folders that such a file names to its path


def set_up(venv: Path) -> None:
    """Makes the environment, anew if it is there. Raises BadInput."""
    venv.parent.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv)])
    python = venv / "bin" / "python"
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / OURS).write_text("\n".join(package_folders()) + "\n")
    pins = venv / "constraints.txt"
    pins.write_text(missing_pins())
    # pip is the parent's, and installs where its interpreter is.
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "-c", str(pins), *requirements()])


def package_folders() -> list[str]:
    """Where this interpreter's packages lie: torch's folder is one of them."""
    return [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]


def missing_pins() -> str:
    """The project's pins of what isn't here: what is may have any version that setup.cfg takes."""
    pins = constraints().splitlines()
    return "\n".join(pin for pin in pins if not is_here(pin.partition("==")[0])) + "\n"


def is_here(package: str) -> bool:
    """Whether this interpreter has a package."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def main(words: list[str]) -> None:
    (venv,) = words
    find_machine(sys.executable)  # before anything is installed
    print(f"setting up {venv} beside this interpreter's torch (once)", flush=True)
    set_up(Path(venv))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
