"""The pictures of a run, or of several: each is a PNG, and an SVG that takes the page's colours.

A picture is a figure of one pair of axes over tokens. It is drawn once; where nothing of its kind
was recorded there is none.
"""

import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eval.published import SIZES, Points
from eval.record import Record, Series
from eval.verdict import Verdict, expected
from launch.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of middling lightness, so that they stand out on white and on black; the first two tell run from
# published curve for colour-blind eyes too.
RUN_COLOURS = ("#2f80ed", "#e0620d", "#1f9d55", "#a855f7", "#d6336c", "#0e9aa7")
PUBLISHED = "#8a8f98"
EVENT_STYLES = {"spike": ("#e5484d", ":"), "restart": ("#b58900", "--"), "stop": ("#b58900", "-."),
                "other": ("#b58900", ":")}
INK = "#020304"  # of text and axes; the SVG takes the page's instead
POINTS = 600  # of a line, at most: more than a screen has columns
MARKS = 100  # of one kind of event in a picture, at most
STYLE: dict[Any, Any] = {
    "font.size": 9, "font.family": "sans-serif", "axes.titlesize": 9.5, "legend.fontsize": 8,
    "svg.fonttype": "none", "svg.hashsalt": "report", "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "axes.titlelocation": "left",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color",
                     "ytick.color", "grid.color"), INK),
}


class Picture(NamedTuple):
    """name: of the PNG, without its ending. svg: one element, to be put into HTML."""

    name: str
    title: str
    svg: str
    png: bytes


class Entry(NamedTuple):
    """A run and what was found about it."""

    record: Record
    verdict: Verdict | None


Draw = Callable[["Axes", list[Entry]], None]


def write_pictures(entries: list[Entry], folder: Path) -> list[Picture]:
    """Draws every picture that there are figures for, and writes folder/NAME.png."""
    pictures = [picture for name, (title, draw) in PICTURES.items()
                if (picture := make_picture(name, title, draw, entries))]
    for picture in pictures:
        atomic_write(folder / f"{picture.name}.png", picture.png)
    return pictures


def make_picture(name: str, title: str, draw: Draw, entries: list[Entry]) -> Picture | None:
    """One picture; None where `draw` found nothing to put into it."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.3, 2.8), layout="constrained")
        try:
            draw(axes, entries)
            if not axes.has_data():
                return None
            axes.set(title=_plain(title), xlabel="tokens trained on")
            axes.xaxis.set_major_formatter(_count)
            if name == "tokens_per_second":
                axes.yaxis.set_major_formatter(_count)
            axes.grid(alpha=0.15)
            for entry in entries:
                _mark_events(axes, entry.record)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="best")
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=160, facecolor="white")
            return Picture(name, title, _svg(figure, name, title), png.getvalue())
        finally:
            plt.close(figure)


def draw_losses(axes: "Axes", entries: list[Entry]) -> None:
    """Training and validation losses, and the published run's where they are of the same data."""
    top, bottom = [], []
    for entry, colour in _coloured(entries):
        train, val = (entry.record.series(key) for key in ("train_loss", "val_loss"))
        name = f"{_plain(entry.record.name)}: " if len(entries) > 1 else ""
        _line(axes, train, colour, f"{name}train", faint=True)
        if len(val.values):
            axes.plot(val.tokens, val.values, color=colour, marker="o", markersize=2.5,
                      label=f"{name}val {val.values[-1]:.4f}")
        for series in (train, val):
            if len(series.values):
                settled = series.values[series.tokens >= 0.04 * series.tokens[-1]]
                top.append(settled.max())
                bottom.append(series.values.min())
    if not top:
        return
    end = max(entry.record.rows[-1]["tokens"] for entry in entries)
    verdict = next((e.verdict for e in entries if e.verdict and e.verdict.val_curve), None)
    if verdict and verdict.val_curve:
        _published(axes, verdict.val_curve.val, f"{verdict.val_curve.title}, val", end)
        if size := _size(entries):
            axes.axhline(size.fineweb_loss, color=PUBLISHED, linestyle=":", linewidth=1,
                         label=f"OpenAI GPT-2 {size.name}, val")
            bottom.append(size.fineweb_loss)
    # The first 4 % fall by so much that nothing else would be seen.
    room = 0.05 * (max(top) - min(bottom)) + 0.02
    axes.set_ylim(min(bottom) - room, max(top) + room)
    axes.set_ylabel("nats a token")


def draw_differences(axes: "Axes", entries: list[Entry]) -> None:
    """Validation loss minus the published run's at the same tokens, in the expected noise."""
    banded = False
    for entry, colour in _coloured(entries):
        if entry.verdict is None or entry.verdict.val_curve is None:
            continue
        val = entry.record.series("val_loss")
        published, noise = expected(entry.verdict.val_curve, val.tokens)
        known = np.isfinite(published)
        if not known.any():
            continue
        if not banded:
            axes.fill_between(val.tokens[known], -noise[known], noise[known], color=PUBLISHED,
                              alpha=0.25, linewidth=0, label="expected noise")
            axes.axhline(0, color=PUBLISHED, linewidth=1)
            banded = True
        axes.plot(val.tokens[known], (val.values - published)[known], color=colour, marker="o",
                  markersize=2.5, label=_plain(entry.record.name))
    if banded:
        axes.set_ylabel("nats a token")


