"""Checks of lesson 4: in fp64, so that a biased variance can't hide in a tolerance."""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lessons.checks import describe, expect
from lessons.checks.tensors import ROUNDING, expect_tensor, numbers
from lessons.course import Wrong
from lessons.solutions import e04


def zero_start_loss(answer: Callable) -> None:
    train = torch.tensor([0] * 40 + [1] * 30 + [2] * 20 + [3] * 10)
    dev = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3, 3, 3])
    right = e04.zero_start_loss(train, dev, 4)
    p = torch.bincount(train).double() / 100
    smoothed = (torch.bincount(train) + 1).double() / 104
    expect("the loss", answer(train, dev, 4), right, 1e-7, {
        "ln of the classes: guessing evenly, and the last bias learns better": math.log(4),
        "the train loss, and dev is asked for": e04.zero_start_loss(train, train, 4),
        "dev's own counts: the bias has only seen train": e04.zero_start_loss(dev, dev, 4),
        "log2": right / math.log(2), "the minus is missing": -right,
        "the log of the mean, and not the mean of the logs": -p[dev].mean().log().item(),
        "smoothed: nothing here adds a count": -smoothed.log()[dev].mean().item()})


def gradients(zero: set[str]) -> set[str]:
    """The truth by autograd."""
    shapes = {"C": (5, 4), "W1": (8, 6), "b1": (6,), "W2": (6, 5), "b2": (5,)}
    p = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        p[name] = numbers(*shape, seed=seed) * (name not in zero and name[0] != "b")
        p[name].requires_grad_()
    before, after = torch.tensor([[0, 1], [2, 3], [4, 0]]), torch.tensor([1, 2, 4])
    h = torch.tanh(p["C"][before].flatten(1) @ p["W1"] + p["b1"])
    F.cross_entropy(h @ p["W2"] + p["b2"], after).backward()
    return {name for name, value in p.items() if value.grad is not None and value.grad.any()}


WHY = {  # what each gradient is made of
    "C": "C learns by what comes back through W2 and W1",
    "W1": "W1's gradient is e times what comes back through W2, and e is C's",
    "W2": "W2's gradient is h times that of the logits, and h is 0 where C or W1 is",
    "b1": "b1 learns by what comes back through W2 alone",
    "b2": "the last bias always learns",
}


def who_learns(answer: Callable) -> None:
    names = ("C", "W1", "W2")
    for count in range(4):
        for zero in map(set, itertools.combinations(names, count)):
            seen, right = answer(set(zero)), gradients(zero)
            if not isinstance(seen, set):
                raise Wrong(f"a set of names is asked for, not {describe(seen)}")
            if seen == right:
                continue
            shown = ", ".join(sorted(zero)) or "nothing"
            line = (f"with {shown} at 0: {', '.join(sorted(seen)) or 'none'} where "
                    f"{', '.join(sorted(right))} is right")
            everyone = {"C", "W1", "b1", "W2", "b2"}
            if seen == everyone - zero:
                raise Wrong(f"{line}: that a matrix is 0 doesn't stop its own gradient, but those "
                            "of its neighbours")
            if seen == everyone:
                raise Wrong(f"{line}: a gradient is a product, and one of its factors is 0 here")
            known = sorted((seen ^ right) & WHY.keys())  # no reason for a name that nobody has
            raise Wrong(": ".join([line, *(WHY[name] for name in known[:1])]))


