"""A run as a page: a verdict against a published curve, pictures, events, samples.

    python -m eval.report runs/gpt2-124m                      # runs/gpt2-124m/report/index.html
    python -m eval.report runs/a runs/b --against llmc-124m   # two runs; the page lies in the first

The page is one file that needs no network, and the pictures lie beside it as PNG. The published
curve is the one of the run's own shape where the validation sets are the same (eval/published.py),
or the one that --against names: llmc-124m, llmc-350m. Runs on different data are refused.
"""

import html
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from eval.charts import Entry, Picture, draw_losses, make_picture, write_pictures
from eval.record import Event, Record, read_record, read_records
from eval.verdict import Verdict, judge
from launch.errors import BadInput, Failed, one_line_errors
from launch.files import atomic_write
from launch.tracker import clock

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLES = 12  # on a page, spread over the run
EVENTS = 50  # on a page, of each run
STYLE = (Path(__file__).parent / "report.css").read_text()


@dataclass(frozen=True)
class Arguments:
    """Writes RUN/report/index.html and its pictures; the first RUN's where there are several."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders; all validated on the same data."""
    against: str = ""
    """Published curve to compare with; by default the one of the model's shape."""


def plot_losses(run: Path) -> Path:
    """Draws train and validation loss against tokens from metrics.jsonl; returns the PNG's path.

    A run that was stopped before its first loss gets an empty picture. Raises BadInput where there
    is no run, Failed where the picture can't be written.
    """
    record = read_record(run)

    def draw(axes: "Axes", entries: list[Entry]) -> None:
        draw_losses(axes, entries)
        if not axes.has_data():
            axes.plot([], [], label="no losses yet")

    picture = make_picture("loss", f"Loss of {record.name}", draw, [Entry(record, None)])
    assert picture  # `draw` always draws
    path = run / "report" / "loss.png"
    _write(path, picture.png)
    return path


def write_report(runs: list[Path], against: str = "") -> tuple[Path, list[Entry]]:
    """Writes the page and its pictures into the first run; returns its path and the verdicts.

    Raises BadInput where a run is missing or empty, or would be compared with other data.
    """
    records = read_records(runs)
    entries = [Entry(record, judge(record, against)) for record in records]
    folder = runs[0] / "report"
    try:
        pictures = write_pictures(entries, folder)
    except OSError as error:
        raise Failed(f"can't write into {folder}: {error.strerror}") from None
    _write(folder / "index.html", page(entries, pictures).encode())
    return folder / "index.html", entries


def page(entries: list[Entry], pictures: list[Picture]) -> str:
    """The whole page. Names, events and samples are anybody's text, and escaped."""
    title = escaped(" and ".join(entry.record.name for entry in entries))
    figures = "".join(f"<figure>{picture.svg}</figure>" for picture in pictures)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
{"".join(verdict_card(entry, len(entries) > 1) for entry in entries)}
<section class="charts">{figures}</section>
<p class="hint">Vertical lines: spikes red and dotted, restarts and stops amber and dashed.
Pale bands reach from the smallest to the largest value of neighbouring steps.</p>
<h2>Figures</h2>{figures_table([entry.record for entry in entries])}
<h2>Events</h2>{"".join(events_table(e.record, len(entries) > 1) for e in entries)}
<h2>Samples</h2>{"".join(samples(entry.record, len(entries)) for entry in entries)}
</body></html>
"""


def verdict_card(entry: Entry, with_name: bool) -> str:
    """The answer at the top, the figures that it rests on, and where to look if it's bad."""
    verdict, record = entry.verdict, entry.record
    if verdict is None:
        return ""
    name = f"{escaped(record.name)}: " if with_name else ""
    rows = [
        (c.what, f"{c.loss:.4f}", f"{c.published:.4f}", f"{c.difference:+.4f}",
         f"± {c.noise:.4f}", f"{c.step:,}", f"{c.tokens:,}") for c in verdict.comparisons
    ]
    head = ("", "this run", "published", "difference", "expected noise", "step", "tokens")
    curve = verdict.val_curve or verdict.train_curve
    against = ""
    if curve:
        against = f"<p>Against {escaped(curve.title)} at the same number of tokens.</p>"
    notes = "".join(f"<p>{escaped(note)}</p>" for note in verdict.notes)
    causes = "".join(f"<li>{escaped(cause)}</li>" for cause in verdict.causes)
    look = f"<p>Usual causes, the most telling first:</p><ol>{causes}</ol>" if causes else ""
    return (f'<section class="verdict {verdict.status.replace(" ", "-")}">'
            f"<h2>{name}{escaped(verdict.headline)}</h2>{against}"
            f"{table(head, rows) if rows else ''}{look}{notes}</section>")


