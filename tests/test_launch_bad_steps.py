"""Bad steps, planted in real runs: skipped, rolled back or the end, alike on every rank."""

import json
import signal

import numpy as np
import pytest
import torch

import train_gpt2
from data.dataset import DataConfig, open_data
from data.loader import Loader
from data.shards import write_folder
from launch.errors import Failed
from model import checkpoint
from model.gpt2 import GPTConfig
from model.optim import OptimConfig
from tests.running import events, losses, run, same_weights, weights
from train_gpt2 import train


@pytest.mark.parametrize("policy", ["skip", "rollback", "stop"])
def test_a_nan_on_one_rank_is_seen_by_all(tiny, tmp_path, policy):
    """The fault is a machine's, and gone the next time: after a rollback other batches follow."""
    fault = json.dumps({"kind": "nan", "rank": 1, "step": 5})
    config = tiny(steps=8, eval_every=8, save_every=2, on_spike=policy)
    code, printed = run(config, ranks=2, FAULT=fault)
    folder = tmp_path / "tiny"
    if policy == "stop":
        assert code == 1
        assert printed.count("error: step 5: the loss is nan") == 1
        assert checkpoint.newest_valid(folder / "checkpoints")[0].name == "step_00000004"
        return
    assert code == 0, printed[-3000:]
    assert all(tensor.isfinite().all() for tensor in weights(folder, 8).values())
    (event,) = events(folder)
    state = json.loads((folder / "checkpoints" / "step_00000008" / "state.json").read_text())
    if policy == "skip":
        assert event == "skipped step 5: the loss is nan"
        assert state["skipped"] == []
    else:
        assert event.startswith("rolled back to step 4 and left out the batches up to step 5")
        assert state["skipped"] == [[4, 5]]
    assert state["spikes"] == 1


def test_too_many_bad_steps_in_a_row_end_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2.Tracker, "log_step", lambda *rest, **more: None)
    monkeypatch.setattr("model.parallel.ParallelModel.gradient_norm",
                        lambda self: torch.tensor(float("nan")))
    with pytest.raises(Failed, match=r"step 3: the gradient's norm is nan; .*3 in a row"):
        train(tiny(max_spikes=2))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, corpus_file):
    """Shards in which the batch of step 140 is noise; and a configuration that reads them.

    Runs start from a trained model at a small learning rate, so that their losses are even: on
    its way down from 10.8 a loss varies too much for anything to stand out.
    """
    from tests.conftest import make_config

    folder = tmp_path_factory.mktemp("poisoned")
    data = open_data(DataConfig(text=str(corpus_file)))
    tokens = np.tile(data.train.read(0, len(data.train)), 2)
    write_folder(folder, "toy", [tokens], data.val.read(0, len(data.val)), "toy")

    def configure(out, **changes):
        settings = dict(steps=150, eval_every=150, save_every=50, dtype="fp64", batch_tokens=48,
                        model=GPTConfig(n_layer=1, n_head=1, n_embd=16, n_ctx=4),
                        optim=OptimConfig(lr=1e-5, warmup_steps=0), init=str(folder / "trained"),
                        data=DataConfig(dir=str(folder)))
        return make_config(out, corpus_file, **(settings | changes))

    learns = dict(name="trained", steps=100, init="", optim=OptimConfig(lr=1e-2, warmup_steps=10))
    train(configure(folder, **learns))
    config = configure(folder)
    loader = Loader(open_data(config.data).train, T=4, batch_tokens=48, micro_batch=12, seed=1337)
    noise = np.random.RandomState(0)
    tokens = tokens.copy()
    for sequence in loader.sequences_of_step(139):
        tokens[sequence * 4 : sequence * 4 + 5] = noise.randint(0, 50256, 5)
    loader.close()
    for path in [*folder.glob("*.bin"), folder / "manifest.json"]:
        path.unlink()
    write_folder(folder, "toy", [tokens], data.val.read(0, len(data.val)), "toy")
    return configure


def test_a_poisoned_batch_is_skipped_rolled_back_or_ends_the_run(poisoned, tmp_path):
    """Judged by its loss, which is finite; the norm is a usual one. The same on 2 ranks as on 1."""
    train(poisoned(tmp_path, name="skip"))
    (event,) = events(tmp_path / "skip")
    assert event.startswith("skipped step 140: the loss")
    assert "standard deviations above" in event

    code, printed = run(poisoned(tmp_path, name="two", on_spike="rollback"), ranks=2)
    assert code == 0, printed[-3000:]
    (event,) = events(tmp_path / "two")
    assert event.startswith("rolled back to step 100 and left out the batches up to step 140")
    train(poisoned(tmp_path, name="one", on_spike="rollback"))
    one, two = weights(tmp_path / "one", 150), weights(tmp_path / "two", 150)
    # fp64 over 150 steps: rounding of 1e-16 grows with Adam's divisions, far below 1e-9.
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-9
    state = json.loads((tmp_path / "one/checkpoints/step_00000150/state.json").read_text())
    assert state["skipped"] == [[100, 140]]

    with pytest.raises(Failed, match=r"step 140: the loss .*--on_spike stop"):
        train(poisoned(tmp_path, name="stop", on_spike="stop"))


