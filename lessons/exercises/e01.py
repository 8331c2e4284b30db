"""Lesson 1: slopes by hand and by quotient, a product's `_backward`, a softmax's loss."""

from collections.abc import Callable


def gradient(a: float, b: float, c: float) -> list[float]:
    """The slopes [df/da, df/db, df/dc] of f = -a^3 + sin(3 b) - 1/c + b^2.5 - a^0.5, by hand."""
    raise NotImplementedError


def one_sided(f: Callable, at: list[float], h: float) -> list[float]:
    """Each slope of f(*at) as (f(one variable + h) - f) / h, the others as they were."""
    raise NotImplementedError


def symmetric(f: Callable, at: list[float], h: float) -> list[float]:
    """Each slope of f(*at) as (f(one variable + h) - f(the same - h)) / 2 h."""
    raise NotImplementedError


def multiply_backward(a, b, out) -> None:
    """What out = a * b owes a and b: each has .data (its value) and .grad (so far); out.grad is
    final. a and b may be the same object."""
    raise NotImplementedError


def softmax_loss(logits: list[float], label: int) -> tuple[float, list[float]]:
    """(loss, its slopes in the logits), where loss = -ln p[label], p = exp(logits) / their sum.

    Logits may be in the thousands: the largest may be taken off all of them first.
    """
    raise NotImplementedError