def figures_table(records: list[Record]) -> str:
    """A row a fact, a column a run."""
    facts = [_facts(record) for record in records]
    keys = list(dict.fromkeys(key for fact in facts for key in fact))
    head = ("", *(record.name for record in records))
    return table(head, [(key, *(fact.get(key, "not recorded") for fact in facts)) for key in keys])


def events_table(record: Record, with_name: bool) -> str:
    """What happened, in order; the first EVENTS of them."""
    events: list[Event] = record.events()
    title = f"<h3>{escaped(record.name)}</h3>" if with_name else ""
    if not events:
        return f"{title}<p>No spikes, restarts or failures.</p>"
    rows = [(f"{event.step:,}", event.kind, event.text) for event in events[:EVENTS]]
    more = f"<p>and {len(events) - EVENTS:,} more</p>" if len(events) > EVENTS else ""
    return f"{title}{table(('step', 'kind', 'what'), rows)}{more}"


def samples(record: Record, runs: int) -> str:
    """What the model wrote at some steps, the newest first."""
    found = record.samples()
    count = max(1, SAMPLES // runs)
    picked = [found[i] for i in np.unique(np.linspace(len(found) - 1, 0, count).round().astype(int))
              ] if found else []
    title = f"<h3>{escaped(record.name)}</h3>" if runs > 1 else ""
    said = f"<p>{len(picked)} of {len(found)}</p>" if len(picked) < len(found) else ""
    blocks = "".join(
        f"<article><h4>step {step:,}, {tokens:,} tokens</h4><p>{escaped(text)}</p></article>"
        for step, tokens, text in reversed(picked)
    )
    return f"{title}{said}{blocks or '<p>None recorded.</p>'}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """An HTML table that scrolls by itself where a screen is narrow. All cells are escaped."""
    top = "".join(f"<th>{escaped(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def escaped(text: object) -> str:
    """Text for HTML; halves of surrogate pairs, which no file can hold, become question marks."""
    return html.escape(str(text).encode("utf-8", "replace").decode())


def _facts(record: Record) -> dict[str, str]:
    """What there is to say of a run in a line each."""
    facts = {"state": record.state(), "validation set": record.val_set or "none"}
    last = record.rows[-1]
    facts["trained"] = f"{last['step']:,} steps, {last['tokens']:,} tokens"
    val, train = record.series("val_loss"), record.series("train_loss")
    if len(val.values):
        best = int(val.values.argmin())
        facts["validation loss"] = (f"{val.values[-1]:.4f} at step {int(val.steps[-1]):,}; lowest "
                                    f"{val.values[best]:.4f} at step {int(val.steps[best]):,}")
    if len(train.values):
        part = train.values[-50:]
        facts["training loss"] = f"{part.mean():.4f}, mean of the last {len(part)} steps"
    score = record.series("hellaswag_acc_norm")
    if len(score.values):
        facts["HellaSwag acc_norm"] = f"{score.values[-1]:.4f} at step {int(score.steps[-1]):,}"
    rate, mfu = record.series("tokens_per_second").values, record.series("mfu").values
    if len(rate):
        facts["speed, median"] = f"{np.median(rate):,.0f} tokens/s" + (
            f", {np.median(mfu):.1%} MFU" if len(mfu) else "")
    seconds = record.series("step_ms").values.sum() / 1e3
    if seconds:
        facts["time in training steps"] = clock(seconds)
    memory = record.series("memory_mib").values
    if len(memory):
        facts["memory, largest"] = f"{memory.max():,.0f} MiB"
    hardware = record.description.get("hardware")
    if isinstance(hardware, dict):
        facts["hardware"] = f"{hardware.get('ranks')} x {hardware.get('device')}"
    for key in ("code", "command"):
        value = record.description.get(key)
        if value:
            facts[key] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return facts


def _write(path: Path, content: bytes) -> None:
    try:
        atomic_write(path, content)
    except OSError as error:
        raise Failed(f"can't write {path}: {error.strerror}") from None


def summary(entry: Entry) -> str:
    """The verdict in one line, for a terminal."""
    verdict: Verdict | None = entry.verdict
    if verdict is None:
        return ""
    line = f"{entry.record.name}: {verdict.headline}"
    for c in verdict.comparisons[:1]:
        line += (f" ({c.what} {c.loss:.4f} at step {c.step:,}; published {c.published:.4f}, "
                 f"expected noise {c.noise:.4f})")
    return line


def main(arguments: Arguments) -> None:
    if not arguments.runs:
        raise BadInput("which run? python -m eval.report RUN [RUN2 ...] [--against llmc-124m]")
    path, entries = write_report(list(arguments.runs), arguments.against)
    for entry in entries:
        print(summary(entry))
    print(path)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments, config=(tyro.conf.FlagConversionOff,)))