def test_a_rolled_back_run_that_is_stopped_goes_on_identically(poisoned, tmp_path, monkeypatch):
    whole = poisoned(tmp_path, name="whole", on_spike="rollback")
    train(whole)
    original, last = train_gpt2.get_lr, [0]

    def signal_after_the_rollback(step, *rest):
        if step < last[0] and step > 100:
            signal.raise_signal(signal.SIGTERM)
        last[0] = max(step, last[0])
        return original(step, *rest)

    monkeypatch.setattr(train_gpt2, "get_lr", signal_after_the_rollback)
    stopped = poisoned(tmp_path, name="stopped", on_spike="rollback")
    assert train(stopped) == 0
    assert (tmp_path / "stopped" / "STOPPED").read_text() == "stopped by SIGTERM at step 102\n"
    monkeypatch.setattr(train_gpt2, "get_lr", original)
    assert train(stopped) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "stopped", 150)
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


def test_what_is_normal_and_what_is_not():
    """A norm that explodes at a usual loss is a spike too, and one step later it's forgotten."""
    from launch.spikes import WINDOW, SpikeConfig, SpikeDetector

    spikes = SpikeDetector(SpikeConfig("skip", 2))
    for step in range(WINDOW):
        assert spikes.check(step, 3.0 + 0.1 * (step % 2), 1.0 + 0.1 * (step % 2)) == ""
    # Mean 1.05, deviation 0.05: 7 deviations above lie at 1.4; of the loss at 3.05 + 7 x 0.05.
    assert spikes.check(WINDOW, 3.0, 1.39) == ""
    assert "the gradient's norm 1.6 lies" in spikes.check(WINDOW + 1, 3.0, 1.6)
    assert "the loss 3.6 lies" in spikes.check(WINDOW + 2, 3.6, 1.0)
    assert (spikes.total, spikes.in_a_row) == (2, 2)
    assert spikes.check(WINDOW + 3, 3.0, 1.0) == ""
    assert (spikes.total, spikes.in_a_row) == (2, 0)
    again = SpikeDetector(SpikeConfig("skip", 2))
    again.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    assert again.state_dict() == spikes.state_dict()
    assert SpikeDetector(SpikeConfig("ignore", 0)).check(0, 3.0, 1e9) == ""


def after_a_calm_stretch():
    """A detector whose last 128 good steps had losses near 3.05 and norms near 0.7."""
    from launch.spikes import WINDOW, SpikeConfig, SpikeDetector

    spikes = SpikeDetector(SpikeConfig("skip", 10))

    def left_out(loss, norm, clip=1.0):
        """Whether the next step is."""
        verdict = spikes.judge(*torch.tensor((loss, norm), dtype=torch.float64), clip)
        return bool(spikes.hear(0, verdict.report.tolist()))

    for step in range(WINDOW):
        assert not left_out(3.0 + 0.1 * (step % 2), 0.6 + 0.2 * (step % 2))
    return spikes, left_out


def test_gradients_that_have_become_large_for_good_do_not_end_a_run():
    """As a run of 640 steps had them at a usual loss: all of its steps were left out, until it was
    ended. Now every other one is, until they belong to the normal range."""
    spikes, left_out = after_a_calm_stretch()
    norms = [1.68, 1.836, 2.147, 2.866, 2.38, 2.537, 1.807, 3.115, 3.427, 1.883, 3.134, 2.694]
    skipped = [i for i, norm in enumerate(norms) if left_out(3.05, norm)]
    assert skipped == [0, 2, 7]
    assert not any(left_out(3.05, 2.5) for _ in range(20))


@pytest.mark.parametrize("first", [dict(loss=3.05, norm=2.0), dict(loss=9.0, norm=0.7),
                                   dict(loss=float("nan"), norm=0.7)])
def test_ten_times_the_mean_is_taken_at_most_and_where_there_is_a_clip(first):
    """The mean is 0.7. A norm beyond would make all others look small for 128 steps."""
    _, left_out = after_a_calm_stretch()
    assert left_out(**first)
    for norm in (7.01, 1e9):
        assert left_out(3.05, norm)
    assert left_out(3.05, 6.9, clip=0.0)
    assert not left_out(3.05, 6.9)


def test_losses_that_have_become_large_for_good_end_a_run():
    """Whatever the norms: weights that are broken are no new normal range."""
    spikes, left_out = after_a_calm_stretch()
    for i in range(11):
        assert spikes.reason_to_end(i, "", 9.0, 0.7) == ""
        assert left_out(9.0, 0.7 if i % 2 else 30.0)
    assert "11 in a row" in spikes.reason_to_end(11, "", 9.0, 0.7)
