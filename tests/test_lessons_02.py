"""Lesson 2: the program inside its bands, the solutions right, every planted mistake named."""

import random

import pytest
import torch
import torch.nn.functional as F

from lessons.checks.c02 import CHECKS
from lessons.course import Wrong
from lessons.solutions import e02
from tests.lessons import run_lesson


def test_the_lesson_reaches_its_figures():
    said = run_lesson("02_bigrams.py", pictures={"counts"})
    assert "4 letters in a row, a = 0.1, test" in said


@pytest.mark.parametrize("name", CHECKS)
def test_the_solution_is_right(name):
    CHECKS[name](getattr(e02, name))


def shuffled_in_place(names):
    random.seed(42)
    random.shuffle(names)
    n1, n2 = int(0.8 * len(names)), int(0.9 * len(names))
    return names[:n1], names[n1:n2], names[n2:]


def unshuffled(names):
    n1, n2 = int(0.8 * len(names)), int(0.9 * len(names))
    return names[:n1], names[n1:n2], names[n2:]


def overlapping(names):
    train, dev, test = e02.split(names)
    return train, train[-1:] + dev[1:], test


def with_a_gap(names):
    train, dev, test = e02.split(names)
    return train, dev[1:], test


def other_seed(names):
    names = sorted(names, key=lambda name: name[::-1])
    return e02.split(names)


def counted(names, before=2, after=1, order=(0, 1, 2)):
    counts = torch.zeros(27, 27, 27, dtype=torch.int64)
    for name in names:
        letters = [0] * before + [ord(c) - ord("a") + 1 for c in name] + [0] * after
        for i in range(len(letters) - 2):
            counts[letters[i], letters[i + 1], letters[i + 2]] += 1
    return counts.permute(order).contiguous()


def loss_of(p, x, y):
    return -p[x, y].log().mean().item()


def columns_divided(counts, x, y, a):
    counts = counts.double() + a
    return loss_of(counts / counts.sum(1), x, y)


def added_to_shares(counts, x, y, a):
    return loss_of(counts / counts.sum(1, keepdim=True).clamp(min=1) + a, x, y)


def sums_without(counts, x, y, a):
    return loss_of((counts + a) / counts.sum(1, keepdim=True), x, y)


def unsmoothed(counts, x, y, a):
    return loss_of(counts / counts.sum(1, keepdim=True).clamp(min=1), x, y)


def summed(counts, x, y, a):
    return e02.smoothed_loss(counts, x, y, a) * len(x)


def tuned_on_train(train, dev, tried):
    return e02.best_smoothing(train, train, tried)


def highest(train, dev, tried):
    counts = torch.bincount(train[0] * 27 + train[1], minlength=729).view(27, 27)
    return max(tried, key=lambda a: e02.smoothed_loss(counts, *dev, a))


def picked(p, y):
    return p[torch.arange(len(y)), y]


def log_of_mean(counts, x, y, a):
    p = counts + a
    return -(p / p.sum(1, keepdim=True))[x, y].mean().log().item()


def log_of_a_share(logits, y):
    logits = logits - logits.max()
    return -picked(logits.exp() / logits.exp().sum(1, keepdim=True), y).log().mean()


@pytest.mark.parametrize("name, wrong, told", [
    ("split", shuffled_in_place, "shuffle a copy"),
    ("split", unshuffled, "not shuffled"),
    ("split", overlapping, "1 names lie in two parts: .* leak"),
    ("split", with_a_gap, "1 of 1237 names lie in no part"),
    ("split", other_seed, "another seed"),
    ("split", lambda names: names, "three lists"),
    ("trigram_counts", lambda names: counted(names, before=1), "no name begins: two dots"),
    ("trigram_counts", lambda names: counted(names, after=0), "no name ends"),
    ("trigram_counts", lambda names: counted(names, before=3), "a third dot"),
    ("trigram_counts", lambda names: counted(names, order=(1, 0, 2)), "x1 and x2 have changed"),
    ("trigram_counts", lambda names: counted(names).sum(0), r"not a tensor of shape \(27, 27\)"),
    ("smoothed_loss", columns_divided, "keepdim=True"),
    ("smoothed_loss", added_to_shares, "belongs to the counts"),
    ("smoothed_loss", sums_without, "not in the sums"),
    ("smoothed_loss", unsmoothed, "1.398542 where .* a is not used"),
    ("smoothed_loss", summed, "the sum, and not the mean"),
    ("smoothed_loss", log_of_mean, "the log of the mean"),
    ("best_smoothing", tuned_on_train, "0.001 where 0.01 is right: chosen on train"),
    ("best_smoothing", highest, "loss is highest"),
    ("one_hot_product", lambda W, x: W[:, x % 16].T, "a tensor of shape"),
    ("one_hot_product", lambda W, x: W[x.sort().values], "in any order"),
    ("one_hot_product", lambda W, x: W[x - 1], "another matrix"),
    ("cross_entropy", lambda z, y: F.cross_entropy(z, y, reduction="sum"), "the sum, and not"),
    ("cross_entropy", lambda z, y: F.nll_loss(z.softmax(0).log(), y), "over dim 0"),
    ("cross_entropy", lambda z, y: -picked(z.softmax(1), y).mean().log(), "mean of the logs"),
    ("cross_entropy", lambda z, y: -picked(z, y).mean(), "log-sum-exp is missing"),
    ("cross_entropy", log_of_a_share, "take the log of the sum alone, not of a share"),
    ("cross_entropy", lambda z, y: -(picked(z.exp(), y) / z.exp().sum(1)).log().mean(),
     "take the largest logit off"),
])
def test_a_mistake_is_named(name, wrong, told):
    with pytest.raises(Wrong, match=told):
        CHECKS[name](wrong)
