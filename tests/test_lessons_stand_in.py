"""Without the lectures' texts: the quick lessons inside the bands of the embedded one."""

import os
from pathlib import Path

import pytest

from lessons import course
from lessons.stand_in import BANDS
from tests.lessons import run_lesson


@pytest.mark.parametrize("name, pictures", [
    ("02_bigrams.py", {"counts"}), ("05_backprop.py", ()), ("09_tokenizer.py", ())])
def test_a_lesson_on_the_embedded_text_is_inside_its_own_bands(tmp_path, name, pictures):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("GPT2_TEST_DATA", None)
    printed = run_lesson(name, pictures, tmp_path, environment)
    assert "on the embedded text; band" in printed or "on the embedded text; exactly" in printed
    assert "no band" not in printed


def test_a_figure_without_a_band_of_its_own_takes_the_lessons(monkeypatch):
    monkeypatch.setattr(course, "_stand_ins", {course.NAMES.file})
    monkeypatch.setattr(course, "figures", [])
    monkeypatch.setattr(course, "_script", lambda: Path("lessons/99_none.py"))
    monkeypatch.setitem(BANDS, "99", {"layer 1": (1.0, 2.0), "layer 1  std": (3.0, 4.0)})
    course.figure("layer 1", 1.5, 7.0, 8.0)
    course.figure("  std", 3.5, 7.0, 8.0)
    with pytest.raises(SystemExit, match="band 3.0 .. 4.0"):
        course.figure("  std", 1.5, 7.0, 8.0)
