"""Whether ours or the compiled loss is taken: with made-up ones and a made-up clock.

pytest tests/test_model_contest_loss.py
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

from dataclasses import replace

import pytest
import torch

from kernels import cross_entropy, operators, reference
from model import contest, network, training
from model.config import ComputeConfig
from model.contest import COMPILED, OURS, PLAIN, Contest
from model.contest_cases import LossCase
from model.gpt2 import GPTConfig
from tests.running import ALONE

CPU = torch.device("cpu")
SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=64, n_ctx=100, n_vocab=70)  # 300 tokens: 44 unseen


class Losses:
    """Ours and the compiled one, by plain PyTorch, with what each takes and gets wrong."""

    def __init__(self, monkeypatch, ours=0.30, compiled=0.40):
        self.now, self.timed, self.made = 0.0, 0, 0
        self.noise = {OURS: 0.0, COMPILED: 0.0}
        self.ours = self._loss(OURS, ours)
        self.compiled = self._loss(COMPILED, compiled)
        monkeypatch.setattr(contest, "compiled_loss", self._make)
        self.operators = operators.TORCH._replace(linear_cross_entropy=self.ours)

    def _make(self):
        self.made += 1
        return self.compiled

    def _loss(self, name, milliseconds):
        def loss(h, *words):
            self.now += milliseconds
            return reference.linear_cross_entropy(h, *words) * (1 + self.noise[name])

        return loss

    def judge(self, run):
        self.timed += 1
        start = self.now
        run()
        return self.now - start

    def choose(self, ops=None, repeatable=True, **kept):
        opened = Contest(SHAPE, 3, torch.bfloat16, repeatable, kept, ALONE, self.judge)
        return contest.choose_loss(opened, ops or self.operators)


@pytest.fixture
def losses(monkeypatch):
    return Losses(monkeypatch)


def test_the_faster_loss_is_taken_and_a_line_says_so(losses, capsys):
    name, ops = losses.choose()
    assert (name, ops.linear_cross_entropy) == (OURS, losses.ours)
    assert capsys.readouterr().out == "loss: triton 0.30 ms, compiled 0.40: triton\n"


def test_the_compiled_one_is_taken_where_it_is_faster(monkeypatch):
    losses = Losses(monkeypatch, compiled=0.29)
    name, ops = losses.choose()
    assert (name, ops.linear_cross_entropy) == (COMPILED, losses.compiled)
    assert ops == losses.operators._replace(linear_cross_entropy=losses.compiled)


@pytest.mark.parametrize("wrong, left", [(OURS, COMPILED), (COMPILED, OURS)])
def test_who_is_wrong_is_named_and_left_out(losses, wrong, left, capsys):
    losses.noise[wrong] = 0.03
    assert losses.choose()[0] == left
    assert f"{wrong} loss is off by 3.0e-02: {left}\n" in capsys.readouterr().out


def test_where_none_is_left_the_loss_is_plain_pytorchs(losses, capsys):
    losses.noise = {OURS: 0.5, COMPILED: float("nan")}
    name, ops = losses.choose()
    assert (name, ops.linear_cross_entropy) == (PLAIN, reference.linear_cross_entropy)
    assert capsys.readouterr().out.endswith("compiled loss is off by nan: torch\n")


def test_what_was_chosen_is_checked_and_not_raced(losses, capsys):
    assert losses.choose(loss=COMPILED)[0] == COMPILED
    assert losses.timed == 1
    assert capsys.readouterr().out == "loss: compiled 0.40 ms: compiled as before\n"


def test_a_run_of_a_version_that_raced_no_loss_keeps_ours_and_compiles_nothing(monkeypatch):
    losses = Losses(monkeypatch, compiled=0.01)
    assert losses.choose(blocks="by hand")[0] == OURS
    assert (losses.timed, losses.made) == (1, 0)


def test_a_kept_one_that_is_wrong_now_is_raced_anew(losses, capsys):
    losses.noise[COMPILED] = 0.5
    assert losses.choose(loss=COMPILED)[0] == OURS
    first, second = capsys.readouterr().out.splitlines()
    assert first == "loss: compiled loss is off by 5.0e-01: torch"
    assert second.endswith("compiled loss is off by 5.0e-01: triton")


def test_ours_takes_no_part_where_the_self_check_left_it_out(losses):
    assert losses.choose(operators.TORCH)[0] == COMPILED
    assert losses.choose(operators.TORCH, loss=OURS)[0] == COMPILED


@pytest.mark.parametrize("kept", [{"loss": PLAIN}, {"blocks": "by hand"}])
def test_a_run_that_began_with_plain_pytorchs_goes_on_with_it(losses, kept):
    """Also of a version that raced no loss, where ours was wrong."""
    name, ops = losses.choose(operators.TORCH, **kept)
    assert (name, ops.linear_cross_entropy) == (PLAIN, reference.linear_cross_entropy)
    assert (losses.timed, losses.made) == (0, 0)


def test_too_little_memory_for_the_race_leaves_plain_pytorchs(losses, monkeypatch, capsys):
    def full(*words, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "randn", full)
    assert losses.choose()[0] == PLAIN
    assert "triton OutOfMemoryError: CUDA out of memory, compiled" in capsys.readouterr().out


# ---- what they are compared on ----


@pytest.mark.parametrize("arch", ["gpt2", "speedrun"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B", [1, 3])
def test_our_kernel_and_the_plain_loss_are_right(arch, dtype, B):
    case = LossCase(replace(SHAPE, arch=arch, n_layer=2), B, dtype, CPU)
    assert (case.inputs[2] >= 0).sum() == min(100 * B, 2 * 128)
    losses = {OURS: lambda: cross_entropy.linear_cross_entropy,
              PLAIN: lambda: reference.linear_cross_entropy}
    for run in case.runs(losses).values():
        assert case.fault(run()) == ""


@pytest.mark.parametrize("which, what, times", [
    (0, "loss", 1.0002), (1, "dh", 1.03), (2, "dweight", 1.03)])
def test_each_of_its_numbers_is_looked_at(which, what, times):
    case = LossCase(SHAPE, 3, torch.bfloat16, CPU)
    right = [case.exact["loss"], torch.zeros(300, 64).double(), case.exact["dweight"]]
    right[1][case.inputs[2] >= 0] = case.exact["dh"]
    assert case.fault(tuple(right)) == ""
    right[which] = right[which] * times
    assert case.fault(tuple(right)) == f"{what} is off by {times - 1:.1e}"


def with_a_gradient_at(which, *place):
    """A run's tensors, one of them changed."""
    case = LossCase(SHAPE, 3, torch.bfloat16, CPU)
    got = case.runs({PLAIN: lambda: reference.linear_cross_entropy})[PLAIN]()
    got[which][place] = 1e-4
    return case.fault(got)


