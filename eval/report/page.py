"""The report as one HTML file that needs no network; its pictures lie beside it as PNG."""

import html
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from eval.report import network
from eval.report.better import Ranking, rank
from eval.report.charts import RUN_COLOURS, Entry
from eval.report.floor import counted_floor
from eval.report.pictures import Picture, make_pictures, write_picture
from eval.report.record import Record, Series, read_records
from eval.report.verdict import judge, quiet_lines
from launch.errors import BadInput, Failed
from launch.files import atomic_write
from launch.tracker import clock

SAMPLES = 12  # on a page, spread over the run
EVENTS = 50  # on a page, of each run
STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def write_report(
    runs: list[Path], against: str = "", out: Path | None = None
) -> tuple[Path, list[Entry]]:
    """Writes the page and its pictures into `out`; returns the page's path and the verdicts.

    out: a folder, made where it isn't there; by default the first run's report/. Raises BadInput
    where a run is missing or empty, or would be compared with other data, and where `out` can be no
    folder, Failed where the files can't be written.
    """
    folder = out or runs[0] / "report"
    if out and (out.suffix == ".html" or (out.exists() and not out.is_dir())):
        raise BadInput(f"--out {out} is no folder: the page will be index.html in the folder that "
                       "it names, and the pictures beside it")
    records = read_records(runs)
    entries = [Entry(record, judge(record, against)) for record in records]
    path = folder / "index.html"
    pictures = make_pictures(entries)
    for picture in pictures:
        write_picture(picture, folder)
    try:
        atomic_write(path, page(entries, pictures).encode())
    except OSError as error:
        raise Failed(f"can't write {path}: {error.strerror}") from None
    return path, entries


def page(entries: list[Entry], pictures: list[Picture]) -> str:
    """The whole page. Names, events and samples are anybody's text, and escaped."""
    title = escaped(entries[0].record.name)
    if len(entries) > 1:
        title = f"{len(entries)} runs"
    figures, inside = "", ""
    for picture in pictures:
        if picture.name in network.CHARTS:
            inside += f"<figure>{picture.svg}</figure>"
        else:
            figures += f"<figure>{picture.svg}</figure>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
{ranking_card(rank(entries))}
{"".join(verdict_card(entry, len(entries) > 1) for entry in entries)}
{"".join(f'<p class="hint">{escaped(line)}</p>' for line in quiet_lines(entries))}
<section class="charts">{figures}</section>
<p class="hint">Pale bands reach from the smallest to the largest value of neighbouring steps.</p>
{network.section(inside)}
<h2>Figures</h2>
<section class="figures">{figures_table([entry.record for entry in entries])}</section>
<h2>Events</h2>{"".join(events_table(e.record, len(entries) > 1) for e in entries)}
<h2>Samples</h2>{"".join(samples(entry.record, len(entries)) for entry in entries)}
</body></html>
"""


def ranking_card(ranking: Ranking | None) -> str:
    """Which of the runs is better, by how much, and what a difference is worth."""
    if ranking is None:
        return ""
    parts = [f"<h2>{escaped(ranking.headline)}</h2>"]
    head = ("runs", "what differs", "validation loss", "above the best", "noise")
    rows = []
    for setting, noise in zip(ranking.settings, ranking.noise, strict=True):
        names = []
        for place, name, loss in zip(setting.places, setting.names, setting.losses, strict=True):
            colour = RUN_COLOURS[place % len(RUN_COLOURS)]
            alone = "" if len(setting.names) == 1 else f" {loss:.4f}"
            names.append(f'<span style="color:{colour}">■</span> {escaped(name)}{alone}')
        gap = setting.loss - ranking.settings[0].loss
        rows.append(("<br>".join(names), escaped(setting.differs), f"{setting.loss:.4f}",
                     f"{gap:+.4f}" if setting is not ranking.settings[0] else "",
                     f"± {noise:.4f}" if noise is not None else ""))
    if rows:
        parts.append(html_table(head, rows))
    parts += [f"<p>{escaped(note)}</p>" for note in ranking.notes]
    kind = "on-track" if ranking.better else "even"
    return f'<section class="verdict ranking {kind}">{"".join(parts)}</section>'


def verdict_card(entry: Entry, with_name: bool) -> str:
    """The answer at the top, the figures that it rests on, and where to look if it's bad."""
    verdict, record = entry.verdict, entry.record
    if verdict is None or not verdict.comparisons:
        return ""
    name = f"{escaped(record.name)}: " if with_name else ""
    parts = [f"<h2>{name}{escaped(verdict.headline)}</h2>"]
    curve = verdict.val_curve or verdict.train_curve
    if curve:
        parts.append(f"<p>Against {escaped(curve.title)} at the same number of tokens.</p>")
    if verdict.comparisons:
        head = ("", "this run", "published", "difference", "expected noise", "step", "tokens")
        rows = []
        for c in verdict.comparisons:
            rows.append((c.what, f"{c.loss:.4f}", f"{c.published:.4f}", f"{c.difference:+.4f}",
                         f"± {c.noise:.4f}", f"{c.step:,}", f"{c.tokens:,}"))
        parts.append(table(head, rows))
    if verdict.causes:
        items = "".join(f"<li>{escaped(cause)}</li>" for cause in verdict.causes)
        parts.append(f"<p>Usual causes, the most telling first:</p><ol>{items}</ol>")
    for note in verdict.notes:
        parts.append(f"<p>{escaped(note)}</p>")
    kind = verdict.status.replace(" ", "-")
    return f'<section class="verdict {kind}">{"".join(parts)}</section>'


