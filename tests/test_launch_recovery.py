"""Bad steps cost what they must: no checkpoint of theirs, no good checkpoint, no run."""

import json
import math
import signal

import pytest
import torch

from eval.evaluator import Evaluator
from launch.errors import Failed
from launch.spikes import EARLY_STEPS, SpikeConfig, SpikeDetector
from launch.tracker import read_rows
from model.parallel import ParallelModel
from tests.running import losses, weights
from train_gpt2 import train


@pytest.fixture
def bad_from(monkeypatch):
    """bad_from(4, 6): the gradient's norm is no number in steps 4 to 6, as often as they come.
    stop_in: steps in which a SIGTERM comes."""
    import train_gpt2

    norm, rate, now = ParallelModel.gradient_norm, train_gpt2.get_lr, [0]

    def plant(
        first: int, last: int = 10**9, times: int = 10**9, stop_in: tuple[int, ...] = ()
    ) -> None:
        left = [times]

        def counting(step, *rest):
            now[0] = step + 1
            return rate(step, *rest)

        def broken(self):
            if now[0] in stop_in:
                signal.raise_signal(signal.SIGTERM)
            if first <= now[0] <= last and left[0] > 0:
                left[0] -= 1
                return torch.tensor(math.nan)
            return norm(self)

        monkeypatch.setattr(train_gpt2, "get_lr", counting)
        monkeypatch.setattr(ParallelModel, "gradient_norm", broken)

    return plant


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_nothing_is_saved_while_steps_are_bad(tiny, tmp_path, bad_from):
    """The save that was due after step 6 comes after step 7, the next good one."""
    bad_from(4, 6)
    assert train(tiny(steps=8)) == 0
    assert names(tmp_path / "tiny") == [f"step_{step:08d}" for step in (3, 7, 8)]


def test_stops_among_bad_steps_push_out_no_good_checkpoint(tiny, tmp_path, bad_from, capsys):
    """Every stop saves; but what was saved since the last good step is doubted with the rest."""
    config = tiny(steps=20, save_every=3, keep=1, max_spikes=4)
    bad_from(4, stop_in=(5, 7))
    assert train(config) == train(config) == 0
    assert names(tmp_path / "tiny") == [f"step_{step:08d}" for step in (3, 5, 7)]
    with pytest.raises(Failed, match="step 8.*5 in a row"):
        train(config)
    doubtful = (tmp_path / "tiny" / "checkpoints").glob("step_*/DOUBTFUL")
    assert sorted(path.parent.name[5:] for path in doubtful) == ["00000003", "00000005", "00000007"]


def test_a_run_whose_last_weights_give_no_numbers_has_failed(tiny, tmp_path, bad_from, monkeypatch):
    """Two bad steps are borne, but they were the last ones, and there is nothing to show."""
    bad_from(5)
    results, evaluations = Evaluator.results, iter((0, 3, 6))

    def broken(self, *rest, with_hellaswag):
        if next(evaluations) == 6:
            raise Failed("the model's losses are no numbers")
        return results(self, *rest, with_hellaswag=with_hellaswag)

    monkeypatch.setattr(Evaluator, "results", broken)
    with pytest.raises(Failed, match="no evaluation of step 6: the model's losses"):
        train(tiny(save_every=2))
    doubtful = sorted((tmp_path / "tiny" / "checkpoints").glob("step_*/DOUBTFUL"))
    assert [path.parent.name for path in doubtful] == ["step_00000004", "step_00000006"]


def test_a_restart_goes_past_a_checkpoint_that_only_bad_steps_followed(
    tiny, tmp_path, bad_from, monkeypatch, capsys
):
    """Weights that explode in the last step before a save are finite, saved, and of no use."""
    train(tiny(name="whole"))
    with monkeypatch.context():
        bad_from(4)
        with pytest.raises(Failed, match="3 in a row"):
            train(tiny(max_spikes=2))
    monkeypatch.undo()
    assert names(tmp_path / "tiny") == ["step_00000000", "step_00000003"]
    capsys.readouterr()
    assert train(tiny(max_spikes=2)) == 0
    printed = capsys.readouterr().out
    assert "step_00000003 was followed by nothing but bad steps; going back to" in printed
    assert "resumed" not in printed  # from step 0, whose checkpoint is a beginning
    one, two = weights(tmp_path / "whole", 6), weights(tmp_path / "tiny", 6)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_checkpoint_that_a_good_step_followed_is_taken_again(tiny, tmp_path, bad_from, capsys):
    bad_from(5)
    for _ in range(2):
        with pytest.raises(Failed, match="3 in a row"):
            train(tiny(max_spikes=2, steps=9))
    assert "resumed on 1 ranks" in capsys.readouterr().out
    assert not (tmp_path / "tiny/checkpoints/step_00000003/DOUBTFUL").exists()


