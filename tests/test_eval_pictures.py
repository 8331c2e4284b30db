"""Pictures: drawn whatever the environment says, and never a reason for a run to end otherwise."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval.report import plot_losses, write_report
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
