"""Checks of lesson 1."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from lessons.checks import describe, expect
from lessons.course import Wrong
from lessons.solutions import e01

# Doubles of size 1 to 30 in some ten operations: 1e-13 at worst. Quotients by h = 1e-3 amplify a
# rounding by 1e3.
ROUNDING = 1e-9


def numbers(what: str, seen: Any, count: int) -> Sequence:
    if not isinstance(seen, list | tuple) or len(seen) != count:
        raise Wrong(f"{what}: a list of {count} is asked for, not {describe(seen)}")
    return seen


def gradient(answer: Callable) -> None:
    for a, b, c in ((2.0, 3.0, 4.0), (1.5, 2.0, 5.0)):
        seen = numbers("the slopes", answer(a, b, c), 3)
        mistakes = [
            {"the slope of a^0.5 is 0.5 a^-0.5: the factor 0.5 is missing": -3 * a**2 - a**-0.5,
             "f holds -a^0.5: its slope has been added": -3 * a**2 + 0.5 * a**-0.5,
             "f holds -a^3: the sign is lost": 3 * a**2 - 0.5 * a**-0.5},
            {"the chain rule: sin(3 b) brings a factor of 3": math.cos(3 * b) + 2.5 * b**1.5,
             "the slope of sin is cos": 3 * math.sin(3 * b) + 2.5 * b**1.5,
             "b^2.5 brings a factor of 2.5": 3 * math.cos(3 * b) + b**1.5,
             "the exponent of b falls by one": 3 * math.cos(3 * b) + 2.5 * b**2.5,
             "the slope of sin is +cos": -3 * math.cos(3 * b) + 2.5 * b**1.5,
             "the slope of b^2.5 is 2.5 b^1.5": 3 * math.cos(3 * b) + 1.5 * b**1.5},
            {"-1/c is -c^-1, whose slope is +c^-2": -1 / c**2,
             "the slope of c^-1 goes with c^-2": 1 / c},
        ]
        for name, slope, right, known in zip("abc", seen, e01.gradient(a, b, c), mistakes,
                                             strict=True):
            expect(f"df/d{name} at ({a}, {b}, {c})", slope, right, ROUNDING, known)


def cube_and_more(x: float, y: float) -> float:
    return x**3 + x * y**2


def _quotient(answer: Callable, right: Callable, other: Callable, other_name: str) -> None:
    at, h = [2.0, 3.0], 1e-3
    given = list(at)
    seen = numbers("the slopes", answer(cube_and_more, given, h), 2)
    if not all(math.isclose(a, b) for a, b in zip(given, at, strict=True)):
        raise Wrong(f"the list `at` was {at} and is now {given}: move a copy of it")
    backward = [-s for s in e01.one_sided(lambda x, y: cube_and_more(4 - x, 6 - y), at, h)]
    start, moved_on = cube_and_more(*at), [cube_and_more(2 + h, 3), cube_and_more(2 + h, 3 + h)]
    for i, name in enumerate("xy"):
        exact = right(cube_and_more, at, h)[i]
        expect(f"the slope in {name}", seen[i], exact, ROUNDING, {
            f"that is the {other_name} quotient": other(cube_and_more, at, h)[i],
            "that is (f(x) - f(x - h)) / h": backward[i],
            "the variables before this one have not been put back": (moved_on[i] - start) / h,
            "the difference is not divided by the distance": exact * h,
            "the two points are 2 h apart, and h is what it is divided by": exact * 2,
            "it is divided by 2 h, and the points are h apart":
                e01.one_sided(cube_and_more, at, h)[i] / 2,
            "the sign is turned round": -exact,
        })


def one_sided(answer: Callable) -> None:
    _quotient(answer, e01.one_sided, e01.symmetric, "symmetric")


def symmetric(answer: Callable) -> None:
    _quotient(answer, e01.symmetric, e01.one_sided, "one-sided")


def multiply_backward(answer: Callable) -> None:
    a, b = SimpleNamespace(data=2.0, grad=0.25), SimpleNamespace(data=-3.0, grad=0.5)
    answer(a, b, SimpleNamespace(data=-6.0, grad=10.0))
    expect("a.grad", a.grad, -29.75, ROUNDING, {
        "it is what it was: nothing has been added to it": 0.25,
        "it was 0.25 before, and = for += forgets that": -30.0,
        "-= for +=": 30.25,
        "a gets the other factor, b, and not itself": 20.25,
        "the gradient that comes down, out.grad, is left out": -2.75})
    expect("b.grad", b.grad, 20.5, ROUNDING, {
        "it is what it was: nothing has been added to it": 0.5,
        "it was 0.5 before, and = for += forgets that": 20.0,
        "-= for +=": -19.5,
        "b gets the other factor, a, and not itself": -29.5,
        "the gradient that comes down, out.grad, is left out": 2.5})
    a = SimpleNamespace(data=3.0, grad=0.0)
    answer(a, a, SimpleNamespace(data=9.0, grad=1.0))
    expect("the slope of a * a at 3", a.grad, 6.0, ROUNDING,
           {"= for +=: the second path overwrites the first": 3.0})
    a, b = SimpleNamespace(data=0.0, grad=0.0), SimpleNamespace(data=2.0, grad=0.0)
    try:
        answer(a, b, SimpleNamespace(data=0.0, grad=1.0))
    except ZeroDivisionError:
        raise Wrong("a = 0, b = 2: out / a is b, but not where a is 0") from None
    expect("a.grad at a = 0, b = 2", a.grad, 2.0, ROUNDING, {})


def softmax_loss(answer: Callable) -> None:
    logits, label = [0.0, 3.0, -2.0, 1.0], 3
    seen = numbers("(loss, slopes)", answer(list(logits), label), 2)
    loss, right = e01.softmax_loss(logits, label)
    p = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
    expect("the loss", seen[0], loss, ROUNDING, {
        "the minus is missing": -loss, "that is p, and not -ln p": p[label],
        "that is log2": loss / math.log(2), "that is log10": loss / math.log(10),
        "exp is left out of the sum": math.log(sum(map(abs, logits))) - logits[label]})
    slopes = numbers("the slopes", seen[1], 4)
    for i in range(4):
        expect(f"the slope in logit {i}", slopes[i], right[i], ROUNDING, {
            "that is p: at the label 1 is taken off it": p[i],
            "the sign is turned round": -right[i],
            f"1 is taken off here, and belongs to the label, {label}, alone": p[i] - 1})
    large_logits(answer)


def large_logits(answer: Callable) -> None:
    """A loss of 2,000 is one as well."""
    for logits, label in (([1000.0, 1002.0], 0), ([1000.0, -1000.0], 1)):
        try:
            seen = numbers("(loss, slopes)", answer(list(logits), label), 2)
        except OverflowError:
            raise Wrong("exp(1000) is more than a double holds: take the largest logit off first"
                        ) from None
        except (ValueError, ZeroDivisionError):
            raise Wrong(f"logits {logits}, label {label}: p is too small for a double. Its "
                        "logarithm is the logit minus the largest, minus ln of the sum") from None
        loss, right = e01.softmax_loss(logits, label)
        expect(f"the loss of logits {logits}, label {label}", seen[0], loss, ROUNDING, {
            "p is too small for a double; its logarithm is the logit minus the largest, minus ln "
            "of the sum": math.inf})
        for i, slope in enumerate(numbers("the slopes", seen[1], 2)):
            expect(f"the slope in logit {i} of {logits}", slope, right[i], ROUNDING, {})


CHECKS = {"gradient": gradient, "one_sided": one_sided, "symmetric": symmetric,
          "multiply_backward": multiply_backward, "softmax_loss": softmax_loss}
