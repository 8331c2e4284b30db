"""What each picture shows: one pair of axes over tokens, for a run or for several.

A chart draws nothing where nothing of its kind was recorded; pictures.py makes none of it then.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from eval.published import SIZES, Size
from eval.report.curves import Points
from eval.report.record import Record, Series
from eval.report.verdict import Verdict, expected

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of middling lightness, so that they stand out on white and on black; the first two tell run from
# published curve for colour-blind eyes too.
RUN_COLOURS = ("#2f80ed", "#e0620d", "#1f9d55", "#a855f7", "#d6336c", "#0e9aa7")
PUBLISHED = "#8a8f98"
EVENT_STYLES = {"spike": ("#e5484d", ":"), "restart": ("#b58900", "--"), "stop": ("#b58900", "-."),
                "other": ("#b58900", ":")}
FALL = 1.0  # nats: what a loss falls by at first, or it hasn't begun at random weights
POINTS = 600  # of a line, at most: more than a screen has columns
MARKS = 100  # of one kind of event in a picture, at most


class Entry(NamedTuple):
    """A run and what was found about it."""

    record: Record
    verdict: Verdict | None


Draw = Callable[["Axes", list[Entry]], None]


def draw_losses(axes: "Axes", entries: list[Entry]) -> None:
    """Training and validation losses, and the published run's where they are of the same data.

    The picture is as high as the curves after their first steps: the fall from ln(50257) leaves it
    at the top.
    """
    highest, lowest = [], []
    for entry, colour in _coloured(entries):
        train, val = entry.record.series("train_loss"), entry.record.series("val_loss")
        name = f"{plain(entry.record.name)}: " if len(entries) > 1 else ""
        _line(axes, train, colour, "" if name else "train", faint=True)
        if len(val.values):
            _dots(axes, val, colour, f"{name}val {val.values[-1]:.4f}")
        for series in (train, val):
            if len(series.values):
                highest.append(series.values[_settled(series) :].max())
                lowest.append(series.values.min())
    if not highest:
        return
    if len(entries) > 1:
        axes.plot([], [], color=PUBLISHED, linewidth=1, alpha=0.6, label="train: the fainter lines")
    verdicts = [entry.verdict for entry in entries if entry.verdict]
    curves = [verdict.val_curve for verdict in verdicts if verdict.val_curve]
    if curves:
        _published(axes, curves[0].val, f"{curves[0].title}, val", _last_tokens(entries))
        size = _openai_size(entries)
        if size:
            _level(axes, size.fineweb_loss, ":", f"OpenAI GPT-2 {size.name}, val")
            lowest.append(size.fineweb_loss)
    room = 0.05 * (max(highest) - min(lowest)) + 0.02
    axes.set_ylim(min(lowest) - room, max(highest) + room)
    axes.set_ylabel("nats a token")


def _settled(series: Series) -> int:
    """Where a loss's first fall is over: the place from which on it is drawn whole.

    That is past the first 4 % of the tokens, which is enough for a long run, and past three
    quarters of the way from the first value to the lowest, which a short one spends its first
    steps on. A fall by less than FALL is none: a run that starts from weights, or one that rises.
    """
    values = series.values
    late = int(np.argmax(series.tokens >= 0.04 * series.tokens[-1]))
    fall = values[0] - values.min()
    if fall < FALL:
        return late
    return max(late, int(np.argmax(values <= values[0] - 0.75 * fall)))


def draw_differences(axes: "Axes", entries: list[Entry]) -> None:
    """Validation loss minus the published run's at the same tokens, in the expected noise."""
    band_drawn = False
    for entry, colour in _coloured(entries):
        if entry.verdict is None or entry.verdict.val_curve is None:
            continue
        val = entry.record.series("val_loss")
        published, noise = expected(entry.verdict.val_curve, val.tokens)
        known = np.isfinite(published)
        if not known.any():
            continue
        tokens, noise = val.tokens[known], noise[known]
        if not band_drawn:
            axes.fill_between(tokens, -noise, noise, color=PUBLISHED, alpha=0.25, linewidth=0,
                              label="expected noise")
            axes.axhline(0, color=PUBLISHED, linewidth=1)
            axes.set_ylabel("nats a token")
            band_drawn = True
        difference = Series(val.steps[known], tokens, (val.values - published)[known])
        _dots(axes, difference, colour, plain(entry.record.name))


def draw_hellaswag(axes: "Axes", entries: list[Entry]) -> None:
    """HellaSwag's acc_norm, and what OpenAI's models of the same size reach."""
    for entry, colour in _coloured(entries):
        series = entry.record.series("hellaswag_acc_norm")
        if len(series.values):
            _dots(axes, series, colour, f"{plain(entry.record.name)} {series.values[-1]:.4f}")
    if not axes.has_data():
        return
    size = _openai_size(entries) or SIZES[12, 768]
    _level(axes, size.hellaswag, ":", f"OpenAI GPT-2 {size.name} {size.hellaswag:.3f}")
    _level(axes, size.gpt3_hellaswag, "--", f"GPT-3 {size.name} {size.gpt3_hellaswag:.3f}")
    axes.axhline(0.25, color=PUBLISHED, linewidth=0.5)
    axes.set_ylabel("acc_norm (chance: 0.25)")


def draw_learning_rate(axes: "Axes", entries: list[Entry]) -> None:
    _column(axes, entries, "lr")


