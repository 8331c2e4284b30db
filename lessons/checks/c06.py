"""Checks of lesson 6."""

from collections.abc import Callable

import torch
from torch import Tensor

from lessons.checks import describe
from lessons.checks.tensors import expect_tensor, numbers
from lessons.course import Wrong
from lessons.solutions import e06


def flatten_consecutive(answer: Callable) -> None:
    x = numbers(4, 8, 3)
    for n in (2, 4):
        spread = torch.cat([x[:, start :: 8 // n] for start in range(8 // n)], 1)
        expect_tensor(f"(4, 8, 3) by {n}", answer(x, n), x.view(4, 8 // n, 3 * n), {
            "places far apart are put together, and neighbours are asked for":
                spread.reshape(4, 8 // n, 3 * n),
            "the newest comes first, and the oldest is asked for":
                x.view(4, 8 // n, n, 3).flip(2).flatten(2),
            "channel by channel, and not place by place":
                x.view(4, 8 // n, n, 3).mT.flatten(2),
            "n groups, and groups of n are asked for": x.view(4, n, 24 // n)})
    expect_tensor("(4, 8, 3) by 8", answer(x, 8), x.view(4, 24), {
        "a single place is left: its axis goes": x.view(4, 1, 24)})
    expect_tensor("(1, 8, 3) by 8", answer(x[:1], 8), x[:1].view(1, 24), {
        "squeeze() takes away every axis of length 1, a batch of one too: squeeze(1)":
            x[:1].view(24)})


def batch_statistics(answer: Callable) -> None:
    for x in (1 + 2 * numbers(32, 5), 1 + 2 * numbers(16, 4, 5) + numbers(1, 4, 1)):
        shape = tuple(x.shape)
        seen = answer(x.clone())
        if not isinstance(seen, tuple | list) or len(seen) != 2:
            raise Wrong(f"(mean, variance) is asked for, not {describe(seen)}")
        mean, var = e06.batch_statistics(x)
        places: dict[str, Tensor] = {}
        variances = {"the biased variance, divided by n": x.var(
                         tuple(range(x.dim() - 1)), correction=0),
                     "the standard deviation, and not the variance": var.sqrt()}
        if x.dim() == 3:
            told = "over the batch alone: each place has statistics of its own (lesson 6's bug)"
            places = {told: x.mean(0), f"{told}, ": x.mean(0, keepdim=True)}
            variances |= {told: x.var(0), "the mean of each place's variance: it leaves out how "
                          "far their means lie apart": x.var(0).mean(0)}
        expect_tensor(f"the mean of {shape}", seen[0], mean, places)
        expect_tensor(f"the variance of {shape}", seen[1], var, variances)


def tree(x: Tensor, weights: list[Tensor], older_first: bool = True) -> Tensor:
    """The slow twin: every window by itself."""
    width = 2 ** len(weights)
    x = torch.stack([x[t : t + width] for t in range(len(x) - width + 1)])  # (N, 2^L, E)
    for W in weights:
        older, newer = x[:, ::2], x[:, 1::2]
        x = torch.tanh(torch.cat([older, newer] if older_first else [newer, older], 2) @ W)
    return x[:, 0]


def filters() -> list[Tensor]:
    return [numbers(6, 5, seed=1), numbers(10, 5, seed=2) / 3, numbers(10, 5, seed=3) / 3]


def undilated(x: Tensor, weights: list[Tensor]) -> Tensor:
    for W in weights:
        x = torch.tanh(torch.cat([x[:-1], x[1:]], 1) @ W)
    return x


def padded(x: Tensor, weights: list[Tensor]) -> Tensor:
    for i, W in enumerate(weights):
        older = torch.cat([torch.zeros_like(x[: 2**i]), x[: -(2**i)]])
        x = torch.tanh(torch.cat([older, x], 1) @ W)
    return x


def dilated(answer: Callable) -> None:
    x, weights = numbers(20, 3), filters()
    right = tree(x, weights)
    expect_tensor("the output", answer(x, weights), right, {
        "the newer neighbour's half comes first, and the older's should": tree(x, weights, False),
        "no holes: every layer takes direct neighbours; layer i takes places 2^i apart":
            undilated(x, weights),
        "7 windows too many: those that begin before the sequence": padded(x, weights),
        "one window is missing at the end": right[:-1],
        "one window is missing at the start": right[1:],
        "shifted by a place: each window ends one too early": torch.cat(
            [torch.zeros(1, 5), right[:-1]]),
        "the last layer's tanh is missing": right.atanh()})
    other = numbers(11, 3, seed=9)
    expect_tensor("the output of two layers", answer(other, weights[:2]), tree(other, weights[:2]),
                  {})


def next_output(answer: Callable) -> None:
    x, weights = numbers(12, 3), filters()
    right = tree(x, weights)  # (5, H), for the windows that end at places 7 to 11
    layers = [x, *(e06.dilated(x, weights[: i + 1]) for i in range(3))]  # layer i begins at 2^i - 1
    memory = []
    for i in range(3):
        first = 2**i - 1  # the place of layers[i][0]
        memory.append([layers[i][7 - 2**i + k - first] for k in range(2**i)])
    for place in range(7, 12):
        given = [list(inputs) for inputs in memory]
        seen = answer(x[place], memory, weights)
        if [len(inputs) for inputs in memory] != [1, 2, 4]:
            raise Wrong(f"the memory holds {[len(inputs) for inputs in memory]} inputs after the "
                        "call, and [1, 2, 4] before: one in, one out")
        stale = x[place]
        newest = x[place]
        swapped = x[place]
        for inputs, W in zip(given, weights, strict=True):
            stale = torch.tanh(torch.cat([inputs[0], stale]) @ W)
            newest = torch.tanh(torch.cat([inputs[-1], newest]) @ W)
            swapped = torch.tanh(torch.cat([swapped, inputs[0]]) @ W)
        what = f"output {place - 6}"
        expect_tensor(what, seen, right[place - 7], {
            "the memory has not been brought up to date by the call before":
                stale if place > 7 else torch.full((5,), torch.nan),
            "the newest of the memory is taken: layer i looks 2^i places back, at the oldest":
                newest,
            "the newer half comes first, and the older one should": swapped})


CHECKS = {"flatten_consecutive": flatten_consecutive, "batch_statistics": batch_statistics,
          "dilated": dilated, "next_output": next_output}
