"""What --diagnose_every has recorded of a run, as pictures: its network from the inside.

A run by itself shows a line for each block or kind of matrix; several runs show a line each, the
mean over them. What is drawn is explained in model/diagnostics.py.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.report.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from eval.report.charts import Draw, Entry

COLOURS = ("#2f80ed", "#e0620d", "#1f9d55", "#a855f7", "#d6336c", "#0e9aa7")  # as in charts.py
NAMED_LAYERS = 4  # in a key, at most
HINT = ("Recorded by --diagnose_every. Healthy: activations and gradients of all blocks in one "
        "order of magnitude; updates near a thousandth of the weights, log10 about -3.")


def draw_activations(axes: "Axes", entries: "list[Entry]") -> None:
    """Standard deviation of the residual stream behind each block."""
    _layers(axes, entries, "activation_std", "standard deviation")


def draw_gelu_off(axes: "Axes", entries: "list[Entry]") -> None:
    """Hidden units that GELU lets next to nothing through of."""
    _layers(axes, entries, "gelu_off", "share below -3")


def draw_gradients(axes: "Axes", entries: "list[Entry]") -> None:
    """Standard deviation of the loss's gradient in that stream."""
    _layers(axes, entries, "gradient_std", "standard deviation", logarithmic=True)


def draw_weight_gradients(axes: "Axes", entries: "list[Entry]") -> None:
    """Each matrix's gradient over the matrix itself."""
    _matrices(axes, entries, "gradient_to_data")
    if axes.has_data():
        axes.set(yscale="log", ylabel="std over std")


def draw_updates(axes: "Axes", entries: "list[Entry]") -> None:
    """Each matrix's update over the matrix itself."""
    _matrices(axes, entries, "log10_update_to_data")
    if axes.has_data():
        axes.axhline(-3, color="#8a8f98", linewidth=1, linestyle=":")
        axes.set_ylabel("log10 of std over std")


CHARTS: "dict[str, tuple[str, Draw]]" = {
    "activations": ("Activations: the stream behind each block", draw_activations),
    "gelu_off": ("Hidden units that GELU switches off", draw_gelu_off),
    "gradients": ("Gradients: in the stream behind each block", draw_gradients),
    "weight_gradients": ("Weight gradients: gradient to data", draw_weight_gradients),
    "updates": ("Updates: update to data", draw_updates),
}


def section(figures: str) -> str:
    """These pictures on the page, under a heading of their own; '' where there is none."""
    if not figures:
        return ""
    return (f'<h2>Inside the network</h2><section class="charts">{figures}</section>'
            f'<p class="hint">{HINT}</p>')


def layer_table(record: Record, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (R,), figures (R, blocks)) of R recorded steps; NaN where a figure was none."""
    rows: list[tuple[int, list[Any]]] = []
    for tokens, diagnosis in _diagnoses(record):
        values = diagnosis.get(key)
        if isinstance(values, list) and values and (not rows or len(values) == len(rows[0][1])):
            rows.append((tokens, values))
    return _table(rows)


def matrix_tables(record: Record, key: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each kind of matrix, such as attn.c_proj: tokens, and a column for each block's."""
    rows: dict[str, list[tuple[int, list[Any]]]] = {}
    for tokens, diagnosis in _diagnoses(record):
        weights = diagnosis.get("weights")
        kinds: dict[str, list[Any]] = {}
        for name, figures in weights.items() if isinstance(weights, dict) else ():
            if isinstance(figures, dict):
                kinds.setdefault(kind_of(name), []).append(figures.get(key))
        for kind, values in kinds.items():
            if len(values) == len(rows.get(kind, [(0, values)])[0][1]):
                rows.setdefault(kind, []).append((tokens, values))
    return {kind: _table(found) for kind, found in rows.items()}


def kind_of(name: str) -> str:
    """h.3.attn.c_attn.weight -> attn.c_attn; wte.weight -> wte."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[2:] if parts[0] == "h" else parts)


def _diagnoses(record: Record) -> list[tuple[int, dict[str, Any]]]:
    return [(row["tokens"], row["diagnosis"]) for row in record.rows
            if isinstance(row.get("diagnosis"), dict)]


def _table(rows: list[tuple[int, list[Any]]]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([row[0] for row in rows], dtype=float)
    values = [[_figure(value) for value in row[1]] for row in rows]
    return tokens, np.array(values, dtype=float)


def _figure(value: Any) -> float:
    """The file may be anybody's: what is no finite number is NaN, and isn't drawn."""
    if isinstance(value, int | float) and abs(value) < 1e300 and math.isfinite(value):
        return float(value)
    return math.nan


def _layers(
    axes: "Axes", entries: "list[Entry]", key: str, label: str, logarithmic: bool = False
) -> None:
    for entry, colour in zip(entries, COLOURS * len(entries), strict=False):
        tokens, values = layer_table(entry.record, key)  # (R,), (R, blocks)
        if not np.isfinite(values).any():
            continue
        if len(entries) > 1:
            _line(axes, tokens, values.mean(1), colour, entry.record.name)
            continue
        blocks = values.shape[1]
        named = set(np.linspace(0, blocks - 1, min(blocks, NAMED_LAYERS)).round().astype(int))
        for block in range(blocks):
            shade = _shade(block / max(1, blocks - 1))
            _line(axes, tokens, values[:, block], shade, f"block {block}" * (block in named))
    if axes.has_data():
        axes.set_ylabel(label)
        if logarithmic:
            axes.set_yscale("log")


def _matrices(axes: "Axes", entries: "list[Entry]", key: str) -> None:
    for entry, colour in zip(entries, COLOURS * len(entries), strict=False):
        tables = matrix_tables(entry.record, key)
        tables = {kind: table for kind, table in tables.items() if np.isfinite(table[1]).any()}
        if len(entries) > 1 and tables:
            tokens = next(iter(tables.values()))[0]
            same = [values for times, values in tables.values() if len(times) == len(tokens)]
            _line(axes, tokens, np.concatenate(same, 1).mean(1), colour, entry.record.name)
            continue
        for (kind, (tokens, values)), own in zip(tables.items(), COLOURS * 99, strict=False):
            axes.fill_between(tokens, values.min(1), values.max(1), color=own, alpha=0.15,
                              linewidth=0)
            _line(axes, tokens, values.mean(1), own, kind)


def _line(axes: "Axes", tokens: np.ndarray, values: np.ndarray, colour: str, name: str) -> None:
    name = name.replace("$", r"\$").lstrip("_")  # no mathematics, no hidden key
    axes.plot(tokens, values, color=colour, linewidth=1, marker="." if len(tokens) == 1 else "",
              label=name or "_none")


def _shade(depth: float) -> str:
    """Blue for the first block, orange for the last."""
    first, last = (0x2F, 0x80, 0xED), (0xE0, 0x62, 0x0D)
    mixed = [round(a + (b - a) * depth) for a, b in zip(first, last, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
