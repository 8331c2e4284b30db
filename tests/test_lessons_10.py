"""Lesson 10: the program inside its bands, the solutions right, every planted mistake named."""

import math
from contextlib import nullcontext

import pytest
import torch

from lessons import grade
from lessons.checks import c10
from lessons.checks.c10 import CHECKS
from lessons.course import Wrong
from lessons.solutions import e10
from tests.lessons import run_lesson


def test_the_lesson_reaches_its_figures():
    printed = run_lesson("10_gpt2.py")
    for ranks in (2, 4):
        assert f"\n{ranks} ranks, losses against 1 " in printed
        assert f"\n{ranks} ranks as filmed, losses against 1 " in printed
    assert "\nlosses against train_gpt2.py's " in printed


@pytest.mark.parametrize("name", CHECKS)
def test_the_solution_is_right(name):
    CHECKS[name](getattr(e10, name))


def count(change):
    """A count that is wrong by change(L, C, T, V)."""
    return lambda *shape: e10.parameters(*shape) + change(*shape)


def scaled_by(writers, where="c_proj.weight"):
    def init_std(name, n_layer):
        return 0.02 / writers(n_layer) if where in name else 0.02
    return init_std


def rows_from(start, extra=1, target=None):
    """rows() that begin elsewhere, or whose targets are others."""
    def rows(tokens, step, rank, ranks, B, T):
        begin = start(step, rank, ranks, B * T)
        x = tokens[begin : begin + B * T].view(B, T)
        y = tokens[begin + extra : begin + extra + B * T].view(B, T)
        return x, target(x) if target else y
    return rows


def right_start(step, rank, ranks, size):
    return (step * ranks + rank) * size


def rate(rising=None, done=lambda step, steps, warmup: (step - warmup) / (steps - warmup),
         fall=lambda done: (1 + math.cos(math.pi * done)) / 2,
         mix=lambda peak, final, fall: peak * (final + (1 - final) * fall)):
    def get_lr(step, steps, warmup, peak, final):
        if step < warmup:
            return rising(step, warmup, peak) if rising else peak * (step + 1) / warmup
        return mix(peak, final, fall(done(step, steps, warmup)))
    return get_lr


def where_named(kept):
    return lambda named: [name for name, tensor in named if kept(name, tensor)]


def as_filmed(model, micro_batches):
    for i, tokens in enumerate(micro_batches):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / len(micro_batches)
        model.require_backward_grad_sync = i + 1 == len(micro_batches)
        loss.backward()


def accumulated(silent, share=3, forget=False, left_out=0, returned=None):
    """silent(i): whether micro-step i of three is under no_sync()."""
    def accumulate(model, micro_batches):
        mean = 0.0
        for i, tokens in enumerate(micro_batches[: 3 - left_out]):
            if forget:
                model.zero_grad()
            with model.no_sync() if silent(i + left_out) else nullcontext():
                loss = model(tokens[:, :-1], tokens[:, 1:]) / share
                loss.backward()
            mean += loss.item()
        return returned(mean, loss.item()) if returned else mean
    return accumulate


def silent_in_backward(model, micro_batches):
    for i, tokens in enumerate(micro_batches):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / 3
        with model.no_sync() if i < 2 else nullcontext():
            loss.backward()


def but_the_last(i):
    return i < 2


