"""--diagnose_every: right figures, on any number of ranks, and a run that doesn't notice."""

import json
import math

import pytest
import torch

from launch.tracker import read_rows
from model.diagnostics import Diagnostics
from model.gpt2 import GPT
from model.optim import LossScaler, OptimConfig, configure_optimizers
from model.parallel import ParallelModel
from model.train_state import TrainState
from tests.running import ALONE, CONFIG, losses, run_several, weights
from train_gpt2 import train


def diagnoses(run) -> dict[int, dict]:
    rows = read_rows(run / "metrics.jsonl")
    return {row["step"]: row["diagnosis"] for row in rows if "diagnosis" in row}


def flat(diagnosis: dict) -> list[float]:
    figures = []
    for key, values in diagnosis.items():
        if key == "weights":
            for kinds in values.values():
                figures += kinds.values()
        else:
            figures += values
    return figures


@pytest.fixture
def state() -> TrainState:
    """A model in fp64, whose sums can be compared to the last digits."""
    torch.manual_seed(0)
    model = ParallelModel(GPT(CONFIG).double(), "ddp", ALONE, "fp64")
    return TrainState(model, configure_optimizers(model, OptimConfig()), LossScaler())


def batch() -> torch.Tensor:
    return torch.randint(50257, (4, 17), generator=torch.Generator().manual_seed(1))


def test_the_figures_are_those_of_the_tensors(state):
    """Against plain autograd, the whole batch at once: to the six digits that are written."""
    idx, targets = batch()[:, :-1], batch()[:, 1:]
    twin = GPT(CONFIG).double()
    twin.load_state_dict(state.model.module.state_dict())
    streams, units = [], []

    def keep(layer, x, branch):
        stream = x + branch
        branch.retain_grad()
        streams.append((stream.detach(), branch))
        units.append(twin.h[layer].mlp.c_fc(twin.h[layer].ln_2(x)).detach())

    twin.watch = keep
    twin(idx, targets).backward()

    watch = Diagnostics(state, every=10)
    for half in (slice(0, 2), slice(2, 4)):  # two micro-steps
        (state.model(idx[half], targets[half]) / 2).backward()
    before = {name: p.detach().clone() for name, p in state.model.module.named_parameters()}
    state.model.optimizer_step(state.optimizer)
    after = dict(state.model.module.named_parameters())
    row = watch.take(1)
    state.model.zero_grad()

    def std(x):
        return x.std(correction=0).item()

    for layer, (stream, branch) in enumerate(streams):
        assert row["activation_mean"][layer] == pytest.approx(stream.mean().item(), rel=1e-5)
        assert row["activation_std"][layer] == pytest.approx(std(stream), rel=1e-5)
        assert row["gradient_std"][layer] == pytest.approx(std(branch.grad), rel=1e-5)
        off = (units[layer] < -3).double().mean().item()
        assert row["gelu_off"][layer] == pytest.approx(off, rel=1e-5)
    matrices = {name for name, p in twin.named_parameters() if p.dim() == 2}
    assert row["weights"].keys() == matrices
    for name, p in twin.named_parameters():
        if name in matrices:
            rows = slice(0, 50257) if name == "wte.weight" else slice(None)
            data = before[name][rows]
            found, gradient, update = row["weights"][name], p.grad[rows], after[name][rows] - data
            assert found["gradient_std"] == pytest.approx(std(gradient), rel=1e-5)
            assert found["gradient_to_data"] == pytest.approx(std(gradient) / std(data), rel=1e-5)
            ratio = math.log10(std(update) / std(data))
            assert found["log10_update_to_data"] == pytest.approx(ratio, abs=1e-5)


def test_the_first_step_and_every_nth_are_recorded(tiny, tmp_path):
    train(tiny(diagnose_every=2, steps=4))
    assert list(diagnoses(tmp_path / "tiny")) == [1, 2, 4]


def test_a_run_trains_bit_for_bit_as_without(tiny, tmp_path):
    train(tiny(name="off", micro_batch=4, steps=3))
    train(tiny(name="on", micro_batch=4, steps=3, diagnose_every=1))
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    one, two = weights(tmp_path / "on", 3), weights(tmp_path / "off", 3)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not diagnoses(tmp_path / "off")


def test_nothing_is_hooked_in_a_step_that_is_not_recorded(state):
    watch = Diagnostics(state, every=0)
    assert state.model.module.watch is None
    assert "step" not in vars(state.optimizer)
    assert watch.take(1) is None
    assert Diagnostics(state, every=5, step=1).take(2) is None
    assert state.model.module.watch is None


def test_any_ranks_and_mode_find_the_same(tiny, tmp_path):
    """In fp64, so that the ranks' order of summation is far below the six digits written."""
    settings = dict(dtype="fp64", steps=2, diagnose_every=1)
    train(tiny(name="one", **settings))
    runs = [tiny(name=mode, parallel=mode, micro_batch=3, **settings)
            for mode in ("ddp", "zero1", "fsdp")]
    done = run_several(runs, tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = diagnoses(tmp_path / "one")
    for config in runs:
        found = diagnoses(tmp_path / config.name)
        assert found.keys() == expected.keys(), config.name
        for step in expected:
            assert flat(found[step]) == pytest.approx(flat(expected[step]), rel=2e-5), config.name


def test_a_step_that_was_broken_off_leaves_nothing_behind(state):
    """Its turn goes to the next step that is applied."""
    watch = Diagnostics(state, every=10)
    idx, targets = batch()[:, :-1], batch()[:, 1:]
    state.model(idx * 0, targets).backward()  # a spike: not applied
    state.model.zero_grad()
    assert watch.take(1) is None
    state.model(idx, targets).backward()
    state.model.optimizer_step(state.optimizer)
    row = watch.take(2)
    assert row is not None
    torch.manual_seed(0)
    twin = GPT(CONFIG).double()
    sizes = []
    twin.watch = lambda layer, x, branch: sizes.append((x + branch).std(correction=0).item())
    twin(idx)
    assert row["activation_std"] == pytest.approx(sizes, rel=1e-5)


def test_an_evaluation_is_not_counted(state):
    watch = Diagnostics(state, every=10)
    idx, targets = batch()[:, :-1], batch()[:, 1:]
    with torch.no_grad():
        state.model(idx, targets)
    assert watch.streams == [[0.0] * 3] * CONFIG.n_layer


def test_figures_that_are_no_numbers_are_null(state):
    """JSON has neither NaN nor infinities, and a record is no reason for a run to end."""
    watch = Diagnostics(state, every=10)
    with torch.no_grad():
        state.model.module.wpe.weight.zero_()  # a matrix without a standard deviation
    state.model(batch()[:, :-1], batch()[:, 1:]).backward()
    state.model.optimizer_step(state.optimizer)
    row = watch.take(1)
    assert row["weights"]["wpe.weight"]["gradient_to_data"] is None
    json.dumps(row, allow_nan=False)
