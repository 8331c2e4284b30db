"""A lesson as a page: text beside code, what came out below, nothing from a network."""

import re
import sys
from pathlib import Path

import pytest

from lessons import course, render
from tests.running import ROOT

LESSONS = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.py"))
LESSON = '''"""Lesson 99: one and one.

    python lessons/99_one.py

Needs nothing.
"""

# %% A sum
# It is `2`, by
#     1 + 1 = 2
# and <nothing> else.
from lessons import course
import inspect

def f(a):
    return a + 1

course.figure("sum", f(1), 2, 2)
print(inspect.getsource(f))

# %% A picture
from matplotlib.figure import Figure
drawing = Figure(figsize=(1, 1))
drawing.subplots().set(title="one & one", xlabel="step")
course.picture(drawing, "sum")

# %% A miss
course.figure("other sum", 3, 2, 2)

# %% Never reached
print("reached")
'''


@pytest.fixture
def page(tmp_path, monkeypatch) -> str:
    """The page of LESSON."""
    monkeypatch.setattr(course, "OUT", tmp_path)
    monkeypatch.setattr(course, "pictures", [])
    monkeypatch.setattr(course, "_stand_ins", set())
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    script = tmp_path / "99_one.py"
    script.write_text(LESSON)
    assert not render.run_and_render(script)
    render.write_index([script])
    return (tmp_path / "99.html").read_text()


def test_text_stands_beside_code_and_output(page):
    assert "<h1>Lesson 99: one and one</h1>" in page
    sections = page.split("<section")
    text, right = sections[2].split("</div><div>")
    assert ("<h2>A sum</h2><p>It is <code>2</code>, by</p><pre>1 + 1 = 2</pre>"
            "<p>and &lt;nothing&gt; else.</p>") in text
    code, said = right.split('<pre class="said">')
    assert "return" in code and "nothing" not in code
    assert re.search(r"sum +2  \(exactly 2\)", said)
    assert "def f(a):" in said, "source lines are those of the file"


def test_a_picture_is_said_in_words(page):
    assert '<img alt="sum, one &amp; one, step" src=' in page


def test_a_page_needs_no_network(page):
    assert 'src="data:image/png;base64,' in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:image|index\.html)", page)


def test_a_lesson_ends_at_the_figure_that_it_misses_and_says_so(page, tmp_path):
    assert page.count("other sum: 3 is outside, exactly 2") == 1, "at the cell that misses it"
    assert "stopped short of its figures" in page
    assert '<pre class="said">reached' not in page
    index = (tmp_path / "index.html").read_text()
    assert '<a href="99.html">Lesson 99: one and one</a><br><small>stopped short' in index


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_lesson_comes_apart_into_cells(path: Path):
    """Each compiles by itself, with the line numbers of the file."""
    source = path.read_text()
    parts = list(render.cells(source))
    assert len(parts) > 3
    assert parts[0][0].startswith(f"Lesson {int(path.name[:2])}: ")
    for heading, _, code in parts:
        assert heading
        compile(code, str(path), "exec")
        for number, line in enumerate(code.split("\n")):
            assert not line or line == source.split("\n")[number], "lines keep their numbers"
    assert any(prose for _, prose, _ in parts[1:])


def test_a_lesson_is_read_in_one_sitting():
    lengths = {path.name: len(path.read_text().splitlines())
               for path in sorted((ROOT / "lessons").glob("[01][0-9]_*.py"))}
    assert len(lengths) == 10
    assert all(100 <= lines <= 200 for lines in lengths.values()), lengths
    assert sum(lengths.values()) < 2000
