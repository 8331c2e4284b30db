"""Solutions of lesson 4."""

import torch
from torch import Tensor


def zero_start_loss(train: Tensor, dev: Tensor, classes: int) -> float:
    # Hidden units are 0 whatever the letters, and stay so: only the last bias learns, and the best
    # that it can do is how often each letter occurs.
    counts = torch.bincount(train, minlength=classes)
    return -(counts / counts.sum()).double().log()[dev].mean().item()


def who_learns(zero: set[str]) -> set[str]:
    has = {name: name not in zero for name in ("C", "W1", "W2")}
    learning = {"b2"}
    if has["C"] and has["W1"]:  # hidden units that are not 0
        learning.add("W2")
    if has["W2"]:  # a gradient that comes through to the hidden layer
        learning.add("b1")
    if has["W2"] and has["C"]:
        learning.add("W1")
    if has["W2"] and has["W1"]:
        learning.add("C")
    return learning


def batchnorm(
    x: Tensor, gain: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = x.mean(0), x.var(0)
    y = gain * (x - mean) / (var + 1e-5).sqrt() + bias
    return y, 0.9 * running_mean + 0.1 * mean, 0.9 * running_var + 0.1 * var


def fold_batchnorm(
    W: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    scale = gain / (var + 1e-5).sqrt()
    return W * scale, bias - mean * scale


def update_to_data(before: Tensor, after: Tensor) -> float:
    return ((after - before).std() / before.std()).log10().item()
