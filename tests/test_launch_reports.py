"""A device that judges and leaves out steps by itself, of which the host hears a step late, trains
what a host trains that hears of each at once. Here the device is a CPU."""

import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch

import train_gpt2
from launch.errors import Failed
from launch.reports import Report, StepReports
from launch.tracker import read_rows
from model.checkpoint import newest_valid
from model.optim import OptimConfig
from model.parallel import ParallelModel
from tests.running import losses, run, weights
from train_gpt2 import train

NO_CLIP = OptimConfig(lr=3e-3, warmup_steps=2, clip=0.0)  # gradients of the same bits either way


@pytest.fixture
def late(monkeypatch):
    """late(): from here on the device decides, and the host hears of it a step late."""
    return lambda: monkeypatch.setattr(train_gpt2, "device_decides", lambda *_: True)


@pytest.fixture
def norms(monkeypatch):
    """norms({4: nan}): the gradient's norm in these steps, counted as they come."""
    norm, count, planted = ParallelModel.gradient_norm, [0], {}

    def gradient_norm(self):
        count[0] += 1
        return norm(self) * planted.get(count[0], 1.0)

    def plant(numbers: dict[int, float]) -> None:
        count[0] = 0
        planted.clear()
        planted.update(numbers)

    monkeypatch.setattr(ParallelModel, "gradient_norm", gradient_norm)
    return plant


def record(folder) -> list[dict]:
    """What metrics.jsonl says, without the time that it took."""
    timed = ("step_ms", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in timed}
            for row in read_rows(folder / "metrics.jsonl")]


def same(one, two, step: int) -> bool:
    a, b = weights(one, step), weights(two, step)
    return record(one) == record(two) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("policy, bad", [
    ("skip", {}), ("skip", {4: math.nan}), ("skip", {5: math.nan, 6: math.inf}),
    ("rollback", {4: math.nan}), ("rollback", {6: math.inf}),
])
def test_heard_late_is_trained_the_same(tiny, tmp_path, norms, late, policy, bad):
    """Steps that are due for an evaluation or a save are among the bad ones, and those before."""
    settings = dict(optim=NO_CLIP, on_spike=policy, steps=8)
    norms(bad)
    assert train(tiny(name="prompt", **settings)) == 0
    late()
    norms(bad)
    assert train(tiny(name="late", **settings)) == 0
    assert len(losses(tmp_path / "late")) == 8
    assert same(tmp_path / "prompt", tmp_path / "late", 8)


@pytest.mark.parametrize("policy", ["stop", "ignore"])
def test_after_a_step_that_ends_the_run_none_is_applied(
    tiny, tmp_path, norms, late, policy, monkeypatch
):
    """The step behind it is launched before the host knows, and changes nothing."""
    applied, step = [], ParallelModel.optimizer_step

    def optimizer_step(self, optimizer, verdict):
        before = self.shards[0].local.clone()
        step(self, optimizer, verdict)
        applied.append(not torch.equal(before, self.shards[0].local))

    monkeypatch.setattr(ParallelModel, "optimizer_step", optimizer_step)
    late()
    norms({4: math.nan})
    with pytest.raises(Failed, match="step 4: the gradient's norm is nan"):
        train(tiny(on_spike=policy, steps=9, save_every=9, eval_every=9))
    assert applied == [True, True, True, False, False]


def test_moments_and_steps_of_a_step_left_out_stay(tiny, tmp_path, norms, late):
    """As if it had not been: fused AdamW counts its steps, and it isn't among them."""
    late()
    norms({2: math.nan})
    assert train(tiny(steps=3)) == 0
    from safetensors.torch import load_file

    kept = load_file(newest_valid(tmp_path / "tiny" / "checkpoints")[0] / "optimizer.safetensors")
    assert {tensor.item() for name, tensor in kept.items() if name.endswith(".step")} == {2.0}


def test_stopped_and_resumed_is_never_stopped_bit_for_bit(tiny, tmp_path, late, monkeypatch):
    late()
    assert train(tiny(name="whole")) == 0
    rate = train_gpt2.get_lr

    def stopped(step, *rest):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return rate(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "get_lr", stopped)
        assert train(tiny(name="stopped")) == 0
    assert (tmp_path / "stopped" / "STOPPED").exists()
    assert train(tiny(name="stopped")) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    one, two = weights(tmp_path / "whole", 6), weights(tmp_path / "stopped", 6)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_gradients_are_clipped_as_they_are_by_the_host(tiny, tmp_path, late):
    """The host multiplies by clip / norm, the device divides by norm / clip: each rounds twice in
    fp32, so gradients are apart by 4 * 2^-24 at most, and Adam's first steps divide them out."""
    clipped = OptimConfig(lr=1e-3, warmup_steps=0, clip=0.1)  # the norms are above 1
    assert train(tiny(name="prompt", optim=clipped, steps=1)) == 0
    late()
    assert train(tiny(name="late", optim=clipped, steps=1)) == 0
    one, two = weights(tmp_path / "prompt", 1), weights(tmp_path / "late", 1)
    # An update is lr * g / (|g| + 1e-8), in which g's error of 2.4e-7 is damped; a weight of 1 is
    # rounded by 6e-8 beside it.
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-3 * 2.4e-7 + 1.2e-7