def draw_column(key: str, unit: str = "", scale: float = 1.0, clip: bool = False) -> Draw:
    """Draws one column of metrics.jsonl. clip: leave the largest 0.5 % above the frame."""

    def draw(axes: "Axes", entries: list[Entry]) -> None:
        tops = []
        for entry, colour in _coloured(entries):
            series = entry.record.series(key)
            series = series._replace(values=series.values * scale)
            label = _plain(entry.record.name) if len(entries) > 1 else ""
            _line(axes, series, colour, label)
            if len(series.values):
                tops.append(np.quantile(series.values, 0.995))
        if not tops:
            return
        if key == "grad_norm" and (verdict := entries[0].verdict) and verdict.train_curve:
            end = max(entry.record.rows[-1]["tokens"] for entry in entries)
            _published(axes, verdict.train_curve.grad_norm,
                       f"{verdict.train_curve.title}, mean of 50 steps", end)
        if clip and max(tops) > 0:
            axes.set_ylim(0, 1.15 * max(tops))
        axes.set_ylabel(unit)

    return draw


def draw_hellaswag(axes: "Axes", entries: list[Entry]) -> None:
    """HellaSwag's acc_norm, and what OpenAI's models of the same size reach."""
    for entry, colour in _coloured(entries):
        series = entry.record.series("hellaswag_acc_norm")
        if len(series.values):
            axes.plot(series.tokens, series.values, color=colour, marker="o", markersize=2.5,
                      label=f"{_plain(entry.record.name)} {series.values[-1]:.4f}")
    if not axes.has_data():
        return
    size = _size(entries) or SIZES[12, 768]
    for value, style, label in ((size.hellaswag, ":", "OpenAI GPT-2"),
                                (size.gpt3_hellaswag, "--", "GPT-3")):
        axes.axhline(value, color=PUBLISHED, linestyle=style, linewidth=1,
                     label=f"{label} {size.name} {value:.3f}")
    axes.axhline(0.25, color=PUBLISHED, linewidth=0.5)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + (0.3 + 0.15 * len(entries)) * (high - low))  # the legend's place
    axes.set_ylabel("acc_norm (chance: 0.25)")


PICTURES: dict[str, tuple[str, Draw]] = {
    "loss": ("Loss", draw_losses),
    "difference": ("Validation loss minus the published run's", draw_differences),
    "hellaswag": ("HellaSwag", draw_hellaswag),
    "lr": ("Learning rate", draw_column("lr")),
    "grad_norm": ("Gradient norm", draw_column("grad_norm", clip=True)),
    "tokens_per_second": ("Tokens a second", draw_column("tokens_per_second", clip=True)),
    "mfu": ("Model FLOPs utilisation", draw_column("mfu", unit="%", scale=100, clip=True)),
}


def _coloured(entries: list[Entry]) -> list[tuple[Entry, str]]:
    return [(entry, RUN_COLOURS[i % len(RUN_COLOURS)]) for i, entry in enumerate(entries)]


def _size(entries: list[Entry]) -> Any:
    """OpenAI's figures for this shape; None for a shape of one's own, or runs of several."""
    shapes = {(model.get("n_layer"), model.get("n_embd"))
              for model in (entry.record.settings("model") for entry in entries)}
    return SIZES.get(shapes.pop()) if len(shapes) == 1 else None


def _line(axes: "Axes", series: Series, colour: str, label: str, faint: bool = False) -> None:
    """A line of at most POINTS points: means, in a band from the smallest value to the largest."""
    if not len(series.values):
        return
    tokens, values = series.tokens, series.values
    if len(values) > POINTS:
        cuts = np.linspace(0, len(values), POINTS + 1).astype(int)[:-1]
        counts = np.diff([*cuts, len(values)])
        low, high = np.minimum.reduceat(values, cuts), np.maximum.reduceat(values, cuts)
        tokens, values = tokens[cuts], np.add.reduceat(values, cuts) / counts
        axes.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)
    marker = "." if len(values) == 1 else ""
    axes.plot(tokens, values, color=colour, linewidth=1, alpha=0.6 if faint else 1, marker=marker,
              label=label or "_none")


def _published(axes: "Axes", points: Points | None, label: str, end: float) -> None:
    """A published curve as far as the runs have come, with one point more."""
    if points is None:
        return
    count = int(np.searchsorted(points.tokens, end)) + 1
    axes.plot(points.tokens[:count], points.values[:count], color=PUBLISHED, linestyle="--",
              linewidth=1.2, label=label)


def _mark_events(axes: "Axes", record: Record) -> None:
    """A vertical line at each event, under the curves."""
    events = record.events()
    for kind, (colour, style) in EVENT_STYLES.items():
        places = [event.tokens for event in events if event.kind == kind][:MARKS]
        axes.vlines(places, 0, 1, transform=axes.get_xaxis_transform(), color=colour,
                    linestyle=style, linewidth=1, alpha=0.8, zorder=0)


def _count(number: float, _: float) -> str:
    """2_500_000_000 -> '2.5B', as this field counts tokens."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= unit:
            return f"{number / unit:g}{letter}"
    return f"{number:g}"


def _plain(text: str) -> str:
    """A name that matplotlib takes as it stands: no mathematics, no hidden legend."""
    return text.replace("$", r"\$").replace("\n", " ").lstrip("_") or "run"


def _svg(figure: "Figure", name: str, title: str) -> str:
    """The figure as an element without a reference to anything outside it."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    body = svg[svg.index(">") + 1 :].replace(INK, "currentColor")
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # it would hold for the page
    # Ids are hashes of what they name, and two pictures may have one in common.
    body = re.sub(r'(\bid="|\bhref="#|\burl\(#)', rf"\g<1>{name}-", body)
    width, height = (72 * inches for inches in figure.get_size_inches())
    label = html.escape(title)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{body}'
