"""Grades what a student has filled into lessons/exercises, each function for itself.

    python -m lessons.grade                      # all lessons
    python -m lessons.grade 03                   # one
    python -m lessons.grade --answers DIR        # eNN.py of another folder

A line for each function: right, to do, or wrong and which mistake gives the number seen; then a map
of what is done. A file that can't be imported and a function that never ends cost a line, and the
next one is graded. Exit code 0, or 1 where an answer is wrong.

Each function runs in a process of its own. One that isn't done after FLOOR seconds gets TIMES as
long as our solution then takes. What it prints is not shown. A file that isn't imported after
IMPORT seconds is given up, with all its functions.
"""

import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Annotated

import torch
import tyro

from launch import console, flags
from launch.errors import BadInput, run_command
from lessons.course import Wrong

HERE = Path(__file__).parent
TIMES = 10  # autograd takes twice as long as gradients by hand, a loop longer than a product
FLOOR = 4.0  # seconds: what is over at once takes longer on a machine that is busy
IMPORT = 30.0  # seconds, the same way: torch is there already, another library may not be
RIGHT, TO_DO, IMPORTED = "right", "to do", "imported"


@dataclass(frozen=True)
class Arguments:
    """Grades exercises, and says which mistake gives the number seen."""

    lessons: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Numbers of lessons; all by default."""
    answers: Path = HERE / "exercises"
    """The folder of the files e01.py to e10.py."""


def load(path: Path, name: str) -> Callable:
    """One function out of a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise Wrong(f"{path.name} has no function of this name")
    return getattr(module, name)


class Late(BaseException):
    """Raised where a function is when its time is up. No Exception, which an answer may catch."""


def late(*_: object) -> None:
    raise Late


def answer(path: Path, name: str, check: Callable, verdict: Connection) -> None:
    """In a process of its own: sends IMPORTED once that is so, and one line about a function."""
    signal.signal(signal.SIGTERM, late)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            function = load(path, name)
            verdict.send(IMPORTED)
            torch.set_grad_enabled(True)  # the checks' own, whatever the file has switched off
            check(function)
            line = RIGHT
        except NotImplementedError:
            line = TO_DO
        except Wrong as wrong:
            line = f"wrong: {wrong}"
        except Late as end:
            line = where(end, path)
        except BaseException as error:
            line = f"wrong: {blame(error, path)}"
    verdict.send(" ".join(line.split()))


def blame(error: BaseException, path: Path) -> str:
    """A student's exception in one line, with the line of their file that it came from."""
    try:
        what = f"{type(error).__name__}: {error}".removesuffix(": ")[:300]
    except Exception:  # its __str__ fails
        what = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename in (str(path), None):
        at = f" (line {error.lineno})" if error.lineno else ""
        return f"{path.name} can't be imported: {error.msg}{at}"
    if line := where(error, path):
        return f"{what} ({line})"
    return f"what it returned is not what its docstring asks for ({what})"


def where(error: BaseException, path: Path) -> str:
    """The line of a student's file that an exception came through last; "" where it hasn't."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(path)]
    return f"line {lines[-1]} of {path.name}" if lines else ""


def begin(path: Path, name: str, check: Callable) -> tuple[ForkProcess, Connection]:
    """A process that answers, and where its answer comes out. A fork has torch imported already,
    which takes longer than most checks."""
    verdict, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=answer, args=(path, name, check, sending))
    process.start()
    sending.close()
    return process, verdict


def seconds_of_ours(file: str, name: str, check: Callable) -> float:
    start = time.monotonic()
    process, verdict = begin(HERE / "solutions" / file, name, check)
    while verdict.recv() == IMPORTED:
        pass
    process.join()
    return time.monotonic() - start


def in_time(path: Path, name: str, check: Callable) -> str:
    """The verdict on one function, or a line that says why there is none."""
    process, verdict = begin(path, name, check)
    try:
        if not verdict.poll(IMPORT):
            return not_imported(path)
        line = verdict.recv()
        if line != IMPORTED:
            return line
        if not verdict.poll(FLOOR):
            limit = TIMES * seconds_of_ours(path.name, name, check)
            if not verdict.poll(limit):
                process.terminate()
                line = verdict.recv() if verdict.poll(1) else ""  # a long product isn't interrupted
                at = f", and then it was at {line}" if line else ""
                return (f"wrong: no answer after {FLOOR + limit:.1f} s, and ours takes "
                        f"{limit / TIMES:.1f} s{at}")
        return verdict.recv()
    except EOFError:
        process.join()
        return f"wrong: its process ended without an answer (exit code {process.exitcode})"
    finally:
        process.kill()
        process.join()


def not_imported(path: Path) -> str:
    return (f"wrong: {path.name} is not imported after {IMPORT:.0f} s: what stands outside its "
            "functions takes too long")


def grade(number: str, answers: Path) -> dict[str, str]:
    """{name of a function: the verdict}, printed as they come."""
    verdicts: dict[str, str] = {}
    path = (answers / f"e{number}.py").resolve()
    for name, check in importlib.import_module(f"lessons.checks.c{number}").CHECKS.items():
        if not path.is_file():
            verdicts[name] = TO_DO
        elif not_imported(path) in verdicts.values():
            verdicts[name] = not_imported(path)
        else:
            verdicts[name] = in_time(path, name, check)
        print(f"{number} {name:<24} {coloured(verdicts[name])}", flush=True)
    return verdicts


def coloured(verdict: str) -> str:
    colours = {RIGHT: "green", TO_DO: "yellow"}
    return console.colour(verdict, colours.get(verdict, "red"))


def main(arguments: Arguments) -> int:
    titles = {path.name[:2]: path.stem for path in sorted(HERE.glob("[0-9][0-9]_*.py"))}
    numbers = [name.partition("_")[0].zfill(2) for name in arguments.lessons] or list(titles)
    for number in numbers:
        if number not in titles:
            raise BadInput(f"there is no lesson {number}: {', '.join(titles)}")
    if not arguments.answers.is_dir():
        raise BadInput(f"there is no folder {arguments.answers}")
    if not any((arguments.answers / f"e{number}.py").is_file() for number in titles):
        raise BadInput(f"{arguments.answers} holds none of e01.py to e10.py: "
                       "copy lessons/exercises to begin with")
    done = {number: list(grade(number, arguments.answers).values()) for number in numbers}
    print()
    for number, verdicts in done.items():
        right = verdicts.count(RIGHT)
        marks = "".join({RIGHT: "#", TO_DO: "."}.get(verdict, "x") for verdict in verdicts)
        print(f"{titles[number]:<20} [{marks}] {right} of {len(verdicts)}")
    wrong = any(verdict not in (RIGHT, TO_DO) for line in done.values() for verdict in line)
    return int(wrong)


if __name__ == "__main__":
    run_command(lambda: main(flags.parse(Arguments)))