def draw_gradient_norm(axes: "Axes", entries: list[Entry]) -> None:
    """The gradient's norm before clipping, and the published run's where the data are the same.

    Over a logarithm: the first norms are many times the last, and a spike's more; all are seen.
    """
    _column(axes, entries, "grad_norm")
    verdict = entries[0].verdict
    if axes.has_data() and verdict and verdict.train_curve:
        _published(axes, verdict.train_curve.grad_norm,
                   f"{verdict.train_curve.title}, mean of 50 steps", _last_tokens(entries))
    _logarithmic(axes, [entry.record.series("grad_norm").values for entry in entries])


def draw_speed(axes: "Axes", entries: list[Entry]) -> None:
    _column(axes, entries, "tokens_per_second")
    _frame(axes, entries, "tokens_per_second")


def draw_mfu(axes: "Axes", entries: list[Entry]) -> None:
    _column(axes, entries, "mfu", scale=100)
    _frame(axes, entries, "mfu", scale=100)
    axes.set_ylabel("%")


CHARTS: dict[str, tuple[str, Draw]] = {
    "loss": ("Loss", draw_losses),
    "difference": ("Validation loss minus the published run's", draw_differences),
    "hellaswag": ("HellaSwag", draw_hellaswag),
    "lr": ("Learning rate", draw_learning_rate),
    "grad_norm": ("Gradient norm", draw_gradient_norm),
    "tokens_per_second": ("Tokens a second", draw_speed),
    "mfu": ("Model FLOPs utilisation", draw_mfu),
}


def mark_events(axes: "Axes", entries: list[Entry]) -> None:
    """A vertical line at each event, under the curves; the legend names each kind once."""
    for kind, (colour, style) in EVENT_STYLES.items():
        label = kind if kind != "other" else "other event"
        for entry in entries:
            events = [event for event in entry.record.events() if event.kind == kind]
            if not events:
                continue
            places = [event.tokens for event in events[:MARKS]]
            axes.vlines(places, 0, 1, transform=axes.get_xaxis_transform(), color=colour,
                        linestyle=style, linewidth=1, alpha=0.8, zorder=0, label=label)
            label = "_none"  # no second line in the legend


def token_count(number: float, _position: float) -> str:
    """2_500_000_000 -> '2.5B', as this field counts tokens; a formatter of matplotlib's axes."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= unit:
            return f"{number / unit:g}{letter}"
    return f"{number:g}"


def plain(text: str) -> str:
    """A name that matplotlib takes as it stands: no mathematics, no hidden legend."""
    return text.replace("$", r"\$").replace("\n", " ").lstrip("_") or "run"


def _coloured(entries: list[Entry]) -> list[tuple[Entry, str]]:
    return [(entry, RUN_COLOURS[i % len(RUN_COLOURS)]) for i, entry in enumerate(entries)]


def _last_tokens(entries: list[Entry]) -> int:
    """How far the longest of the runs has come."""
    return max(entry.record.rows[-1]["tokens"] for entry in entries)


def _openai_size(entries: list[Entry]) -> Size | None:
    """OpenAI's figures for this shape; None for a shape of one's own, or runs of several."""
    models = [entry.record.settings("model") for entry in entries]
    shapes = {(model.get("n_layer"), model.get("n_embd")) for model in models}
    return SIZES.get(shapes.pop()) if len(shapes) == 1 else None


def _column(axes: "Axes", entries: list[Entry], key: str, scale: float = 1.0) -> None:
    """Draws one column of metrics.jsonl, times `scale`."""
    for entry, colour in _coloured(entries):
        series = entry.record.series(key)
        name = plain(entry.record.name) if len(entries) > 1 else ""
        _line(axes, series._replace(values=series.values * scale), colour, name)


def _frame(axes: "Axes", entries: list[Entry], key: str, scale: float = 1.0) -> None:
    """From 0 to a little more than the column's largest values, but for the largest 0.5 %."""
    columns = [entry.record.series(key).values * scale for entry in entries]
    tops = [np.quantile(values, 0.995) for values in columns if len(values)]
    if tops and max(tops) > 0:
        axes.set_ylim(0, 1.15 * max(tops))


def _logarithmic(axes: "Axes", columns: list[np.ndarray]) -> None:
    """A logarithmic axis on which all of the columns is seen, and all lines that are there."""
    from matplotlib.ticker import LogLocator, NullLocator

    lines = [np.asarray(line.get_ydata()) for line in axes.get_lines()]
    values = np.concatenate([*columns, *lines])
    values = values[values > 0]
    if not len(values):
        return
    axes.set_yscale("log")
    axes.set_ylim(values.min() / 1.2, values.max() * 1.2)
    marks = (1.0, 2.0, 5.0) if values.max() < 100 * values.min() else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=marks))
    axes.yaxis.set_major_formatter(_short)
    axes.yaxis.set_minor_locator(NullLocator())


def _short(number: float, _position: float) -> str:
    return f"{number:g}"


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
    alpha = 0.6 if faint else 1
    marker = "." if len(values) == 1 else ""
    axes.plot(tokens, values, color=colour, linewidth=1, alpha=alpha, marker=marker,
              label=label or "_none")


def _dots(axes: "Axes", series: Series, colour: str, label: str) -> None:
    """A line with a dot at each evaluation."""
    axes.plot(series.tokens, series.values, color=colour, marker="o", markersize=2.5, label=label)


def _published(axes: "Axes", points: Points | None, label: str, end: float) -> None:
    """A published curve as far as the runs have come, with one point more."""
    if points is None:
        return
    count = int(np.searchsorted(points.tokens, end)) + 1
    axes.plot(points.tokens[:count], points.values[:count], color=PUBLISHED, linestyle="--",
              linewidth=1.2, label=label)


def _level(axes: "Axes", value: float, style: str, label: str) -> None:
    """A published figure that belongs to no step: a line from left to right."""
    axes.axhline(value, color=PUBLISHED, linestyle=style, linewidth=1, label=label)
