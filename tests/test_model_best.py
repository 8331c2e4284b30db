"""--keep_best and --early_stop: the best checkpoint stays, and a run that gets no better ends."""

import json
from pathlib import Path

import pytest

from launch.tracker import Tracker, read_rows
from model.best import mark_best
from model.checkpoint import find_resume_checkpoint, newest_valid
from model.saving import Saver
from tests.running import ALONE, Silent, losses
from tests.saved import names, progress, trained, truncate
from train_gpt2 import train


class Recorded(Silent):
    """A tracker that knows the validation losses of these steps."""

    def __init__(self, val_losses: dict[int, float]) -> None:
        self.val_losses = val_losses

    def best_step(self) -> int:
        return min(self.val_losses, key=self.val_losses.__getitem__)

    def log_event(self, step: int, text: str) -> None:
        print(text)


def best(run: Path) -> dict:
    return json.loads((run / "checkpoints" / "best.json").read_text())


def test_the_best_stays_beside_the_newest(run, capsys):
    tracker = Recorded({1: 3.0, 2: 2.0})
    saver = Saver(run, trained(), tracker, keep=1, newest_step=2, keep_best=True)
    for step, loss in [(3, 2.5), (4, 4.0)]:
        tracker.val_losses[step] = loss
        saver.save(step, progress(step), wait=True)
    assert names(run) == ["best.json", "step_00000002", "step_00000004"]
    assert best(run) == {"checkpoint": "step_00000002", "step": 2, "val_loss": 2.0}
    assert newest_valid(run / "checkpoints")[0].name == "step_00000004"
    assert "best validation loss" not in capsys.readouterr().out

    tracker.val_losses[5] = 1.0
    saver.save(5, progress(5), wait=True)
    assert names(run) == ["best.json", "step_00000005"]  # one is both, and keep is 1
    assert best(run)["step"] == 5
    assert "best validation loss so far: " in capsys.readouterr().out


def test_a_run_begins_with_the_best_named(run):
    """It was killed between the checkpoint's last byte and best.json."""
    Saver(run, trained(), Recorded({1: 2.0, 2: 3.0}), 1, newest_step=2, keep_best=True)
    assert best(run)["step"] == 1


def test_a_checkpoint_that_the_run_went_back_from_is_not_the_best(run):
    """Step 2 is damaged, so its loss is of a branch that was given up."""
    truncate(run / "checkpoints" / "step_00000002")
    folder = mark_best(run / "checkpoints", run / "checkpoints" / "step_00000001", {1: 3.0, 2: 2.0})
    assert folder.name == "step_00000001"


def test_of_equal_losses_the_first_is_the_best_and_none_is_none(run):
    newest = run / "checkpoints" / "step_00000002"
    assert mark_best(newest.parent, newest, {1: 2.0, 2: 2.0}).name == "step_00000001"
    assert mark_best(newest.parent, newest, {7: 1.0}) is None


@pytest.fixture
def evaluates(monkeypatch):
    """evaluates(5.0, 4.0, ...): the validation losses of steps 0, 1, ... of runs to come."""

    def script(*val_losses: float) -> None:
        remaining = list(val_losses)
        monkeypatch.setattr("eval.evaluator.validation_loss", lambda *_: remaining.pop(0))

    return script


def test_a_better_step_is_saved_between_two_saves(tiny, tmp_path, evaluates):
    evaluates(5.0, 4.0, 3.0, 3.5, 3.2)
    assert train(tiny(steps=4, eval_every=1, save_every=4, keep=1, keep_best=True)) == 0
    assert names(tmp_path / "tiny") == ["best.json", "step_00000002", "step_00000004"]
    assert best(tmp_path / "tiny") == {"checkpoint": "step_00000002", "step": 2, "val_loss": 3.0}
    events = [row["event"] for row in read_rows(tmp_path / "tiny/metrics.jsonl") if "event" in row]
    assert events[-1].startswith("best validation loss so far: ")
    assert events[-1].endswith("step_00000002")


def test_the_best_is_where_another_run_can_begin(tiny, tmp_path, evaluates):
    """A branch of it trains what the run itself trained from there, bit for bit."""
    evaluates(5.0, 3.0, 3.5, 3.2, 5.0, 5.0, 5.0)
    assert train(tiny(steps=3, eval_every=1, save_every=3, keep_best=True)) == 0
    source = tmp_path / "tiny" / "checkpoints" / "step_00000001"
    assert find_resume_checkpoint(str(source), tmp_path / "branch") == source
    assert train(tiny(steps=3, eval_every=1, name="branch", resume=str(source))) == 0
    assert losses(tmp_path / "branch") == losses(tmp_path / "tiny")[1:]


def test_a_run_that_gets_no_better_ends_and_stays_ended(tiny, tmp_path, evaluates, capsys):
    """Losses of steps 0, 1, ...: the third in a row that is no better than step 1's is step 4's."""
    run = tmp_path / "tiny"
    settings = dict(steps=6, eval_every=1, save_every=6, val_tokens=320)
    line = ("stopped early at step 4: 3 evaluations without a lower validation loss than 4.0000 of "
            "step 1")
    evaluates(5.0, 4.0, 4.5, 4.0, 4.2, 1.0, 1.0)
    assert train(tiny(early_stop=3, **settings)) == 0
    printed = capsys.readouterr().out
    assert printed.count(line) == 1
    assert "next: python -m eval.sample" in printed
    assert newest_valid(run / "checkpoints")[0].name == "step_00000004"
    assert not (run / "STOPPED").exists()

    trained_steps = losses(run)
    assert train(tiny(early_stop=3, **settings)) == 0
    assert capsys.readouterr().out.count(line) == 1
    assert losses(run) == trained_steps

    assert train(tiny(early_stop=4, **settings)) == 0  # step 5 is better
    assert "stopped early" not in capsys.readouterr().out
    assert newest_valid(run / "checkpoints")[0].name == "step_00000006"


def test_only_losses_of_this_branch_and_this_validation_set_are_compared(tmp_path):
    settings = {"wandb": "disabled", "tensorboard": False, "profile": 0}
    description = {"config": {"steps": 9, "batch_tokens": 32, "tracker": settings},
                   "resolved": {"dtype": "fp32", "flops_per_token": 1, "val_set": "these"}}
    rows = [{"step": 0, "val_loss": 1.0, "val_set": "others"},
            {"step": 1, "val_loss": 3.0, "val_set": "these"}]
    tracker = Tracker(tmp_path, ALONE, description, rows)
    assert tracker.best_step() == 1
    tracker.log(2, val_loss=2.0)
    assert tracker.best_step() == 2
    tracker.drop_after(1)
    assert tracker.best_step() == 1
    assert tracker.evaluated_steps == {0, 1}
    tracker.close()