def figures_table(records: list[Record]) -> str:
    """A row a fact, a column a run."""
    columns = [_facts(record) for record in records]
    names = dict.fromkeys(name for facts in columns for name in facts)  # each once, in order
    rows = []
    for name in names:
        rows.append([name, *(facts.get(name, "not recorded") for facts in columns)])
    return table(["", *(record.name for record in records)], rows)


def events_table(record: Record, with_name: bool) -> str:
    """What happened, in order; the first EVENTS of them."""
    events = record.events()
    title = f"<h3>{escaped(record.name)}</h3>" if with_name else ""
    if not events:
        return f"{title}<p>No spikes, restarts or failures.</p>"
    rows = [(f"{event.step:,}", event.kind, event.text) for event in events[:EVENTS]]
    more = f"<p>and {len(events) - EVENTS:,} more</p>" if len(events) > EVENTS else ""
    return f"{title}{table(('step', 'kind', 'what'), rows)}{more}"


def samples(record: Record, runs: int) -> str:
    """What the model wrote at some steps, the newest first; SAMPLES of them over all runs."""
    found = record.samples()
    title = f"<h3>{escaped(record.name)}</h3>" if runs > 1 else ""
    if not found:
        return f"{title}<p>None recorded.</p>"
    places = np.linspace(len(found) - 1, 0, max(1, SAMPLES // runs))
    numbers = list(dict.fromkeys(places.round().astype(int)))  # each once
    parts = [title]
    if len(numbers) < len(found):
        parts.append(f"<p>{len(numbers)} of {len(found)}</p>")
    for number in numbers:
        step, tokens, text = found[number]
        parts.append(f"<article><h4>step {step:,}, {tokens:,} tokens</h4>"
                     f"<p>{escaped(text)}</p></article>")
    return "".join(parts)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """An HTML table that scrolls by itself where a screen is narrow. All cells are escaped."""
    return html_table(map(escaped, head), [map(escaped, row) for row in rows])


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """The same of cells that are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def escaped(text: object) -> str:
    """Text for HTML; halves of surrogate pairs, which no file can hold, become question marks."""
    return html.escape(str(text).encode("utf-8", "replace").decode())


def _facts(record: Record) -> dict[str, str]:
    """What there is to say of a run in a line each."""
    last = record.rows[-1]
    facts = {
        "state": record.state(),
        "validation set": record.val_set or "none",
        "trained": f"{last['step']:,} steps, {last['tokens']:,} tokens",
    }
    val = record.series("val_loss")
    if len(val.values):
        best = int(val.values.argmin())
        facts["validation loss"] = f"{_at_step(val, -1)}; lowest {_at_step(val, best)}"
    recent = record.series("train_loss").values[-50:]
    if len(recent):
        facts["training loss"] = f"{recent.mean():.4f}, mean of the last {len(recent)} steps"
    hellaswag = record.series("hellaswag_acc_norm")
    if len(hellaswag.values):
        facts["HellaSwag acc_norm"] = _at_step(hellaswag, -1)
    speed, mfu = record.series("tokens_per_second").values, record.series("mfu").values
    if len(speed):
        facts["speed, median"] = f"{np.median(speed):,.0f} tokens/s"
        if len(mfu):
            facts["speed, median"] += f", {np.median(mfu):.1%} MFU"
    seconds = record.series("step_ms").values.sum() / 1e3
    if seconds:
        facts["time in training steps"] = clock(seconds)
    memory = record.series("memory_mib").values
    if len(memory):
        facts["memory, largest"] = f"{memory.max():,.0f} MiB"
    return facts | counted_floor(record) | _description(record)


def _description(record: Record) -> dict[str, str]:
    """What config.json says of the machine, the code and the command."""
    facts = {}
    hardware = record.description.get("hardware")
    if isinstance(hardware, dict):
        facts["hardware"] = f"{hardware.get('ranks')} x {hardware.get('device')}"
    for key in ("code", "command"):
        value = record.description.get(key)
        if isinstance(value, list):
            value = " ".join(map(str, value))
        if value:
            facts[key] = str(value)
    return facts


def _at_step(series: Series, i: int) -> str:
    return f"{series.values[i]:.4f} at step {int(series.steps[i]):,}"
