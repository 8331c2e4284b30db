"""The speedrun has GPT-2's loss with half the tokens, and how that is found out."""

import json
import math
import sys
from pathlib import Path

import pytest

from eval import speedrun_cpu
from eval.speedrun_cpu import Arguments, Point, Runs, Training, at_loss, main, times_fewer, verdict
from launch.errors import BadInput, Failed


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """The short form's folder. A run was cut in it before, and left half a file."""
    out = tmp_path_factory.mktemp("speedrun-cpu")
    cut = out / "speedrun-80-seed-1"
    cut.mkdir()
    (cut / "metrics.jsonl").write_text('{"step": 80, "val_loss": 0.1}\n')
    main(Arguments(out=out, short=True))
    return out


def loss(folder: Path, name: str) -> float:
    return json.loads((folder / "results.json").read_text())[name]["result"]["val_loss"]


def test_half_the_tokens_are_enough(short):
    # Measured: 2.4155 after 160 steps of GPT-2, 1.9969 after 80 of the speedrun (2.0003 +- 0.0031
    # over three seeds). The file that was there before says 0.1.
    gpt2 = loss(short, "faithful-160-lr-0.003-warmup-0.1-seed-1")
    assert 1.0 < loss(short, "speedrun-80-seed-1") < gpt2


def test_started_again_it_trains_nothing_and_says_the_same(short, monkeypatch, capsys):
    monkeypatch.setattr(Runs, "_start", None)
    main(Arguments(out=short, short=True))
    said = capsys.readouterr().out
    assert "the faithful loss with at least 2.00 times fewer tokens" in said
    assert f"{loss(short, 'speedrun-80-seed-1'):.4f}" in said


def test_there_is_a_picture(short):
    assert (short / "speedrun_cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("target, cost", [
    (3.0, 100), (2.5, 200), (2.0, 400), (1.5, 800), (1.0, 1600),  # a line over log(cost)
    (3.5, 100), (0.5, math.inf),
])
def test_between_two_runs_the_loss_is_a_line_over_the_logarithm(target, cost):
    assert at_loss(target, [3.0, 2.0, 1.0], [100, 400, 1600]) == pytest.approx(cost)


def test_each_seed_is_compared_with_its_own():
    goal = Point(800, [2.0, 2.5], [40.0, 50.0])
    points = [Point(100, [3.0, 2.5], [10.0, 20.0]), Point(400, [1.0, 1.0], [40.0, 80.0])]
    tokens, seconds = times_fewer(goal, points)
    assert tokens == pytest.approx([4, 8])  # 200 and 100 of 800 steps
    assert seconds == pytest.approx([2, 2.5])  # 20 of 40 s, 20 of 50


def test_a_bound_is_called_one():
    goal = Point(800, [2.0], [40.0])
    before, behind = Point(100, [3.0], [5.0]), Point(400, [1.0], [9.0])
    assert "with 4.00 times" in verdict(goal, [before, behind])[0]
    assert "with at least 2.00 times" in verdict(goal, [behind])[0]
    assert verdict(goal, [before]) == ["the faithful loss was not reached with 102,400 tokens"]


@pytest.mark.parametrize("inputs", ["flags", "text", "first weights"])
def test_a_result_of_other_settings_or_another_text_is_none(short, tmp_path, inputs, monkeypatch):
    (tmp_path / "results.json").write_text((short / "results.json").read_text())
    text, speedrun = "", speedrun_cpu.speedrun(80, 1)
    assert Runs(tmp_path, text)._is_done(speedrun)
    if inputs == "flags":
        speedrun = Training(speedrun.name, [*speedrun.flags, "--optim.lr", "0.03"], 80)
    elif inputs == "text":
        text = str(tmp_path / "results.json")
    else:
        monkeypatch.setattr(speedrun_cpu, "FIRST_WEIGHTS", "drawn otherwise")
    assert not Runs(tmp_path, text)._is_done(speedrun)


def test_a_wrong_text_costs_the_line_that_train_gpt2_has_for_it(tmp_path):
    with pytest.raises(BadInput, match="^can't read the text none.txt: No such file") as error:
        main(Arguments(text="none.txt", out=tmp_path, short=True))
    assert error.value.exit_code == 2


def test_a_folder_that_is_none_and_a_damaged_file_cost_a_line(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(BadInput, match="results.json is damaged"):
        Runs(tmp_path, "")
    with pytest.raises(BadInput, match="results.json: File exists"):
        Runs(tmp_path / "results.json", "")


def test_a_run_that_breaks_is_named_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "command", lambda run, out: [sys.executable, "-c", "1 / 0"])
    with pytest.raises(Failed, match=r"^one ended with exit code 1, see .*one\.log: ZeroDivision"):
        Runs(tmp_path, "").train([Training("one", [], 1)])
