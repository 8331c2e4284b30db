"""Lesson 1: the program inside its bands, the solutions right, every planted mistake named."""

import math

import pytest

from lessons.checks.c01 import CHECKS
from lessons.course import Wrong
from lessons.solutions import e01
from tests.lessons import run_lesson


def test_the_lesson_reaches_its_figures():
    run_lesson("01_micrograd.py", pictures={"h", "neuron", "moons"})


@pytest.mark.parametrize("name", CHECKS)
def test_the_solution_is_right(name):
    CHECKS[name](getattr(e01, name))


def half_lost(a, b, c):
    return [-3 * a**2 - a**-0.5, *e01.gradient(a, b, c)[1:]]


def no_chain_rule(a, b, c):
    right = e01.gradient(a, b, c)
    return [right[0], math.cos(3 * b) + 2.5 * b**1.5, right[2]]


def sign_of_the_inverse(a, b, c):
    return [*e01.gradient(a, b, c)[:2], -1 / c**2]


def learnt_by_heart(a, b, c):
    return e01.gradient(2.0, 3.0, 4.0)


def not_put_back(f, at, h):
    moved, slopes = list(at), []
    for i in range(len(at)):
        moved[i] += h
        slopes.append((f(*moved) - f(*at)) / h)
    return slopes


def caller_s_list_moved(f, at, h):
    slopes = []
    for i in range(len(at)):
        before = f(*at)
        at[i] += h
        slopes.append((f(*at) - before) / h)
    return slopes


def from_below(f, at, h):
    return e01.one_sided(f, at, -h)


def undivided(f, at, h):
    return [slope * h for slope in e01.one_sided(f, at, h)]


def divided_by_h(f, at, h):
    return [slope * 2 for slope in e01.symmetric(f, at, h)]


def overwritten(a, b, out):
    a.grad = b.data * out.grad
    b.grad = a.data * out.grad


def own_factor(a, b, out):
    a.grad += a.data * out.grad
    b.grad += b.data * out.grad


def nothing_from_above(a, b, out):
    a.grad += b.data
    b.grad += a.data


def loss_with(loss=lambda right: right, slopes=lambda right, label: right):
    def softmax_loss(logits, label):
        value, right = e01.softmax_loss(logits, label)
        return loss(value), slopes(right, label)
    return softmax_loss


def without_the_one(right, label):
    return [slope + (i == label) for i, slope in enumerate(right)]


def overflowing(logits, label):
    p = [math.exp(logit) for logit in logits]
    p = [power / sum(p) for power in p]
    return -math.log(p[label]), [q - (i == label) for i, q in enumerate(p)]


@pytest.mark.parametrize("name, wrong, told", [
    ("gradient", half_lost, "0.5 is missing"),
    ("gradient", no_chain_rule, "chain rule"),
    ("gradient", sign_of_the_inverse, r"-0.0625 where 0.0625 is right: -1/c is -c\^-1"),
    ("gradient", learnt_by_heart, r"at \(1.5, 2.0, 5.0\)"),
    ("gradient", lambda a, b, c: None, "is there a return"),
    ("one_sided", not_put_back, "not been put back"),
    ("one_sided", caller_s_list_moved, "move a copy"),
    ("one_sided", from_below, r"f\(x - h\)"),
    ("one_sided", undivided, "not divided"),
    ("one_sided", e01.symmetric, "symmetric quotient"),
    ("symmetric", e01.one_sided, "one-sided quotient"),
    ("symmetric", divided_by_h, "2 h apart"),
    ("multiply_backward", overwritten, "-30 where -29.75 is right: .* = for \\+= forgets"),
    ("multiply_backward", own_factor, "the other factor"),
    ("multiply_backward", nothing_from_above, "out.grad, is left out"),
    ("softmax_loss", loss_with(loss=lambda right: -right), "minus is missing"),
    ("softmax_loss", loss_with(loss=lambda right: math.exp(-right)), "that is p"),
    ("softmax_loss", loss_with(loss=lambda right: right / math.log(2)), "log2"),
    ("softmax_loss", loss_with(slopes=without_the_one), "1 is taken off"),
    ("softmax_loss", loss_with(slopes=lambda right, label: [-s for s in right]), "turned round"),
    ("softmax_loss", overflowing, "more than a double holds"),
    ("softmax_loss", lambda logits, label: 2.1755153626, "a list of 2"),
])
def test_a_mistake_is_named(name, wrong, told):
    with pytest.raises(Wrong, match=told):
        CHECKS[name](wrong)