def test_a_gradient_of_a_token_without_a_target_is_a_fault():
    assert with_a_gradient_at(1, 150, 3) == "tokens without a target have gradients"


def test_a_gradient_of_the_padding_is_a_fault():
    """It would no longer be 0, and take probability."""
    assert with_a_gradient_at(2, 70, 3) == "padding has gradients"


def test_what_keeps_a_loss_out_is_found():
    """As docs/kernels.md has it: a sum in bf16, and padding that takes probability."""
    def in_bf16(*words):
        return reference.linear_cross_entropy(*words).bfloat16().float()

    def with_padding(h, weight, targets, vocab, *words):
        return reference.linear_cross_entropy(h, weight, targets, len(weight), *words)

    case = LossCase(SHAPE, 3, torch.bfloat16, CPU)
    for loss in (in_bf16, with_padding):
        assert case.fault(case.runs({"it": lambda loss=loss: loss})["it"]()).startswith("loss is")


# ---- whose loss a run has ----


def chosen_by(monkeypatch, losses, compute):
    """The operators and the names of a run that is told that our loss can be had."""
    monkeypatch.setattr(training, "choose_operators", lambda *_: losses.operators)
    monkeypatch.setattr(training, "choose_attention", lambda _, ops: ({}, ops))
    monkeypatch.setattr(training, "open_contest", lambda *_: Contest(
        SHAPE, 3, torch.bfloat16, True, {}, ALONE, losses.judge))
    ops, _, chosen = training.choose_kernels(
        SHAPE, compute, "bf16", 3, None, ALONE)
    return ops.linear_cross_entropy, chosen


def test_a_run_takes_the_loss_that_has_won(monkeypatch):
    losses = Losses(monkeypatch, compiled=0.01)
    assert chosen_by(monkeypatch, losses, ComputeConfig()) == (losses.compiled, {"loss": COMPILED})


def test_compile_false_compiles_no_loss(monkeypatch):
    losses = Losses(monkeypatch, compiled=0.01)
    assert chosen_by(monkeypatch, losses, ComputeConfig(compile=False)) == (losses.ours, {})
    assert losses.made == 0


def test_the_compiled_loss_is_made_once_and_is_plain_pytorchs(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda function: made.append(function) or function)
    network.compiled_loss.cache_clear()
    try:
        loss = network.compiled_loss()
        assert network.compiled_loss() is loss
    finally:
        network.compiled_loss.cache_clear()
    assert made == [reference.loss_of_chunk]
    case = LossCase(SHAPE, 3, torch.bfloat16, CPU)
    assert case.fault(case.runs({COMPILED: lambda: loss})[COMPILED]()) == ""
