"""The grader: one line for each function whatever a student's file does, and a map at the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lessons import course
from tests.running import ROOT


def graded(*arguments: str) -> subprocess.CompletedProcess:
    """python -m lessons.grade as people run it: it forks, which this process had better not."""
    return subprocess.run([sys.executable, "-m", "lessons.grade", *arguments], cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_the_exercises_as_they_come_are_to_do():
    done = graded("1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" to do\n") == 5
    assert "01_micrograd         [.....] 0 of 5" in done.stdout


def test_every_way_to_fail_costs_a_line_and_no_more(tmp_path):
    Path(tmp_path, "e01.py").write_text('''
import os
import sys
def gradient(a, b, c): return None
def one_sided(f, at, h):
    while True: pass
def symmetric(f, at, h): os._exit(3)
def multiply_backward(a, b, out): out.gradient
def softmax_loss(logits, label):
    print("something")
    sys.exit("enough")
''')
    done = graded("01", "--answers", str(tmp_path))
    gradient, one_sided, symmetric, backward, softmax, _, map_line = done.stdout.splitlines()
    assert "wrong: the slopes: a list of 3 is asked for, not None: is there a return?" in gradient
    assert "wrong: no answer after " in one_sided
    assert one_sided.endswith(", and then it was at line 6 of e01.py")
    assert "wrong: its process ended without an answer (exit code 3)" in symmetric
    assert "wrong: AttributeError: " in backward and "(line 8 of e01.py)" in backward
    assert "wrong: SystemExit: enough (line 11 of e01.py)" in softmax
    assert map_line == "01_micrograd         [xxxxx] 0 of 5"
    assert done.returncode == 1


@pytest.mark.parametrize("source, told", [
    ("def gradient(a:\n", "wrong: e01.py can't be imported: "),
    ("import nothing_of_this_name\n", "wrong: ModuleNotFoundError: "),
    ("x = 1\n", "wrong: e01.py has no function of this name"),
])
def test_a_file_that_gives_no_function_is_told_so(tmp_path, source, told):
    Path(tmp_path, "e01.py").write_text(source)
    done = graded("01", "--answers", str(tmp_path))
    assert done.stdout.count(told) == 5, done.stdout + done.stderr


def test_a_file_that_is_never_imported_is_waited_for_once(tmp_path):
    Path(tmp_path, "e01.py").write_text("import sys\nprint('once', file=sys.stderr)\n"
                                        "while True: pass\n")
    wait_less = "from lessons import grade; grade.IMPORT = 0.5; "
    run = f"from pathlib import Path; grade.grade('01', Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", wait_less + run], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.stdout.count("wrong: e01.py is not imported after ") == 5, done.stdout + done.stderr
    assert done.stderr == "once\n"


def test_what_a_file_does_outside_its_functions_is_no_mistake(tmp_path):
    """Dataclasses look up their module; the checks need gradients, whatever a file switches off."""
    (tmp_path / "e04.py").write_text("""
from __future__ import annotations
from dataclasses import dataclass
import torch
from lessons.solutions.e04 import *
torch.set_grad_enabled(False)
@dataclass
class Own:
    x: int
""")
    done = graded("04", "--answers", str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "wrong" not in done.stdout and " right\n" in done.stdout


def test_however_an_answer_ends_it_is_one_line(tmp_path):
    (tmp_path / "e01.py").write_text("""
class Silent(Exception):
    def __str__(self): raise ValueError
