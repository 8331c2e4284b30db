"""The oldest and the newest PyTorch that the project works with, each in a smoke run.

    make versions                        # both
    make versions ARGS=oldest
    make versions ARGS=--where-possible  # where one can't be set up: says why, and exits with 0

The pinned pair of PyTorch and Triton passes every test; of these two, each with the Triton that it
brings, the demo's first steps, the kernels' tests under Triton's interpreter, those of several
ranks, and the audit of what the compiler makes of the kernels. Each has an environment of its own
under build/, set up once: a CUDA build of PyTorch, 5 to 6 GB, for nothing lighter brings a Triton.
Exit code 1 where something fails.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from launch.errors import BadInput, Failed, run_command
from tests.nullgpu import venv

BUILD = venv.ROOT / "build"
TORCH = {"oldest": "2.11.0", "newest": venv.TORCH}  # with Triton 3.6.0 and 3.8.0
FOLDERS = {"oldest": BUILD / "versions", "newest": BUILD / "cuda-check"}  # that one has it already
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "pyarrow", "zstandard")  # conftest.py wants them
# What differs between versions of Triton, torch.compile (the fourth) and FSDP2 (the last two).
TESTS = ("kernels_interpreter", "kernels_numerics", "kernels_passes", "kernels_speedrun",
         "model_diagnostics", "model_parallel")


def environment(which: str) -> str:
    """The interpreter with this PyTorch and pytest. Raises BadInput where it can't be set up."""
    python = str(FOLDERS[which] / "venv" / "bin" / "python")
    if venv.cuda_build(python) != TORCH[which]:
        venv.set_up(Path(python), TORCH[which])
    pins = FOLDERS[which] / "constraints.txt"
    pins.write_text(venv.constraints())  # not there, where the environment is of somebody's making
    venv.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
              "--no-cache-dir", "-c", str(pins), *TOOLS])
    return python


def smoke(which: str, python: str) -> list[str]:
    """Runs the three; the names of those that failed."""
    runs = FOLDERS[which] / "runs"
    tests = [f"tests/test_{name}.py" for name in TESTS]
    commands = {
        "demo": ["train_gpt2.py", "demo", "--steps", "20", "--eval_every", "20",
                 "--out_dir", str(runs), "--name", str(time.time_ns())],
        "tests": ["-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *tests],
        "audit": ["-m", "kernels.audit"],
    }
    failed = []
    for name, command in commands.items():
        started = time.monotonic()
        done = subprocess.run([python, *command], cwd=venv.ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, env=os.environ)
        verdict = "passed" if done.returncode == 0 else f"failed (exit code {done.returncode})"
        print(f"torch {TORCH[which]}, {name}: {verdict} ({time.monotonic() - started:.0f} s)",
              flush=True)
        if done.returncode:
            failed.append(name)
            print(done.stdout[-20_000:], flush=True)
    return failed


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser("make versions", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help="oldest, newest: both, if none is named")
    parser.add_argument("--where-possible", action="store_true",
                        help="where one can't be set up, say why and exit with 0")
    arguments = parser.parse_args(words)
    for which in arguments.which:
        if which not in TORCH:
            raise BadInput(f"there is no version {which!r}: {', '.join(TORCH)}")
    failed = []
    for which in arguments.which or TORCH:
        try:
            python = environment(which)
        except BadInput as reason:
            if not arguments.where_possible or isinstance(reason, Failed):
                raise
            print(f"torch {TORCH[which]} is left out: {reason}")
            continue
        failed += smoke(which, python)
    return int(bool(failed))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
