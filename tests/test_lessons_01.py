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


def by_division(a, b, out):
    a.grad += out.data / a.data * out.grad
    b.grad += a.data * out.grad


def taken_away(a, b, out):
    a.grad -= b.data * out.grad
    b.grad -= a.data * out.grad


def divided_by_2h(f, at, h):
    return [slope / 2 for slope in e01.one_sided(f, at, h)]


def beside_the_label(right, label):
    slopes = without_the_one(right, label)
    slopes[label - 1] -= 1
    return slopes


def log_of_p(logits, label):
    """Of the largest taken off, but p is rounded to 0 before its logarithm is taken."""
    powers = [math.exp(logit - max(logits)) for logit in logits]
    p = [power / sum(powers) for power in powers]
    return -math.log(p[label]), [q - (i == label) for i, q in enumerate(p)]


def slopes_not_a_number(logits, label):
    loss, right = e01.softmax_loss(logits, label)
    return loss, [math.nan if max(logits) > 700 else slope for slope in right]


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
    ("gradient", lambda a, b, c: [s + 2e-9 for s in e01.gradient(a, b, c)],
     r"-12.353553389 where -12.353553391 is right"),
    ("one_sided", not_put_back, "not been put back"),
    ("one_sided", caller_s_list_moved, "move a copy"),
    ("one_sided", from_below, r"f\(x - h\)"),
    ("one_sided", undivided, "not divided"),
    ("one_sided", e01.symmetric, "symmetric quotient"),
    ("symmetric", e01.one_sided, "one-sided quotient"),
    ("symmetric", divided_by_h, "2 h apart"),
    ("symmetric", divided_by_2h, "and the points are h apart"),
    ("one_sided", lambda f, at, h: [-s for s in e01.one_sided(f, at, h)], "turned round"),
    ("multiply_backward", overwritten, "-30 where -29.75 is right: .* = for \\+= forgets"),
    ("multiply_backward", own_factor, "the other factor"),
    ("multiply_backward", nothing_from_above, "out.grad, is left out"),
    ("multiply_backward", lambda a, b, out: (b.data * out.grad, a.data * out.grad), "nothing has"),
    ("multiply_backward", taken_away, "-= for"),
    ("multiply_backward", by_division, "not where a is 0"),
    ("softmax_loss", loss_with(loss=lambda right: -right), "minus is missing"),
    ("softmax_loss", loss_with(loss=lambda right: math.exp(-right)), "that is p"),
    ("softmax_loss", loss_with(loss=lambda right: right / math.log(2)), "log2"),
    ("softmax_loss", loss_with(slopes=without_the_one), "1 is taken off"),
    ("softmax_loss", loss_with(slopes=lambda right, label: [-s for s in right]), "turned round"),
    ("softmax_loss", overflowing, "more than a double holds"),
    ("softmax_loss", loss_with(slopes=beside_the_label), "logit 2: .* belongs to the label, 3"),
    ("softmax_loss", log_of_p, "p is too small for a double"),
    ("softmax_loss", slopes_not_a_number, "the slope in logit 0 of .* nan where"),
    ("softmax_loss", lambda logits, label: 2.1755153626, "a list of 2"),
])
def test_a_mistake_is_named(name, wrong, told):
    with pytest.raises(Wrong, match=told):
        CHECKS[name](wrong)
