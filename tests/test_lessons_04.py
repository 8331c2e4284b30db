"""Lesson 4: the program inside its bands, the solutions right, every planted mistake named."""

import math

import pytest
import torch

from lessons.checks.c04 import CHECKS
from lessons.course import Wrong
from lessons.solutions import e04
from tests.lessons import run_lesson


def test_the_lesson_reaches_its_figures():
    run_lesson("04_batchnorm.py", pictures={"activations", "gradients", "weight-gradients",
                                            "update-to-data"})


@pytest.mark.parametrize("name", CHECKS)
def test_the_solution_is_right(name):
    CHECKS[name](getattr(e04, name))


def only_its_own(zero):
    return {"C", "W1", "b1", "W2", "b2"} - zero


def biased(x, gain, bias, mean, var):
    y = gain * (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() + bias
    return y, *e04.batchnorm(x, gain, bias, mean, var)[1:]


def evaluated(x, gain, bias, mean, var):
    y = gain * (x - mean) / (var + 1e-5).sqrt() + bias
    return y, *e04.batchnorm(x, gain, bias, mean, var)[1:]


def places_changed(x, gain, bias, mean, var):
    y = e04.batchnorm(x, gain, bias, mean, var)[0]
    return y, 0.1 * mean + 0.9 * x.mean(0), 0.1 * var + 0.9 * x.var(0)


def biased_on_the_way(x, gain, bias, mean, var):
    right = e04.batchnorm(x, gain, bias, mean, var)
    return *right[:2], 0.9 * var + 0.1 * x.var(0, correction=0)


def running_at_once(x, gain, bias, mean, var):
    _, mean, var = e04.batchnorm(x, gain, bias, mean, var)
    return gain * (x - mean) / (var + 1e-5).sqrt() + bias, mean, var


def h_forgotten(zero):
    right = e04.who_learns(zero)
    return right if "W1" in zero else right | {"W2"}


def in_place(x, gain, bias, mean, var):
    right = e04.batchnorm(x, gain, bias, mean, var)
    mean.copy_(right[1])
    return right


def fold(scale=lambda gain, var: gain / (var + 1e-5).sqrt(),
         shift=lambda bias, mean, scale: bias - mean * scale):
    def fold_batchnorm(W, gain, bias, mean, var):
        factor = scale(gain, var)
        return W * factor, shift(bias, mean, factor)
    return fold_batchnorm


@pytest.mark.parametrize("name, wrong, told", [
    ("zero_start_loss", lambda train, dev, classes: math.log(classes), "guessing evenly"),
    ("zero_start_loss", lambda train, dev, n: e04.zero_start_loss(dev, dev, n), "dev's own counts"),
    ("zero_start_loss", lambda train, dev, n: e04.zero_start_loss(train, train, n), "train loss"),
    ("who_learns", only_its_own, "doesn't stop its own gradient"),
    ("who_learns", lambda zero: {"C", "W1", "b1", "W2", "b2"}, "a gradient is a product"),
    ("who_learns", lambda zero: e04.who_learns(zero) - {"b2"}, "the last bias always learns"),
    ("who_learns", lambda zero: ["b2"], "a set of names"),
    ("who_learns", h_forgotten, "with C at 0: C, W2, b1, b2 where .*: W2's gradient is h times"),
    ("batchnorm", biased, "y is off by 0.0.*: the biased variance"),
    ("batchnorm", evaluated, "for after training"),
    ("batchnorm", running_at_once, "by the running statistics, and the batch's own are asked for"),
    ("batchnorm", places_changed, "running mean is off.*changed places"),
    ("batchnorm", biased_on_the_way, "running variance is off.*biased"),
    ("batchnorm", in_place, "return new tensors"),
    ("fold_batchnorm", fold(scale=lambda gain, var: gain / var.sqrt()), "eps is missing"),
    ("fold_batchnorm", fold(scale=lambda gain, var: gain / (var + 1e-5)), "not by its root"),
    ("fold_batchnorm", fold(shift=lambda bias, mean, scale: bias - mean), "through the scale too"),
    ("fold_batchnorm", fold(shift=lambda bias, mean, scale: bias), "mean is left out"),
    ("update_to_data", lambda b, a: e04.update_to_data(b, a) * math.log(10), "ln, and not log10"),
    ("update_to_data", lambda b, a: ((a - b).norm() / b.norm()).log10().item(), "norms"),
    ("update_to_data", lambda b, a: -e04.update_to_data(b, a), "turned round"),
    ("update_to_data", lambda b, a: ((a - b).std() / a.std()).log10().item(), "after the step"),
])
def test_a_mistake_is_named(name, wrong, told):
    with pytest.raises(Wrong, match=told):
        CHECKS[name](wrong)


def test_the_unigram_is_the_end_of_an_all_zero_start():
    """By training, slowly, what the exercise asks for by counting: W1 and W2 stay exactly 0."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (64,), generator=draw) * torch.randint(0, 2, (64,), generator=draw)
    p = {name: torch.zeros(shape, dtype=torch.float64, requires_grad=True)
         for name, shape in (("C", (4, 2)), ("W1", (2, 8)), ("W2", (8, 4)), ("b2", (4,)))}
    for _ in range(2000):
        h = torch.tanh(p["C"][y.flip(0)] @ p["W1"])
        loss = torch.nn.functional.cross_entropy(h @ p["W2"] + p["b2"], y)
        loss.backward()
        with torch.no_grad():
            for value in p.values():
                value -= value.grad
                value.grad = None
    assert loss.item() == pytest.approx(e04.zero_start_loss(y, y, 4), abs=1e-9)
    assert not any(p[name].any() for name in ("C", "W1", "W2"))
