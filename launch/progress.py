"""How far something is that takes more than five seconds: rank 0 says so, on standard error.

    for start in track(range(0, sequences, B), "validation"):
        ...
    with Bar(desc="hashing", total=size, unit="B") as bar:
        bar.update(len(chunk))

On a terminal it is tqdm's bar, and gone at the end; elsewhere, where a bar would fill a log, a line
after five seconds and then every half minute. What is quicker than that says nothing.
"""

import contextlib
import io
import sys
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from launch.errors import env_number

SILENT = 5.0  # seconds without a word
BETWEEN_LINES = 30.0  # seconds, where there is no terminal
LINE = ("{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt} after {elapsed}, {remaining} to go"
        "{postfix}")

T = TypeVar("T")


class Bar(tqdm):
    """tqdm's bar, by the rules above. Takes what tqdm takes: desc, total, unit, initial."""

    monitor_interval = 0  # no thread of tqdm's own

    def __init__(self, *args: Any, **options: Any) -> None:
        self.terminal = sys.stderr.isatty()
        options |= {"delay": SILENT, "miniters": 1, "leave": False}
        if self.terminal:
            options |= {"file": sys.stderr, "dynamic_ncols": True}
        else:  # lines are printed by display(), and what tqdm wipes out with goes nowhere
            options |= {"file": io.StringIO(), "mininterval": SILENT, "bar_format": LINE}
        if options.get("unit") == "B":
            options["unit_scale"] = True
        if env_number("RANK", 0) > 0:
            options["disable"] = True
        super().__init__(*args, **options)

    def display(  # type: ignore[override]
        self, msg: str | None = None, pos: int | None = None
    ) -> bool:
        """What tqdm calls when it's time to say something again; with '' to wipe the bar out.

        Whether there is anything to wipe out.
        """
        if self.terminal:
            return bool(super().display(msg, pos))
        if msg == "":
            return False
        self.mininterval = BETWEEN_LINES
        with contextlib.suppress(OSError, ValueError):  # what can't be printed is dropped
            print(str(self), file=sys.stderr, flush=True)
        return False


def track(items: Collection[T], desc: str, unit: str = "it") -> Iterator[T]:
    """The items one by one, while a Bar counts them."""
    with Bar(desc=desc, total=len(items), unit=unit) as bar:
        for item in items:
            yield item
            bar.update()
