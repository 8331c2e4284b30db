"""launch/errors.py: how a program ends."""

import ast
import subprocess
import sys

import pytest

from tests.running import ROOT, environment

PROGRAM = """
import atexit, sys
from launch.errors import BadInput, run_command

def command():
    print("said")
    if sys.argv[1] == "bad input":
        raise BadInput("what was wrong")
    if sys.argv[1] == "a fault":
        raise ZeroDivisionError("of ours")
    if sys.argv[1] == "a text":
        sys.exit("goodbye")
    return {"nothing": None, "3": 3}[sys.argv[1]]

atexit.register(lambda: print("taken down"))
run_command(command)
"""


@pytest.mark.parametrize("asked, code", [("nothing", 0), ("3", 3), ("bad input", 2),
                                          ("a fault", 1), ("a text", 1)])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("gpu", [False, True])
def test_among_other_ranks_and_on_a_gpu_the_interpreter_is_not_taken_down(asked, code, ranks, gpu):
    """Threads abort it there once in a while: a run that is done would count as a crash."""
    before = "import torch; torch.cuda.is_initialized = lambda: True\n" if gpu else ""
    done = subprocess.run([sys.executable, "-c", before + PROGRAM, asked], cwd=ROOT, text=True,
                          capture_output=True, timeout=120,
                          env=environment() | {"RANK": "0", "WORLD_SIZE": str(ranks)})
    assert done.returncode == code
    assert done.stdout.splitlines() == ["said"] + ["taken down"] * (ranks == 1 and not gpu)
    last = {"bad input": "error: what was wrong", "a fault": "ZeroDivisionError: of ours",
            "a text": "goodbye"}
    assert done.stderr.splitlines()[-1:] == ([last[asked]] if asked in last else [])
    assert ("Traceback" in done.stderr) == (asked == "a fault")


def test_what_a_full_disk_has_not_taken_is_an_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", PROGRAM, "nothing"], cwd=ROOT, text=True,
                              stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=120)
    assert (done.returncode, done.stderr) == (
        1, "error: [Errno 28] No space left on device: make room and start again\n")


def test_every_program_ends_so():
    """Whoever has joined other ranks must; that those who are alone do, too, is simpler to see.
    Those of kernels/ import nothing of launch/, and join nobody."""
    rooms = [ROOT / room for room in ("model", "data", "eval", "launch", "lessons")]
    ends = {path.relative_to(ROOT).as_posix(): ast.unparse(statement.body[-1])
            for path in [ROOT / "train_gpt2.py", *(p for room in rooms for p in room.rglob("*.py"))]
            for statement in ast.parse(path.read_text()).body
            if isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test)}
    others = {path for path, end in ends.items() if not end.startswith("run_command(")}
    assert {"train_gpt2.py", "eval/core.py", "data/fineweb.py"} <= set(ends) - others
    assert others == {"launch/lifeline.py",  # knows no ranks, and imports nothing of ours
                      "lessons/exercises/e02.py"}  # nor does a page
