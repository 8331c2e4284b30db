"""Pictures: drawn whatever the environment says, and never a reason for a run to end otherwise."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from eval.report import plot_losses, write_report
from eval.report.charts import Entry, draw_gradient_norm, draw_losses, mark_events
from eval.report.pictures import HEIGHT, WIDTH, matplotlib_style, put_legend
from eval.report.record import read_records
from eval.report.verdict import judge
from tests.running import ROOT, environment

ROWS = [{"step": step, "tokens": 10 * step, "train_loss": 5.0 - step} for step in range(3)]
# A locale whose text and names are ASCII, without Python's own way round it (PEP 538, PEP 540).
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


# Draws both kinds of picture; says whether pyplot, which picks a window system, had a part in it.
DRAW = """
import sys
from pathlib import Path
from eval.report import plot_losses
from eval.report.__main__ import Arguments, main
from launch.errors import one_line_errors
assert "matplotlib" not in sys.modules
run = Path(sys.argv[1])
with one_line_errors():
    assert plot_losses(run)
    main(Arguments(runs=(run,)))
assert "matplotlib.pyplot" not in sys.modules
"""


@pytest.mark.parametrize("more", [
    {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},  # Colab's, Jupyter's
    {"MPLBACKEND": "TkAgg", "DISPLAY": ""},
    {"MPLBACKEND": "nonsense"},
    ASCII,
], ids=["notebook", "no display", "nonsense", "ASCII"])
def test_a_report_is_written_in_any_environment(tmp_path, more):
    run = make_run(tmp_path / "modèle ☃")
    done = subprocess.run([sys.executable, "-c", DRAW, str(run)], capture_output=True, timeout=120,
                          cwd=ROOT, env=environment(**more))
    assert (done.returncode, done.stderr) == (0, b"")
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "<h1>modèle ☃</h1>" in page
    assert (run / "report" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_matplotlibrc_changes_no_picture(tmp_path, monkeypatch):
    """text.usetex would ask for LaTeX, and a user's colours for other bytes."""
    import matplotlib

    plain = plot_losses(make_run(tmp_path / "plain" / "run"))
    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9}):
        styled = plot_losses(make_run(tmp_path / "styled" / "run"))
        assert matplotlib.rcParams["text.usetex"]  # and it is the user's again
    assert plain and styled
    assert plain.read_bytes() == styled.read_bytes()


def no_run(run: Path, monkeypatch) -> None:
    (run / "metrics.jsonl").unlink()


def folder_is_a_file(run: Path, monkeypatch) -> None:
    (run / "report").write_text("")


def no_matplotlib(run: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)


def no_memory(run: Path, monkeypatch) -> None:
    def fail(*_):
        raise MemoryError
    monkeypatch.setattr("eval.report.pictures.draw_losses", fail)


