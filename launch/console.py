"""Standard streams: their colours, and that they may be closed, full, or read by nobody any more.

A line of log is not worth a run: what can't be printed is dropped, and training goes on.
"""

import os
import sys
from typing import Any, TextIO

COLOURS = {"red": 31, "green": 32, "yellow": 33}  # ECMA-48, "select graphic rendition"


def print0(line: str, error: bool = False) -> None:
    """Prints on rank 0 alone (torchrun sets RANK), on standard error if asked to."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr if error else sys.stdout)


class Forgiving:
    """A text stream whose writes may fail without a word; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes, or drops what the disk or the reader doesn't take."""
        try:
            return self.stream.write(text)
        except OSError as error:
            self._forget_reader(error)
            return len(text)

    def flush(self) -> None:
        """Flushes, or drops what can't be written."""
        try:
            self.stream.flush()
        except OSError as error:
            self._forget_reader(error)

    def _forget_reader(self, error: OSError) -> None:
        """A reader that has gone won't come back; a full disk may have room again."""
        if isinstance(error, BrokenPipeError):
            forget_output(self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def colour(text: str, name: str, stream: TextIO | None = None) -> str:
    """The text in red, green or yellow, where the stream (standard output) is a terminal that can.

    NO_COLOR, if it isn't empty, forbids it (no-color.org).
    """
    stream = stream or sys.stdout
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\033[{COLOURS[name]}m{text}\033[0m"


def warning(text: str, stream: TextIO | None = None) -> str:
    """A line that begins with `warning:`, to be printed on this stream."""
    return f"{colour('warning:', 'yellow', stream)} {text}"


def open_closed_streams() -> None:
    """Puts the null device where standard input, output or error was closed (`>&-`).

    Python sets such a stream to None, and the next file that is opened would take its number, so
    that a library's message ended in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def drop_unprintable() -> None:
    """From now on, what can't be written to standard output and error is dropped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Forgiving):
            setattr(sys, name, Forgiving(stream))


def forget_output(number: int = 1) -> None:
    """Nobody reads this stream any more, standard output: the null device takes the rest.

    Without this the interpreter would complain once more on its way out.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
