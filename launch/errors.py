"""The one-line error: what is wrong and what would be right, exit code 2, no traceback.

    raise BadInput("batch_tokens 1000 is not divisible by T = 128: the nearest that are: 896, 1024")

Under torchrun only rank 0 speaks; the others leave with the same code.
"""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from launch import console


class BadInput(Exception):
    """Something the user gave can't be used. The message is the one line that is printed."""

    exit_code = 2


class FolderInUse(BadInput):
    """Another process holds the run folder."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command will work later


class Failed(BadInput):
    """The input was right, and the machine (a full disk, a dead network) stood in the way."""

    exit_code = 1


def run_command(command: Callable[[], int | None], output_may_fail: bool = False) -> NoReturn:
    """Runs a program to its end under one_line_errors(). Its exit code is what `command` returns,
    0 for None."""
    with one_line_errors(output_may_fail):
        exit_code = command() or 0
        sys.stdout.flush()  # a full disk says so here, while it is still an error
        exit_process(exit_code)


@contextmanager
def one_line_errors(output_may_fail: bool = False) -> Iterator[None]:
    """Turns a BadInput, a full GPU or Ctrl-C into one line on standard error and an exit code.

    Where standard output can't be written to (`| head`), a command leaves quietly; with
    output_may_fail it goes on without.
    """
    console.open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a sample may hold any character
        sys.stdout.reconfigure(errors="backslashreplace")
    if output_may_fail:
        console.drop_unprintable()
    try:
        yield
    except BadInput as error:
        exit_process(error.exit_code, f"{console.colour('error:', 'red', sys.stderr)} {error}")
    except SystemExit as done:  # --help, a wrong flag, a run that is finished already
        if isinstance(done.code, int | None):
            exit_process(done.code or 0)
        exit_process(1, str(done.code))
    except BrokenPipeError:
        console.forget_output()
        exit_process(1)
    except Exception as error:
        torch = sys.modules.get("torch")  # importing it takes longer than most commands of data/
        if torch is not None and isinstance(error, torch.OutOfMemoryError):
            # On one rank, perhaps not 0, and the others don't know.
            rank = os.environ.pop("RANK", "0")
            exit_process(1, f"error: the GPU of rank {rank} is full: halve --micro_batch (the "
                            "result is the same)")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            console.forget_output()  # perhaps it is what lies on the full disk
            exit_process(1, f"error: {error}: make room and start again")
        if not may_be_aborted():
            raise
        sys.excepthook(*sys.exc_info())
        exit_process(1)  # the interpreter's own way out can wait for peers that have died
    except KeyboardInterrupt:  # outside the training loop, which handles signals itself
        exit_process(130, "interrupted")


def exit_process(exit_code: int, line: str = "") -> NoReturn:
    """Ends the process, with a last line from rank 0. Everything has to be closed before.

    Under torchrun and on a GPU the interpreter isn't taken down: aborted there, a finished run
    would count as a crash and be started again.
    """
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it any more, or its disk is full
        console.forget_output()
    if line and env_number("RANK", 0) == 0:
        print(line, file=sys.stderr)
    sys.stderr.flush()
    if may_be_aborted():
        os._exit(exit_code)
    sys.exit(exit_code)


def may_be_aborted() -> bool:
    """Whether threads of gloo's or of the CUDA build's run, which sometimes abort an interpreter
    that is taken down ("terminate called without an active exception", SIGABRT)."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    return on_gpu or env_number("WORLD_SIZE", 1) > 1


def env_number(name: str, default: int) -> int:
    """A number from the environment; `default` where there is none (launch/ranks.py says so)."""
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default
