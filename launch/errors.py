"""The one-line error: what is wrong and what would be right, exit code 2, no traceback.

    raise BadInput("batch_tokens 1000 is not divisible by T = 128: the nearest that are: 896, 1024")

Under torchrun only rank 0 speaks; the others leave with the same code.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class BadInput(Exception):
    """Something the user gave can't be used. The message is the one line that is printed."""

    exit_code = 2


class FolderInUse(BadInput):
    """Another process holds the run folder."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command will work later


class Failed(BadInput):
    """The input was right, and the machine (a full disk, a dead network) stood in the way."""

    exit_code = 1


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a BadInput, a full GPU or Ctrl-C into one line on standard error and an exit code."""
    try:
        yield
    except BadInput as error:
        _leave(f"error: {error}", error.exit_code)
    except torch.OutOfMemoryError:
        _leave("error: the GPU's memory is full: halve --micro_batch (the result is the same)", 1)
    except KeyboardInterrupt:  # outside the training loop, which has a guard of its own
        _leave("interrupted", 130)


def _leave(line: str, exit_code: int) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
    sys.exit(exit_code)