def batchnorm(answer: Callable) -> None:
    x, gain, bias = 2 + 3 * numbers(32, 10), 1 + 0.1 * numbers(10, seed=5), numbers(10, seed=6)
    running_mean, running_var = numbers(10, seed=7), 1 + numbers(10, seed=8) ** 2
    right = e04.batchnorm(x, gain, bias, running_mean, running_var)
    given = running_mean.clone(), running_var.clone()
    seen = answer(x, gain, bias, *given)
    if not isinstance(seen, tuple | list) or len(seen) != 3:
        raise Wrong(f"(y, mean, variance) is asked for, not {describe(seen)}")
    mean, var, biased = x.mean(0), x.var(0), x.var(0, correction=0)
    d = x - mean
    rows, across = x.mean(1, keepdim=True), x.var(1, keepdim=True)
    expect_tensor("y", seen[0], right[0], {
        "the biased variance, divided by n": gain * d / (biased + 1e-5).sqrt() + bias,
        "eps is missing": gain * d / var.sqrt() + bias,
        "eps belongs under the root": gain * d / (var.sqrt() + 1e-5) + bias,
        "the root is missing": gain * d / (var + 1e-5) + bias,
        "over the channels: that is LayerNorm": gain * (x - rows) / (across + 1e-5).sqrt() + bias,
        "the running statistics are for after training": (
            gain * (x - running_mean) / (running_var + 1e-5).sqrt() + bias),
        "by the running statistics, and the batch's own are asked for": (
            gain * (x - right[1]) / (right[2] + 1e-5).sqrt() + bias)})
    expect_tensor("the running mean", seen[1], right[1], {
        "0.9 and 0.1 have changed places": 0.1 * running_mean + 0.9 * mean,
        "that is the batch's alone": mean, "it has not moved": running_mean})
    expect_tensor("the running variance", seen[2], right[2], {
        "0.9 and 0.1 have changed places": 0.1 * running_var + 0.9 * var,
        "the biased variance, divided by n": 0.9 * running_var + 0.1 * biased,
        "the standard deviation, and not the variance": 0.9 * running_var + 0.1 * var.sqrt(),
        "that is the batch's alone": var, "it has not moved": running_var})
    if not torch.equal(given[0], running_mean) or not torch.equal(given[1], running_var):
        raise Wrong("the caller's running statistics have been changed: return new tensors")


def fold_batchnorm(answer: Callable) -> None:
    W, gain, bias = numbers(6, 10), 1 + 0.1 * numbers(10, seed=5), numbers(10, seed=6)
    mean, var = numbers(10, seed=7), 0.1 + numbers(10, seed=8) ** 2
    right = e04.fold_batchnorm(W, gain, bias, mean, var)
    seen = answer(W, gain, bias, mean, var)
    if not isinstance(seen, tuple | list) or len(seen) != 2:
        raise Wrong(f"(W', b') is asked for, not {describe(seen)}")
    inv = (var + 1e-5) ** -0.5
    expect_tensor("W'", seen[0], right[0], {
        "eps is missing": W * gain / var.sqrt(),
        "divided by the variance, and not by its root": W * gain / (var + 1e-5),
        "gain is missing": W * inv,
        "W itself: the scale belongs into it": W})
    expect_tensor("b'", seen[1], right[1], {
        "the mean goes through the scale too": bias - mean,
        "the mean is left out": bias,
        "the mean is taken off, and not added": bias + mean * gain * inv,
        "gain is missing": bias - mean * inv,
        "the bias is added after the scale": (bias - mean) * gain * inv})


def update_to_data(answer: Callable) -> None:
    before = 0.02 * numbers(40, 30)
    after = before + 3e-5 * numbers(40, 30, seed=5) + 1e-4
    right, update = e04.update_to_data(before, after), after - before
    expect("the ratio", answer(before, after), right, ROUNDING, {
        "ln, and not log10": right * math.log(10),
        "without the log": 10**right,
        "turned round: data over update": -right,
        "over the weights after the step, and not before it": (
            update.std() / after.std()).log10().item(),
        "norms: a shift of all weights counts in a norm and not in a std": (
            update.norm() / before.norm()).log10().item(),
        "the mean of the ratios, weight by weight": (update / before).abs().mean().log10().item(),
        "the change of the std, and not the std of the change": (
            (after.std() - before.std()).abs() / before.std()).log10().item()})


CHECKS = {"zero_start_loss": zero_start_loss, "who_learns": who_learns, "batchnorm": batchnorm,
          "fold_batchnorm": fold_batchnorm, "update_to_data": update_to_data}
