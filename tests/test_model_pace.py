"""--minutes N: the steps are planned from the first ones' speed, and are then as good as given."""

import json
import signal
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from eval import evaluator
from launch import cli, recovery, reports
from launch.errors import BadInput
from launch.tracker import read_rows
from model import pace
from model.optim import OptimConfig
from tests.running import losses, run_program, weights
from train_gpt2 import PRESETS, TrainConfig, train

READ, PACE = recovery.get_batch, pace.Pace
SCHEDULES = {
    "cosine": OptimConfig(lr=3e-3, warmup_steps=4),
    "wsd": OptimConfig(lr=3e-3, warmup_steps=4, schedule="wsd", decay_ratio=0.5),
}


class Clock:
    """Every look at it takes `tick` seconds: a step two looks, and so one tick."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def set_clock(monkeypatch, tick: float) -> None:
    """For the loop, the evaluations and the plan."""
    clock = Clock(tick)
    monkeypatch.setattr(reports, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(evaluator, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(pace, "Pace", lambda minutes: PACE(minutes, clock))


def stop_at(monkeypatch, step: int) -> None:
    """Has a signal come while the run is in this step for the last time; -1: never."""

    def stopped(run, now):
        if now == step and (step < pace.FEWEST or not run.pace.timing):
            signal.raise_signal(signal.SIGTERM)
        return READ(run, now)

    monkeypatch.setattr(recovery, "get_batch", stopped)


def planned(run) -> tuple[int, int, float, float]:
    """Steps, warm-up, minutes still to be planned, minutes it was planned for: by config.json."""
    saved = json.loads((run / "config.json").read_text())
    config = saved["config"]
    return (config["steps"], config["optim"]["warmup_steps"], config["minutes"],
            saved["resolved"]["minutes"])


@pytest.mark.parametrize(("step", "evaluation", "every"), [(1, 0, 7), (2, 5, 3), (3, 40, 250)])
def test_no_step_more_would_end_in_time(step, evaluation, every):
    for seconds in range(1, 400):
        steps = pace.steps_within(seconds, step, evaluation, every)

        def takes(n):
            return n * step + -(-n // every) * evaluation  # one after the last, too

        assert takes(steps) <= seconds or steps <= 0
        assert takes(max(steps, 0) + 1) > seconds


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_planned_run_is_the_one_that_was_given_its_steps(name, tiny, tmp_path, monkeypatch):
    """Bit for bit, and its warm-up has the preset's share, 4 of 40. The clock ticks a second at
    each look: steps and evaluations take one, the first save 3 (looks of others), and 19 have
    passed when 5 steps were timed, a twentieth of a minute. Two saves for going back, one and 3 s
    for the end: 29 s are left, for 20 steps with their evaluation, and 7 with theirs."""
    set_clock(monkeypatch, 1.0)
    settings = dict(optim=SCHEDULES[name], eval_every=20, save_every=10)
    assert train(tiny(name="minutes", minutes=1.0, steps=40, **settings)) == 0
    steps, warmup, to_plan, minutes = planned(tmp_path / "minutes")
    assert (steps, warmup, to_plan, minutes) == (27, 3, 0, 1)

    optim = replace(SCHEDULES[name], warmup_steps=warmup)
    train(tiny(name="steps", steps=steps, **(settings | {"optim": optim})))
    assert losses(tmp_path / "minutes") == losses(tmp_path / "steps")
    one, two = (weights(tmp_path / run, steps) for run in ("minutes", "steps"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = [[row for row in read_rows(tmp_path / run / "metrics.jsonl") if "val_loss" in row]
            for run in ("minutes", "steps")]
    assert rows[0] == rows[1]
    saved = [sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir())
             for run in ("minutes", "steps")]
    assert saved[0] == saved[1]


def test_a_run_that_goes_on_keeps_its_steps_on_another_day(tiny, tmp_path, monkeypatch):
    """Stopped at step 9 and started again on a machine ten times as slow; once by its folder."""
    set_clock(monkeypatch, 1.0)
    settings = dict(minutes=1.0, steps=40, eval_every=100, save_every=100)
    train(tiny(name="whole", **settings))
    steps = planned(tmp_path / "whole")[0]

    stop_at(monkeypatch, 9)
    train(tiny(name="halves", **settings))
    assert (tmp_path / "halves" / "STOPPED").exists()
    set_clock(monkeypatch, 10.0)
    stop_at(monkeypatch, 11)
    train(cli.parse(TrainConfig, PRESETS, [str(tmp_path / "halves")]))
    stop_at(monkeypatch, -1)
    assert train(tiny(name="halves", **settings)) == 0
    assert planned(tmp_path / "halves") == planned(tmp_path / "whole")
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == steps
    with pytest.raises(SystemExit, match="0"):  # the same command once more: finished
        train(tiny(name="halves", **settings))


def test_a_run_that_was_stopped_before_it_was_planned_begins_anew(tiny, tmp_path, monkeypatch):
    set_clock(monkeypatch, 1.0)
    settings = dict(minutes=1.0, steps=40, eval_every=100, save_every=2, keep=1)
    stop_at(monkeypatch, 3)
    train(tiny(name="again", **settings))
    assert [path.name for path in (tmp_path / "again" / "checkpoints").iterdir()] == [
        "step_00000000"]
    assert planned(tmp_path / "again")[2:] == (1, 0)
    stop_at(monkeypatch, -1)
    set_clock(monkeypatch, 1.0)
    assert train(tiny(name="again", **settings)) == 0
    steps, warmup = planned(tmp_path / "again")[:2]
    train(tiny(name="steps", steps=steps, eval_every=100, save_every=100,
               optim=replace(tiny().optim, warmup_steps=warmup)))
    assert losses(tmp_path / "again") == losses(tmp_path / "steps")


def test_two_ranks_plan_the_same(tiny, tmp_path):
    """By their own clocks, which differ; rank 0's counts."""
    config = tiny(minutes=0.3, batch_tokens=24 * 16, eval_every=10_000, save_every=10_000)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    done = run_program([str(tmp_path / "config.json")], ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = planned(tmp_path / "tiny")[0]
    assert [step for step, _ in losses(tmp_path / "tiny")] == [*range(1, steps + 1)]
    assert f"{steps:,} steps of " in done.stdout


def test_a_time_too_short_says_what_is_needed(tiny, tmp_path, monkeypatch):
    set_clock(monkeypatch, 3.0)
    with pytest.raises(BadInput, match=r"--minutes 0.5 leaves no time .* at least --minutes 1.8"):
        train(tiny(minutes=0.5, steps=40))
    monkeypatch.undo()
    assert planned(tmp_path / "tiny")[2:] == (0.5, 0)


@pytest.mark.parametrize(("arguments", "line"), [
    (["--minutes", "5", "--steps", "9"], "leave out --steps, or --minutes"),
    (["--minutes", "5", "--optim.warmup_steps", "9"], "leave out --optim.warmup_steps, or --min"),
    (["--minutes", "5", "--resume", "x"], "--minutes plans a new run, and --resume x goes on"),
    (["--minutes", "5", "--plan", "1xh100"], "--plan says what --steps take on that GPU"),
])
def test_what_does_not_go_with_minutes_is_refused_in_one_line(arguments, line):
    with pytest.raises(BadInput) as caught:
        train(cli.parse(TrainConfig, PRESETS, ["demo", *arguments]))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_minutes_of_another_run_are_refused(tiny, tmp_path, monkeypatch):
    train(tiny(name="steps", steps=1))
    with pytest.raises(BadInput, match="holds a run of 1 steps, and --minutes 1 is asked: choose"):
        train(tiny(name="steps", minutes=1.0))
    set_clock(monkeypatch, 1.0)
    train(tiny(name="minutes", minutes=1.0, steps=40))
    with pytest.raises(BadInput, match="holds a run of 1 minutes, and --minutes 2 is asked"):
        train(tiny(name="minutes", minutes=2.0, steps=40))