def test_fp16s_scale_moves_by_itself(tiny, tmp_path, norms, late, capsys):
    late()
    norms({2: math.inf, 3: math.inf})
    assert train(tiny(dtype="fp16", steps=5)) == 0
    events = [row["event"] for row in read_rows(tmp_path / "tiny" / "metrics.jsonl")
              if "event" in row]
    assert events == ["step 2: fp16 overflow, the loss scale falls to 32768",
                      "step 3: fp16 overflow, the loss scale falls to 16384"]
    state = json.loads((tmp_path / "tiny/checkpoints/step_00000005/state.json").read_text())
    assert state["loss_scale"]["value"] == 16384
    assert state["loss_scale"]["good_steps"] == 2
    assert state["spikes"] == 0


@pytest.mark.parametrize("is_late", [False, True])
def test_data_that_one_rank_cannot_read_end_the_run_after_a_save(tiny, tmp_path, is_late):
    """Rank 1 finds a damaged shard in step 4: all ranks stop, with the weights of step 3."""
    fault = json.dumps(dict(kind="data", rank=1, step=4, late=is_late))
    code, printed = run(tiny(steps=9, eval_every=9, save_every=9), ranks=2, FAULT=fault)
    assert code != 0
    assert printed.count("error: rank 1: toy_train_000001.bin is damaged") == 1
    assert newest_valid(tmp_path / "tiny" / "checkpoints")[0].name == "step_00000003"
    assert [step for step, _ in losses(tmp_path / "tiny")] == [1, 2, 3]
    # The same command goes on from there, once the data can be read, and ends where one would have
    # that never stopped.
    assert run(tiny(steps=9, eval_every=9, save_every=9), ranks=2)[0] == 0
    assert run(tiny(name="whole", steps=9, eval_every=9, save_every=9), ranks=2)[0] == 0
    one, two = weights(tmp_path / "whole", 9), weights(tmp_path / "tiny", 9)
    # Late, gradients are clipped with an error of 2.4e-7 (above), of which an update of at most lr
    # passes 1e-3 on; 9 updates round a weight of 1 by 6e-8 each. A bias of the keys has no gradient
    # but for rounding, which AdamW makes as large as any.
    for state in (one, two):
        for name in state:
            if name.endswith("c_attn.bias"):
                state[name][32:64] = 0
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-6


class GPU:
    """With a clock of its own, in milliseconds: an event keeps where the GPU was."""

    clock = 0.0

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = GPU.clock

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at


def test_a_steps_time_is_the_gpus_however_late_the_host_hears_of_it(monkeypatch):
    """Of steps that take the GPU 20, 30 and 40 ms the last two are heard of at once, as before an
    evaluation; then, 500 ms later, one of 50. By the host's clock the last of two took nothing."""
    monkeypatch.setattr(torch.cuda, "Event", GPU.Event)
    monkeypatch.setattr(GPU, "clock", 0.0)
    logged = []
    run = SimpleNamespace(
        spikes=SimpleNamespace(hear=lambda step, numbers: None),
        watch=SimpleNamespace(take=lambda step: None),
        signals=SimpleNamespace(stop_requested=lambda ask: False),
        tracker=SimpleNamespace(
            log_step=lambda step, seconds, **rest: logged.append((step, 1e3 * seconds))))
    reports = StepReports(SimpleNamespace(device=torch.device("cuda")), late=1)

    def launch(step, milliseconds):
        began = reports.begin()
        GPU.clock += milliseconds
        arrived = GPU.Event(enable_timing=True)
        arrived.record()
        numbers = torch.zeros(6, dtype=torch.float64)
        reports.pending.append(Report(step, numbers, arrived, 1e-3, began))

    launch(0, 20)
    launch(1, 30)
    reports.settle(run, 2, everything=False)
    launch(2, 40)
    reports.settle(run, 3, everything=True)
    GPU.clock += 500
    launch(3, 50)
    reports.settle(run, 4, everything=True)
    assert logged == [(1, 20), (2, 30), (3, 40), (4, 50)]
