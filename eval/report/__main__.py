"""python -m eval.report RUN [RUN2 ...]: the verdicts in a line each, and where the page lies.

Of several runs the first lines say which is better, by how much, and whether that is more than
noise. With --seeds the runs are one setting, and the lines say what it reaches (seeds.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eval.report.better import rank
from eval.report.charts import Entry
from eval.report.page import write_report
from eval.report.seeds import describe, read_seeds
from eval.report.verdict import quiet_lines
from launch import cli, console, flags
from launch.errors import BadInput, run_command


@dataclass(frozen=True)
class Arguments:
    """Writes a page, index.html, and its pictures: into RUN/report/ unless --out says otherwise."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders; all validated on the same data."""
    against: str = ""
    """Published curve to compare with; by default the one of the model's shape."""
    out: Path | None = None
    """Folder for the page and its pictures; by default the first RUN's report/."""
    seeds: bool = False
    """The runs are finished ones of one setting, each of another seed: mean, deviation, p-value."""
    target: float = 0.0
    """With --seeds: the loss that their mean is to be below; 0: 3.28, if it's FineWeb's."""


def summary(entry: Entry) -> str:
    """The verdict in one line, for a terminal; "" where a run is compared with no curve."""
    verdict = entry.verdict
    if verdict is None or not verdict.comparisons:
        return ""
    newest = verdict.comparisons[0]
    return (f"{entry.record.name}: {verdict.headline} "
            f"({newest.what} {newest.loss:.4f} at step {newest.step:,}; "
            f"published {newest.published:.4f}, expected noise {newest.noise:.4f})")


def lines(entries: list[Entry]) -> list[str]:
    """All that is said on a terminal, in colours where it has them."""
    said = []
    ranking = rank(entries)
    if ranking:
        said = [console.colour(ranking.headline, "green") if ranking.better else ranking.headline]
        said += ranking.notes
    for entry in entries:
        if line := summary(entry):
            said.append(in_colour(line, entry))
    return said + quiet_lines(entries)


def in_colour(line: str, entry: Entry) -> str:
    """The verdict's line, green on track and red off it, where a terminal has colours."""
    colours = {"on track": "green", "off": "red"}
    status = entry.verdict.status if entry.verdict else "not compared"
    return console.colour(line, colours[status]) if status in colours else line


def print_seeds(arguments: Arguments) -> None:
    """The lines of --seeds."""
    if arguments.against or arguments.out:
        raise BadInput("--seeds prints lines and writes no page: leave out --against and --out")
    cli.within("target", arguments.target, 0, 100, "nats")
    for line in describe(read_seeds(list(arguments.runs)), arguments.target):
        print(line)


def main(arguments: Arguments) -> None:
    if not arguments.runs:
        raise BadInput("which run? python -m eval.report RUN [RUN2 ...] [--against llmc-124m] "
                       "[--out DIR]")
    if arguments.seeds:
        print_seeds(arguments)
        return
    if arguments.target:
        raise BadInput("--target is what the mean of --seeds RUN1 RUN2 ... is compared with")
    path, entries = write_report(list(arguments.runs), arguments.against, arguments.out)
    for line in lines(entries):
        print(line)
    print(path)


if __name__ == "__main__":
    run_command(lambda: main(flags.parse(Arguments)))