def test_a_branched_run_rolls_back_to_its_source(tiny, tmp_path, bad_from):
    """Before its first own save it has no other checkpoint."""
    train(tiny(name="trunk"))
    source = tmp_path / "trunk" / "checkpoints" / "step_00000003"
    bad_from(5, 5, times=1)
    branch = tiny(name="branch", resume=str(source), on_spike="rollback", save_every=6)
    assert train(branch) == 0
    (event,) = [row["event"] for row in read_rows(tmp_path / "branch" / "metrics.jsonl")
                if "rolled back" in row.get("event", "")]
    assert event.startswith("rolled back to step 3 and left out the batches up to step 5")
    state = json.loads((tmp_path / "branch/checkpoints/step_00000006/state.json").read_text())
    assert state["skipped"] == [[3, 5]]


def test_weights_that_are_no_numbers_are_not_evaluated_and_not_saved(tiny, tmp_path, monkeypatch):
    """The update of step 3 breaks them: evaluation and save come before step 4 can show it."""
    step = ParallelModel.optimizer_step

    def broken(self, optimizer, verdict):
        step(self, optimizer, verdict)
        if optimizer.state[self.shards[0].optim_param]["step"] == 3:
            with torch.no_grad():
                self.shards[0].param.fill_(math.nan)

    monkeypatch.setattr(ParallelModel, "optimizer_step", broken)
    with pytest.raises(Failed, match="the loss is nan"):
        train(tiny(max_spikes=1, steps=9))
    assert names(tmp_path / "tiny") == ["step_00000000"]
    events = [row["event"] for row in read_rows(tmp_path / "tiny" / "metrics.jsonl")
              if "event" in row]
    assert any(event.startswith("no evaluation of step 3") for event in events)
    assert any(event.startswith("checkpoint failed") for event in events)


# ---- the first steps ----


def test_an_explosion_among_the_first_steps_is_seen():
    """Norms of 99 after some near 2, long before there are 128 of them."""
    detector = SpikeDetector(SpikeConfig())
    for step in range(EARLY_STEPS):
        assert detector.check(step, 10.0 - step / 10, 2.0 + step / 10) == ""
    assert detector.check(11, 9.0, 20.0) == ""  # the median is 2.45: ten times that is 24.5
    assert detector.check(12, 9.0, 99.0) == (
        "the gradient's norm 99 is 40 times 2.5, the median of the first 11 steps"
    )
    assert "the loss 120 is" in detector.check(13, 120.0, 2.0)
    # The demo has had seven such norms in a row: what would have been left out is the way out.
    assert detector.check(14, 9.0, 99.0) == ""
    assert "the gradient's norm 99 is" in detector.check(15, 9.0, 99.0)
    assert detector.check(16, 9.0, 2.0) == ""
    assert SpikeDetector(SpikeConfig("ignore")).check(0, 10.0, 1e9) == ""


def test_on_the_way_back_from_an_early_explosion_steps_are_judged_as_ever():
    """A rollback goes on from other weights with other batches: nothing was just left out."""
    detector = SpikeDetector(SpikeConfig("rollback"))
    for step in range(EARLY_STEPS):
        detector.check(step, 10.0, 2.0)
    saved = detector.state_dict()
    assert detector.check(10, 10.0, 99.0)
    detector.rewind(saved)
    assert detector.check(10, 10.0, 99.0)


def test_an_early_explosion_is_skipped_and_said(tiny, tmp_path, monkeypatch, capsys):
    norm, calls = ParallelModel.gradient_norm, []

    def exploding(self):
        calls.append(1)
        return norm(self) * (1000 if len(calls) == 12 else 1)

    monkeypatch.setattr(ParallelModel, "gradient_norm", exploding)
    assert train(tiny(steps=14, eval_every=14, save_every=14)) == 0
    assert "skipped step 12: the gradient's norm" in capsys.readouterr().out
    assert len(losses(tmp_path / "tiny")) == 14


def test_the_end_says_how_many_steps_were_left_out(tiny, bad_from, capsys):
    bad_from(3, 5)
    assert train(tiny(steps=8)) == 0
    assert "3 of 8 steps were skipped" in capsys.readouterr().out