@pytest.mark.parametrize(("spoil", "words"), [
    (no_run, "is no run"), (folder_is_a_file, "can't write"), (no_matplotlib, "Error"),
    (no_memory, "MemoryError"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_picture_that_fails_is_one_line(tmp_path, monkeypatch, capsys, spoil, words):
    run = make_run(tmp_path / "run")
    spoil(run, monkeypatch)
    assert plot_losses(run) is None
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("no picture of the losses: ")
    assert words in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("stream", ["full", "closed", "absent"])
def test_a_line_that_cannot_be_printed_is_dropped(tmp_path, monkeypatch, stream):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    closed = io.StringIO()
    closed.close()
    streams = {"full": Full(), "closed": closed, "absent": None}  # absent: started with 2>&-
    monkeypatch.setattr(sys, "stderr", streams[stream])
    assert plot_losses(tmp_path / "none") is None


def test_names_of_any_bytes_make_a_page(tmp_path):
    """A file system holds bytes; what isn't UTF-8 is shown as U+FFFD."""
    run = make_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    page, _ = write_report([run])
    assert "<h1>caf\ufffd</h1>" in page.read_text(encoding="utf-8")


def axes_of(draw, runs: list[Path]):
    """(figure, axes, legend's labels) of a chart of some runs, as pictures.py makes it."""
    entries = [Entry(record, judge(record)) for record in read_records(runs)]
    with matplotlib_style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes, entries)
        mark_events(axes, entries)
        put_legend(figure, axes)
        canvas.draw()
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return figure, axes, labels


def falling_run(folder: Path, steps: int) -> Path:
    """A loss of 10.8 that has fallen to 5 by step 20 and goes on to 4 at the last, with the
    gradient norm 20 at step 1, 0.5 later, and 90 once; skipped and stopped."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        loss = max(10.8 - 5.8 * step / 20, 5 - step / steps)
        norm = {1: 20.0, 25: 90.0}.get(step, 0.5)
        rows.append({"step": step, "tokens": 10 * step, "train_loss": loss, "grad_norm": norm})
    rows.append({"step": steps, "tokens": 10 * steps, "val_loss": 4.0, "val_set": "x, 9 tokens"})
    rows.append({"step": 25, "tokens": 250, "event": "skipped step 25: gradient norm 90"})
    rows.append({"step": steps, "tokens": 10 * steps, "event": "stopped by SIGTERM"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_losses_are_drawn_as_they_are_after_the_first_steps(tmp_path):
    """4 % of 40 steps is the second, at 10.2; three quarters of the fall are done by step 18."""
    _, axes, _ = axes_of(draw_losses, [falling_run(tmp_path / "short", 40)])
    low, high = axes.get_ylim()
    assert low < 4.0 and 5.0 < high < 6.0
    _, axes, _ = axes_of(draw_losses, [falling_run(tmp_path / "long", 2_000)])
    assert 4.96 < axes.get_ylim()[1] < 5.1


def test_a_loss_that_rises_again_stays_in_the_picture(tmp_path):
    run = falling_run(tmp_path / "run", 40)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, "tokens": 410, "train_loss": 12.0}) + "\n")
    _, axes, _ = axes_of(draw_losses, [run])
    assert axes.get_ylim()[1] > 12.0


def test_a_run_from_weights_is_drawn_from_its_beginning(tmp_path):
    """It falls by 0.5 in all: the first steps are what one wants to see."""
    rows = [{"step": step, "tokens": 10 * step, "train_loss": 3.5 - 0.05 * min(step, 10)}
            for step in range(1, 21)]
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, axes, _ = axes_of(draw_losses, [run])
    assert axes.get_ylim()[1] > 3.45


def test_early_and_outlying_gradient_norms_are_inside(tmp_path):
    _, axes, _ = axes_of(draw_gradient_norm, [falling_run(tmp_path / "run", 2_000)])
    low, high = axes.get_ylim()
    assert 0 < low < 0.5 and high > 90
    assert axes.get_yscale() == "log"


def test_norms_of_zero_are_no_obstacle(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [{"step": step, "tokens": step, "grad_norm": 0.0} for step in range(3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, axes, _ = axes_of(draw_gradient_norm, [run])
    assert axes.get_yscale() == "linear"


@pytest.mark.parametrize("draw", [draw_losses, draw_gradient_norm])
def test_the_key_names_the_lines_of_events(tmp_path, draw):
    runs = [falling_run(tmp_path / name, 40) for name in "ab"]
    _, axes, labels = axes_of(draw, runs)
    assert labels.count("spike") == labels.count("stop") == 1
    assert "restart" not in labels
    lines = axes.collections[-4:]
    colours = [to_hex(line.get_color()[0]) for line in lines]
    assert colours == ["#e5484d", "#e5484d", "#b58900", "#b58900"]


def test_a_key_of_long_names_covers_nothing_and_is_all_there(tmp_path):
    names = [f"{'gpt2-with-a-long-name-' * 5}{i}" for i in range(4)]
    runs = [falling_run(tmp_path / name, 40) for name in names]
    figure, axes, labels = axes_of(draw_losses, runs)
    box = figure.legends[0].get_window_extent()
    # Within 2 pixels, of the border that a legend has.
    assert box.x0 >= -2 and box.x1 <= figure.bbox.x1 + 2
    assert box.y0 >= -2 and box.y1 <= axes.get_tightbbox().y0
    assert axes.bbox.height > 0.55 * HEIGHT * figure.dpi
    words = "".join("".join(labels).split())
    assert all(f"{name}:val4.0000" in words for name in names)
