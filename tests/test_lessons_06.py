"""Lesson 6: the program inside its bands, the solutions right, every planted mistake named."""

import pytest
import torch

from lessons.checks.c06 import CHECKS, padded, undilated
from lessons.course import Wrong
from lessons.solutions import e06
from tests.lessons import run_lesson


def test_the_lesson_reaches_its_figures():
    run_lesson("06_wavenet.py", pictures={"loss"})


@pytest.mark.parametrize("name", CHECKS)
def test_the_solution_is_right(name):
    CHECKS[name](getattr(e06, name))


def far_apart(x, n):
    N, T, C = x.shape
    apart = T // n
    y = torch.cat([x[:, start::apart] for start in range(apart)], 1)
    return y.reshape(N, n * C) if T == n else y.reshape(N, T // n, n * C)


def newer_half_first(x, weights):
    for i, W in enumerate(weights):
        x = torch.tanh(torch.cat([x[2**i :], x[: -(2**i)]], 1) @ W)
    return x


def looks_ahead(x, memory, weights):
    """Takes the newest of what is kept."""
    for inputs, W in zip(memory, weights, strict=True):
        inputs.append(x)
        x = torch.tanh(torch.cat([inputs[-2], x]) @ W)
        inputs.pop(0)
    return x


def forgets(x, memory, weights):
    return e06.next_output(x, [list(inputs) for inputs in memory], weights)


def keeps_all(x, memory, weights):
    copies = [list(inputs) for inputs in memory]
    for inputs, copy in zip(memory, copies, strict=True):
        inputs.append(copy[-1])
    return e06.next_output(x, copies, weights)


@pytest.mark.parametrize("name, wrong, told", [
    ("flatten_consecutive", far_apart, "neighbours are asked for"),
    ("flatten_consecutive", lambda x, n: x.view(len(x), -1, n * x.shape[2]), "its axis goes"),
    ("flatten_consecutive", lambda x, n: x.view(len(x), n, -1), "groups of n"),
    ("flatten_consecutive", lambda x, n: x.view(len(x), x.shape[1] // n, -1).squeeze(),
     "a batch of one too"),
    ("batch_statistics", lambda x: (x.mean(0), x.var(0)), "over the batch alone"),
    ("batch_statistics", lambda x: (e06.batch_statistics(x)[0], e06.batch_statistics(x)[1].sqrt()),
     "standard deviation"),
    ("batch_statistics", lambda x: (x.flatten(0, -2).mean(0),
                                    x.flatten(0, -2).var(0, correction=0)), "biased"),
    ("dilated", newer_half_first, "the older's should"),
    ("dilated", undilated, "no holes"),
    ("dilated", padded, "7 windows too many"),
    ("dilated", lambda x, weights: e06.dilated(x, weights)[:-1], "missing at the end"),
    ("next_output", looks_ahead, "at the oldest"),
    ("next_output", forgets, "not been brought up to date"),
    ("next_output", keeps_all, "one in, one out"),
])
def test_a_mistake_is_named(name, wrong, told):
    with pytest.raises(Wrong, match=told):
        CHECKS[name](wrong)
