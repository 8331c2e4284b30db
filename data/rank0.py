"""print0: a line that is printed once, however many ranks run."""

import sys

from launch.errors import env_number


def print0(line: str, error: bool = False) -> None:
    """Prints on rank 0 alone (torchrun sets RANK), on standard error if asked to."""
    if env_number("RANK", 0) == 0:
        print(line, file=sys.stderr if error else sys.stdout)
