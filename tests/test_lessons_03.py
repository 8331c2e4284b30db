"""Lesson 3: the program inside its bands, the solutions right, every planted mistake named."""

import pytest
import torch

from lessons.checks.c03 import CHECKS, judge
from lessons.course import Wrong
from lessons.solutions import e03
from tests.lessons import run_lesson


def test_the_lesson_reaches_its_figures():
    run_lesson("03_mlp.py", pictures={"learning-rate", "letters", "demo"})


@pytest.mark.parametrize("name", CHECKS)
def test_the_solution_is_right(name, real_data):
    CHECKS[name](getattr(e03, name))


def shifted(names, size):
    X, Y = e03.contexts(names, size)
    return torch.cat([X[:, 1:], Y[:, None]], 1), Y


def without_ends(names, size):
    X, Y = e03.contexts(names, size)
    return X[Y > 0], Y[Y > 0]


def carried_on(names, size):
    rows, targets, row = [], [], [0] * size
    for name in names:
        for letter in [ord(c) - ord("a") + 1 for c in name] + [0]:
            rows.append(row)
            targets.append(letter)
            row = row[1:] + [letter]
    return torch.tensor(rows), torch.tensor(targets)


def newest_first(names, size):
    X, Y = e03.contexts(names, size)
    return X.flip(1), Y


def floats(names, size):
    X, Y = e03.contexts(names, size)
    return X.float(), Y


def one_list(names, size):
    X, Y = e03.contexts(names, size)
    return X[-1].expand_as(X), Y


def alike(generator):
    network = e03.start(generator)
    network[3] = torch.full((200, 27), 0.5)
    return network


def own_seed(generator):
    return e03.start(torch.Generator().manual_seed(5))


def started(scales):
    """As the solution, each parameter drawn from N(0, scale^2)."""
    def start(generator):
        return [torch.randn(p.shape, generator=generator) * scale
                for p, scale in zip(e03.start(generator), scales, strict=True)]
    return start


@pytest.mark.parametrize("name, wrong, told", [
    ("contexts", shifted, "shifted by one"),
    ("contexts", without_ends, "7 examples where 9 are right: the end"),
    ("contexts", carried_on, "reaches into this one"),
    ("contexts", newest_first, "newest letter first"),
    ("contexts", lambda names, size: e03.contexts(names, 3), r"not a tensor of shape \(9, 3\)"),
    ("contexts", floats, "X is torch.float32"),
    ("contexts", one_list, "one list, changed each time"),
    ("rates", lambda count: torch.linspace(0.001, 1, count), "evenly spaced"),
    ("rates", lambda count: torch.linspace(-3, 0, count), "-3 where 0.001 .*exponent of 10"),
    ("rates", lambda count: torch.linspace(-3, 0, count).exp(), "power of e"),
    ("rates", lambda count: 10 ** torch.linspace(-3, 0, count + 1)[:-1], "1 is not among them"),
    ("start", started((1, 1, 1, 1, 1)), "ruled out that nobody has seen"),
    ("start", started((1, 1, 1, 0.01, 0)), "beyond 0.99"),
    ("start", started((1, 0.2, 0, 0, 0)), "W2 is zero"),
    ("start", lambda generator: torch.zeros(27, 10), "five tensors"),
    ("start", alike, "W2 says the same to every letter"),
    ("start", own_seed, "draw them from the one given"),
])
def test_a_mistake_is_named(name, wrong, told):
    with pytest.raises(Wrong, match=told):
        CHECKS[name](wrong)


@pytest.mark.parametrize("loss, told", [
    (2.2783, "2.2783, and 2.2 is the mark: the lecture's start"), (3.2958, "no context at all"),
    (1.99, "dev has been trained on"), (float("nan"), "too large"),
])
def test_a_loss_outside_its_band_is_judged(loss, told):
    with pytest.raises(Wrong, match=told):
        judge(loss)
