"""Charts as files: each is drawn once, as a PNG and as an SVG that takes the page's colours.

Figures are made by themselves and drawn by Agg (matplotlib's object-oriented interface): pyplot,
and with it a choice of window system or notebook, has no part in it.
"""

import contextlib
import html
import io
import math
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.report import network
from eval.report.charts import CHARTS, Draw, Entry, draw_losses, mark_events, plain, token_count
from eval.report.record import read_record
from launch.errors import BadInput, Failed
from launch.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#020304"  # of text and axes; the SVG takes the page's instead
WIDTH, HEIGHT, LINE_HEIGHT = 4.3, 2.8, 0.16  # inches; the last is added for a line of the key
LINE_LETTERS, COLUMN_LETTERS = 58, 25  # that the width holds, of the key's 8 points
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color",
         "grid.color")
STYLE: dict[Any, Any] = {
    "font.size": 9, "font.family": "sans-serif", "axes.titlesize": 9.5, "legend.fontsize": 8,
    "svg.fonttype": "none", "svg.hashsalt": "report", "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "axes.titlelocation": "left",
    **dict.fromkeys(INKED, INK),
}


class Picture(NamedTuple):
    """name: of the PNG, without its ending. svg: one element, to be put into HTML."""

    name: str
    title: str
    svg: str
    png: bytes


def plot_losses(run: Path) -> Path | None:
    """Draws train and validation loss against tokens from metrics.jsonl; returns the PNG's path.

    A run that was stopped before its first loss gets an empty picture. This is the last thing that
    a run does, and no picture may change how it ends: where there can be none (a broken matplotlib,
    a full disk, no such run) standard error gets a line that says why, and the answer is None.
    """
    try:
        return _plot_losses(run)
    except Exception as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, BadInput):
            reason = f"{type(error).__name__}: {reason}"
        _complain(f"no picture of the losses: {reason}")
        return None


def _complain(line: str) -> None:
    """A line on standard error, which may be closed, or a file on a full disk."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def _plot_losses(run: Path) -> Path:
    record = read_record(run)

    def draw(axes: "Axes", entries: list[Entry]) -> None:
        draw_losses(axes, entries)
        if not axes.has_data():
            axes.plot([], [], label="no losses yet")

    picture = make_picture("loss", f"Loss of {record.name}", draw, [Entry(record, None)])
    assert picture  # `draw` always draws
    return write_picture(picture, run / "report")


def write_picture(picture: Picture, folder: Path) -> Path:
    """Writes folder/NAME.png. Raises Failed where that can't be done."""
    path = folder / f"{picture.name}.png"
    try:
        atomic_write(path, picture.png)
    except OSError as error:
        raise Failed(f"can't write {path}: {error.strerror}") from None
    return path


def make_pictures(entries: list[Entry]) -> list[Picture]:
    """Every picture that there are figures for."""
    pictures = []
    for name, (title, draw) in (CHARTS | network.CHARTS).items():
        picture = make_picture(name, title, draw, entries)
        if picture:
            pictures.append(picture)
    return pictures


def make_picture(name: str, title: str, draw: Draw, entries: list[Entry]) -> Picture | None:
    """One picture; None where `draw` found nothing to put into it."""
    with matplotlib_style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes, entries)
        if not axes.has_data():
            return None
        axes.set(title=plain(title), xlabel="tokens trained on")
        axes.xaxis.set_major_formatter(token_count)
        if name == "tokens_per_second":
            axes.yaxis.set_major_formatter(token_count)
        axes.grid(alpha=0.15)
        mark_events(axes, entries)
        put_legend(figure, axes)
        png = io.BytesIO()
        canvas.print_figure(png, format="png", dpi=160, facecolor="white")
        return Picture(name, title, _svg(figure, name, title), png.getvalue())


def put_legend(figure: "Figure", axes: "Axes") -> None:
    """The key under the picture, which grows by its lines: it covers no curve.

    Long names are broken into lines rather than cut: what tells two runs apart may be anywhere.
    """
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = 2 if max(map(len, labels)) <= COLUMN_LETTERS and len(labels) > 1 else 1
    broken = [textwrap.fill(label, LINE_LETTERS) for label in labels]
    lines = sum(label.count("\n") + 1 for label in broken) / columns
    figure.set_size_inches(WIDTH, HEIGHT + LINE_HEIGHT * math.ceil(lines))
    figure.legend(handles, broken, loc="outside lower left", ncols=columns)


@contextlib.contextmanager
def matplotlib_style() -> Iterator[None]:
    """matplotlib with STYLE over its own defaults, whatever the environment asks for.

    Its import fails where MPLBACKEND names a notebook's backend that isn't installed here (Colab
    and Jupyter pass theirs on to every process), and a matplotlibrc may want LaTeX.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.style
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        # The name of a run may hold characters that the font has not: they become boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _svg(figure: "Figure", name: str, title: str) -> str:
    """The figure as an element without a reference to anything outside it."""
    text = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    body = svg[svg.index(">") + 1 :].replace(INK, "currentColor")
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # it would hold for the page
    # Ids are hashes of what they name, and two pictures may have one in common.
    body = re.sub(r'(\bid="|\bhref="#|\burl\(#)', rf"\g<1>{name}-", body)
    width, height = 72 * figure.get_size_inches()  # points
    label = html.escape(title)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{body}'
