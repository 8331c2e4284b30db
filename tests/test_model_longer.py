"""Schedules other than the cosine, and a run that is given more steps."""

import shutil
from dataclasses import replace

import pytest
import torch

from launch.errors import BadInput
from launch.tracker import read_rows
from model.checkpoint import list_checkpoints
from model.optim import OptimConfig, decay_start, get_lr
from tests.running import losses, weights
from train_gpt2 import train

WSD = OptimConfig(lr=3e-3, warmup_steps=2, schedule="wsd", decay_ratio=0.5)
CONSTANT = OptimConfig(lr=3e-3, warmup_steps=2, schedule="constant")


def steps_of(run) -> list[int]:
    return [int(path.name[5:]) for path in reversed(list_checkpoints(run / "checkpoints"))]


def test_wsd_warms_up_stays_and_falls_in_a_line():
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule="wsd", decay_ratio=0.4, final_lr=0.1)
    rates = [get_lr(step, 100, config) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:61] == [1.0] * 51
    assert decay_start(100, config) == 60
    assert rates[61:] == pytest.approx([0.1 + 0.9 * (40 - i) / 40 for i in range(1, 41)])


def test_a_constant_rate_stays():
    assert {get_lr(step, 100, CONSTANT) for step in range(2, 100)} == {3e-3}
    assert get_lr(0, 100, CONSTANT) == 1.5e-3


def test_a_decay_as_long_as_the_run_begins_after_the_warm_up():
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule="wsd", decay_ratio=1.0)
    assert decay_start(100, config) == 10
    assert get_lr(10, 100, config) == 1.0
    assert get_lr(55, 100, config) == pytest.approx(0.5)


def test_a_finished_run_with_more_steps_is_the_longer_run(tiny, tmp_path, capsys):
    """12 steps after 8, from the step at which the rate of the 8 began to fall: bit for bit the run
    that was to have 12 from the first. What the 8 ended with is still there."""
    settings = dict(optim=WSD, eval_every=100, save_every=3, keep=1)
    train(tiny(name="longer", steps=8, **settings))
    assert steps_of(tmp_path / "longer") == [4, 8]  # 4: the last of the full rate, against keep
    short = weights(tmp_path / "longer", 8)
    assert train(tiny(name="longer", steps=12, **settings)) == 0
    assert "step_00000008 is of the shorter run's decay" in capsys.readouterr().out
    train(tiny(name="whole", steps=12, **settings))
    assert losses(tmp_path / "longer") == losses(tmp_path / "whole")
    one, two = weights(tmp_path / "longer", 12), weights(tmp_path / "whole", 12)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert steps_of(tmp_path / "longer") == [6, 12]
    events = [row["event"] for row in read_rows(tmp_path / "longer" / "metrics.jsonl")
              if "event" in row]
    assert any(event.startswith("resumed on 1 ranks from") and "step_00000004" in event
               for event in events)
    shutil.move(tmp_path / "longer/decayed/step_00000008", tmp_path / "longer/checkpoints")
    kept = weights(tmp_path / "longer", 8)
    assert all(torch.equal(short[name], kept[name]) for name in short)


def test_a_constant_run_goes_on_from_its_end(tiny, tmp_path):
    settings = dict(optim=CONSTANT, eval_every=100, save_every=100)
    train(tiny(name="longer", steps=4, **settings))
    train(tiny(name="longer", steps=6, **settings))
    train(tiny(name="whole", steps=6, **settings))
    assert losses(tmp_path / "longer") == losses(tmp_path / "whole")
    assert not (tmp_path / "longer" / "decayed").exists()


def test_what_can_not_be_made_longer_says_why_and_is_left_alone(tiny, tmp_path):
    train(tiny(name="cosine", steps=4))
    with pytest.raises(BadInput, match=r"a cosine falls towards its last step.*--init"):
        train(tiny(name="cosine", steps=6))
    with pytest.raises(BadInput, match="optim.schedule cosine there, wsd asked; steps 4 there, 6"):
        train(tiny(name="cosine", steps=6, optim=replace(tiny().optim, schedule="wsd")))
    train(tiny(name="wsd", steps=8, optim=WSD, save_every=100))
    with pytest.raises(BadInput, match="of 8 steps, and 6 are asked: fewer can't"):
        train(tiny(name="wsd", steps=6, optim=WSD))
    with pytest.raises(BadInput, match=r"warms up for 2 .*: add --optim.warmup_steps 2, or name"):
        train(tiny(name="wsd", steps=12, optim=replace(WSD, warmup_steps=3)))
    with pytest.raises(BadInput, match="seed 1337 there, 1 asked"):
        train(tiny(name="wsd", steps=12, seed=1, optim=WSD))
    with pytest.raises(BadInput, match="step_00000008 is of a decay that began after step 4"):
        train(tiny(name="branch", steps=12, optim=WSD,
                   resume=str(tmp_path / "wsd/checkpoints/step_00000008")))
    assert steps_of(tmp_path / "wsd") == [0, 4, 8]
    for step in ("00000000", "00000004"):
        shutil.rmtree(tmp_path / f"wsd/checkpoints/step_{step}")
    with pytest.raises(BadInput, match="no checkpoint from before its rate began to fall.*--init"):
        train(tiny(name="wsd", steps=12, optim=WSD))
    assert steps_of(tmp_path / "wsd") == [8]
