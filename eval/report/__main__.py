"""python -m eval.report RUN [RUN2 ...]: the verdict in a line, and where the page lies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eval.report.charts import Entry
from eval.report.page import write_report
from launch import console, flags
from launch.errors import BadInput, one_line_errors


@dataclass(frozen=True)
class Arguments:
    """Writes RUN/report/index.html and its pictures; the first RUN's where there are several."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders; all validated on the same data."""
    against: str = ""
    """Published curve to compare with; by default the one of the model's shape."""


def summary(entry: Entry) -> str:
    """The verdict in one line, for a terminal."""
    verdict = entry.verdict
    if verdict is None:
        return ""
    line = f"{entry.record.name}: {verdict.headline}"
    if verdict.comparisons:
        newest = verdict.comparisons[0]
        line += (f" ({newest.what} {newest.loss:.4f} at step {newest.step:,}; "
                 f"published {newest.published:.4f}, expected noise {newest.noise:.4f})")
    return line


def in_colour(line: str, entry: Entry) -> str:
    """The verdict's line, green on track and red off it, where a terminal has colours."""
    colours = {"on track": "green", "off": "red", "too early": "yellow"}
    status = entry.verdict.status if entry.verdict else "not compared"
    return console.colour(line, colours[status]) if status in colours else line


def main(arguments: Arguments) -> None:
    if not arguments.runs:
        raise BadInput("which run? python -m eval.report RUN [RUN2 ...] [--against llmc-124m]")
    path, entries = write_report(list(arguments.runs), arguments.against)
    for entry in entries:
        print(in_colour(summary(entry), entry))
    print(path)


if __name__ == "__main__":
    with one_line_errors():
        main(flags.parse(Arguments))