@pytest.mark.parametrize("name, wrong, told", [
    ("parameters", count(lambda L, C, T, V: V * C), "163037184 where .* counted again"),
    ("parameters", count(lambda L, C, T, V: -T * C), "positions"),
    ("parameters", count(lambda L, C, T, V: -L * 9 * C), "biases"),
    ("parameters", count(lambda L, C, T, V: -2 * C), "last LayerNorm"),
    ("parameters", count(lambda L, C, T, V: -L * 2 * C - C), "a weight and a bias"),
    ("parameters", lambda *shape: 124_439_808, r"parameters\(3, 8, 16, 100\)"),
    ("init_std", scaled_by(lambda L: math.sqrt(L)), r"sqrt\(2 n_layer\)"),
    ("init_std", scaled_by(lambda L: 2 * L), "it's the root"),
    ("init_std", scaled_by(lambda L: 1), "is scaled down"),
    ("init_std", scaled_by(lambda L: 1 / math.sqrt(2 * L)), "not up"),
    ("init_std", scaled_by(lambda L: math.sqrt(2 * L), where="weight"), "doesn't write"),
    ("rows", rows_from(right_start, extra=0), "be shown what it has to say"),
    ("rows", rows_from(right_start, extra=2), "not two"),
    ("rows", rows_from(right_start, target=lambda x: x - 1), "is the token after its input$"),
    ("rows", rows_from(right_start, target=lambda x: x.roll(-1, 1)), "torch.roll"),
    ("rows", rows_from(lambda step, rank, ranks, size: step * ranks * size), "took the same"),
    ("rows", rows_from(lambda step, rank, ranks, size: (step + rank) * size), "of all ranks"),
    ("rows", rows_from(lambda step, rank, ranks, size: step * ranks * size + rank), "a whole B"),
    ("rows", rows_from(lambda step, rank, ranks, size: (step * ranks + rank) * (size + 1)),
     "further on"),
    ("rows", lambda tokens, *rest: tokens[:8].view(2, 4), "targets are asked for"),
    ("get_lr", rate(rising=lambda step, warmup, peak: peak * step / warmup), "count from 0"),
    ("get_lr", rate(rising=lambda step, warmup, peak: peak), "no warm-up"),
    ("get_lr", rate(done=lambda step, steps, warmup: step / steps), "begins after the warm-up"),
    ("get_lr", rate(fall=lambda done: 1 - done), "straight line"),
    ("get_lr", rate(mix=lambda peak, final, fall: peak * fall), "ends at 0"),
    ("get_lr", rate(mix=lambda peak, final, fall: peak * (final + fall)), "is 1 - final"),
    ("get_lr", rate(mix=lambda peak, final, fall: final + (peak - final) * fall), "a share"),
    ("get_lr", rate(fall=lambda done: (1 + math.cos(2 * math.pi * done)) / 2), "whole cosine"),
    ("decayed", where_named(lambda name, p: name.endswith("weight")), "one axis"),
    ("decayed", where_named(lambda name, p: p.dim() == 2 and "wte" not in name), "embeddings"),
    ("decayed", where_named(lambda name, p: True), "don't decay"),
    ("decayed", where_named(lambda name, p: p.dim() < 2), "the ones that"),
    ("accumulate", as_filmed, "looks at its switch in the forward pass"),
    ("accumulate", silent_in_backward, "before the forward pass"),
    ("accumulate", accumulated(lambda i: False), "in every micro-step"),
    ("accumulate", accumulated(lambda i: True), "never averaged"),
    ("accumulate", accumulated(but_the_last, share=1), "each loss is divided"),
    ("accumulate", accumulated(but_the_last, forget=True), "earlier micro-steps are lost"),
    ("accumulate", accumulated(but_the_last, left_out=1), "left out"),
    ("accumulate", accumulated(but_the_last, returned=lambda mean, last: last), "last micro-step"),
    ("accumulate", accumulated(but_the_last, returned=lambda mean, last: 3 * mean), "the sum"),
    ("accumulate", accumulated(but_the_last, returned=lambda mean, last: mean / 3), "twice"),
    ("accumulate", lambda model, micro_batches: 0.0, "no gradient"),
    ("accumulate", accumulated(but_the_last, returned=lambda mean, last: None), "a return"),
])
def test_a_mistake_is_named(name, wrong, told):
    with pytest.raises(Wrong, match=told) as said:
        CHECKS[name](wrong)
    assert "\n" not in str(said.value)


def test_the_check_leaves_no_process_group():
    CHECKS["accumulate"](e10.accumulate)
    assert not torch.distributed.is_initialized()


def test_the_time_limit_is_a_ratio_to_our_own_solution(tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "FLOOR", 0.5)
    monkeypatch.setattr(c10, "CHECKS", {"init_std": c10.init_std})
    slow = "import time\n\n\ndef init_std(name, n_layer):\n    time.sleep(9999)\n"
    (tmp_path / "e10.py").write_text(slow)
    verdicts = grade.grade("10", tmp_path)
    assert verdicts["init_std"].startswith("wrong: no answer after ")