def gradient(a, b, c): raise KeyboardInterrupt
def one_sided(f, at, h): raise Silent
def symmetric(f, at, h): raise ValueError("long " * 1000)
""")
    relative = os.path.relpath(tmp_path, ROOT)
    done = graded("01", "--answers", relative)
    gradient, one_sided, symmetric, *_ = done.stdout.splitlines()
    assert gradient.endswith("wrong: KeyboardInterrupt (line 4 of e01.py)")
    assert one_sided.endswith("wrong: Silent (line 5 of e01.py)")
    assert symmetric.endswith("(line 6 of e01.py)") and len(symmetric) < 400
    assert done.stderr == ""
    (tmp_path / "e01.py").write_bytes(b"x = 1\0")
    assert "wrong: e01.py can't be imported: " in graded("01", "--answers", relative).stdout


def test_a_folder_without_answers_is_named(tmp_path):
    done = graded("--answers", str(tmp_path))
    assert done.returncode == 2
    assert "holds none of e01.py to e10.py: copy lessons/exercises" in done.stderr


@pytest.mark.parametrize("arguments, told", [
    (("11",), "there is no lesson 11: 01, 02"), (("--answers", "nowhere"), "no folder nowhere"),
])
def test_what_is_not_there_is_named(arguments, told):
    done = graded(*arguments)
    assert done.returncode == 2
    assert told in done.stderr


# ---- figures ----

def test_a_figure_is_held_to_both_ends_of_its_band(capsys, monkeypatch):
    monkeypatch.setattr(course, "_stand_ins", set())
    course.figure("loss", 2.05, 2.0, 2.1, lecture="2.04")
    assert capsys.readouterr().out.split() == ["loss", "2.0500", "(lecture", "2.04;", "band",
                                               "2.0", "..", "2.1)"]
    for value in (1.99, 2.11, float("nan")):
        with pytest.raises(SystemExit, match="is outside, band 2.0 .. 2.1"):
            course.figure("loss", value, 2.0, 2.1)


def test_an_exact_figure_is_held_to_the_digits_it_is_written_with(monkeypatch):
    monkeypatch.setattr(course, "_stand_ins", set())
    course.figure("loss", 2.45404, 2.454, 2.454)
    course.figure("count", 6763, 6763, 6763)
    with pytest.raises(SystemExit, match="2.455 is outside, exactly 2.454"):
        course.figure("loss", 2.45451, 2.454, 2.454)


@pytest.mark.parametrize("value", [0.4, -0.4, 1e-9])
def test_a_count_is_not_rounded_to_the_right_one(monkeypatch, value):
    monkeypatch.setattr(course, "_stand_ins", set())
    course.figure("ids that differ", 0, 0, 0)
    course.figure("ids that differ", 0.0, 0, 0)
    with pytest.raises(SystemExit, match=f"{value:.1g}.* is outside, exactly 0"):
        course.figure("ids that differ", value, 0, 0)


def test_the_embedded_band_is_for_the_text_that_is_missing(monkeypatch):
    monkeypatch.setattr(course, "_stand_ins", {course.NAMES.file})
    assert course.embedded(course.NAMES) and not course.embedded(course.SHAKESPEARE)
    course.figure("letters", 4, 4, 4, embedded=(9, 9), text=course.SHAKESPEARE)
    course.figure("letters", 9, 4, 4, embedded=(9, 9), text=course.NAMES)
    course.figure("letters", 9, 4, 4, embedded=(9, 9))
    with pytest.raises(SystemExit, match="exactly 4"):
        course.figure("letters", 9, 4, 4, text=course.SHAKESPEARE)


def test_another_file_of_the_name_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2_TEST_DATA", str(tmp_path))
    (tmp_path / "names.txt").write_text("emma\n")
    with pytest.raises(SystemExit) as leaving:
        course.names()
    assert leaving.value.code == 2
    assert "is another file than https://" in capsys.readouterr().err


def test_without_a_network_the_embedded_text_has_bands_of_its_own(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(course, "_stand_ins", set())
    monkeypatch.setattr(course, "OUT", tmp_path)
    monkeypatch.delenv("GPT2_TEST_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = course.names()
    assert course.embedded()
    assert words[:3] == ["in", "the", "beginning"]
    assert len(set(words)) == len(words) == 12_207
    said = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set: the embedded text stands in" in said
    assert str(tmp_path / "data" / "names.txt") in said and "GPT2_TEST_DATA" in said
    course.figure("loss", 5.0, 2.0, 2.1, embedded=(4.0, 6.0))
    course.figure("loss", 5.0, 2.0, 2.1)
    assert "on the embedded text; no band" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        course.figure("loss", 2.05, 2.0, 2.1, embedded=(4.0, 6.0))
