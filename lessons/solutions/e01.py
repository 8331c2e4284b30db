"""Lesson 1, solved."""

import math
from collections.abc import Callable


def gradient(a: float, b: float, c: float) -> list[float]:
    return [-3 * a**2 - 0.5 * a**-0.5, 3 * math.cos(3 * b) + 2.5 * b**1.5, 1 / c**2]


def one_sided(f: Callable, at: list[float], h: float) -> list[float]:
    slopes = []
    for i in range(len(at)):
        moved = list(at)
        moved[i] += h
        slopes.append((f(*moved) - f(*at)) / h)
    return slopes


def symmetric(f: Callable, at: list[float], h: float) -> list[float]:
    slopes = []
    for i in range(len(at)):
        up, down = list(at), list(at)
        up[i] += h
        down[i] -= h
        slopes.append((f(*up) - f(*down)) / (2 * h))
    return slopes


def multiply_backward(a, b, out) -> None:
    a.grad += b.data * out.grad  # d(a b)/da = b
    b.grad += a.data * out.grad


def softmax_loss(logits: list[float], label: int) -> tuple[float, list[float]]:
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    p = [power / sum(powers) for power in powers]
    slopes = list(p)
    slopes[label] -= 1  # dL/dlogit = p - 1 at the label, p elsewhere
    return math.log(sum(powers)) - (logits[label] - largest), slopes
