"""Checks of lesson 2, on names made up here: they need no file."""

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lessons.checks import describe, expect, expect_shape
from lessons.course import Wrong
from lessons.solutions import e02

# Means of some thousand fp64 logarithms: 1e-13; in fp32, which is allowed too, 1e-6.
ROUNDING = 2e-6


def made_up(count: int) -> list[str]:
    """Names of syllables, some of them frequent, all with a seed."""
    draw = random.Random(7)
    syllables = ["ma", "ri", "an", "el", "jo", "la", "vi", "ka", "to", "be", "ze", "o"]
    return ["".join(draw.choices(syllables, range(12, 0, -1), k=draw.randint(1, 3)))
            for _ in range(count)]


def pairs(names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y): every letter and the one after it."""
    x, y = [], []
    for name in names:
        letters = [0, *(ord(c) - ord("a") + 1 for c in name), 0]
        x += letters[:-1]
        y += letters[1:]
    return torch.tensor(x), torch.tensor(y)


def split(answer: Callable) -> None:
    names = [f"name{i}" for i in range(1237)]
    given = list(names)
    parts = answer(given)
    if given != names:
        raise Wrong("the caller's list has been shuffled as well: shuffle a copy")
    if not isinstance(parts, tuple | list) or len(parts) != 3:
        raise Wrong(f"three lists are asked for, not {describe(parts)}")
    right = e02.split(names)
    sizes, wanted = [len(part) for part in parts], [len(part) for part in right]
    seen = [name for part in parts for name in part]
    if len(set(seen)) < len(seen):
        raise Wrong(f"{len(seen) - len(set(seen))} names lie in two parts: test names in train "
                    "are a leak")
    if len(seen) < len(names):
        raise Wrong(f"{len(names) - len(seen)} of {len(names)} names lie in no part: a part "
                    "begins where the one before ends")
    if sizes != wanted:
        raise Wrong(f"sizes {sizes} where {wanted} are right: cut at int(0.8 n) and int(0.9 n)")
    if list(parts[0]) == names[: wanted[0]]:
        raise Wrong("the names are not shuffled: files are often sorted, and dev would be another "
                    "kind of name")
    if [list(part) for part in parts] != [list(part) for part in right]:
        raise Wrong("shuffled by another seed or method than random.seed(42), random.shuffle")


def trigram_counts(answer: Callable) -> None:
    names = made_up(60)
    counts = answer(list(names))
    expect_shape("the counts", counts, (27, 27, 27))
    right = e02.trigram_counts(names)
    for where, what in ((counts[0, 0], "begins: two dots come before a name"),
                        (counts[:, :, 0], "ends: a dot comes after it")):
        if where.sum() == 0:
            raise Wrong(f"0 where {len(names)} is right: no name {what}")
    letters = sum(map(len, names))
    expect("the sum of all counts", counts.sum(), letters + len(names), 0.5, {
        "a third dot before or after each name": letters + 2 * len(names)})
    for axes, which in (((1, 0, 2), "x1 and x2 have changed places"),
                        ((2, 1, 0), "what comes first is y, and should be x1")):
        if torch.equal(counts.long(), right.permute(axes)):
            raise Wrong(f"counts[m, a, .] is {counts[13, 1, 0]:g} where {right[13, 1, 0]} is "
                        f"right: {which}")
    if counts[0, 0].sum() != len(names):
        raise Wrong(f"names that begin: {counts[0, 0].sum():g} where {len(names)} is right: "
                    "counts[0, 0, y] is how often a name begins with y")
    if not torch.equal(counts.long(), right):
        raise Wrong(f"{(counts != right).sum()} of 19,683 counts are wrong")


def smoothed_loss(answer: Callable) -> None:
    x, y = pairs(made_up(60))
    counts = torch.bincount(x * 27 + y, minlength=729).view(27, 27)
    x, y = pairs(["marian", "zeba"])
    # Over whole names x and y hold the same letters, and it cancels out whose sum one divides by.
    x, y = x[:9], y[:9]
    for a in (1.0, 0.25):
        added = counts.double() + a
        right = e02.smoothed_loss(counts, x, y, a)
        p = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
        columns = -(added / added.sum(0, keepdim=True))[x, y].log().mean().item()
        expect(f"the loss with a = {a}", answer(counts.clone(), x, y, a), right, ROUNDING, {
            "columns add up to 1, and rows should: sum(1, keepdim=True)":
                -(added / added.sum(1))[x, y].log().mean().item(),
            "sum(0) adds up columns": columns,
            "the sum, and not the mean": right * len(x),
            "the minus is missing": -right,
            "log2": right / math.log(2),
            "the log of the mean, and not the mean of the logs":
                -(added / added.sum(1, keepdim=True))[x, y].mean().log().item(),
            "a is added to the shares, and belongs to the counts":
                -(p + a)[x, y].log().mean().item(),
            "a is in the counts, but not in the sums": -(added / counts.sum(1, keepdim=True))[
                x, y].log().mean().item(),
            "a is not used": -p[x, y].log().mean().item()})


def best_smoothing(answer: Callable) -> None:
    train, dev = pairs(made_up(60)), pairs(["marian", "joel", "zoe", "kato", "vian"])
    tried = [0.001, 0.01, 0.1, 0.3, 1.0, 3.0]
    right = e02.best_smoothing(train, dev, tried)
    on_train = e02.best_smoothing(train, train, tried)
    on_dev = e02.best_smoothing(dev, dev, tried)
    counts = torch.bincount(train[0] * 27 + train[1], minlength=729).view(27, 27)
    losses = [e02.smoothed_loss(counts, *dev, a) for a in tried]
    assert len({right, on_train, tried[losses.index(max(losses))]}) == 3
    expect("a", answer(train, dev, list(tried)), right, 1e-9, {
        "chosen on train, which likes its own counts and wants no smoothing": on_train,
        "chosen with dev's own counts": on_dev,
        "that is where the loss is highest": tried[losses.index(max(losses))],
        "that is its place in the list": tried.index(right)})


def one_hot_product(answer: Callable) -> None:
    W = torch.randn(50_257, 16, generator=torch.Generator().manual_seed(1))
    x = torch.arange(3, 50_257, 12)
    seen = answer(W, x)
    expect_shape("the product", seen, (len(x), 16))
    if not torch.equal(seen, W[x]):
        raise Wrong("another matrix than one_hot(x) @ W")
    small = torch.arange(9.0).view(3, 3)
    seen = answer(small, torch.tensor([2, 0, 2]))
    if torch.equal(seen, small[:, [2, 0, 2]]):
        raise Wrong("columns of W: one_hot(x) @ W picks rows")
    if not torch.equal(seen, small[[2, 0, 2]]):
        raise Wrong("a row may be asked for twice, in any order")


def cross_entropy(answer: Callable) -> None:
    logits = torch.randn(5, 27, generator=torch.Generator().manual_seed(2)) * 2
    y = torch.tensor([3, 0, 26, 3, 11])
    right = F.cross_entropy(logits, y).item()
    p = logits.softmax(1)[torch.arange(5), y]
    over_rows = -logits.softmax(0)[torch.arange(5), y].log().mean().item()
    expect("the loss", answer(logits.clone(), y), right, ROUNDING, {
        "the sum, and not the mean": right * 5,
        "the minus is missing": -right,
        "log2": right / math.log(2),
        "softmax over dim 0: the five rows, not the 27 letters": over_rows,
        "the log of the mean, and not the mean of the logs": -p.mean().log().item(),
        "all letters, and not the one at y": -logits.log_softmax(1).mean().item(),
        "the log-sum-exp is missing": -logits[torch.arange(5), y].mean().item()})
    seen = answer(torch.tensor([[1000.0, 0.0]]), torch.tensor([1]))
    if not math.isfinite(float(seen)):
        raise Wrong(f"logits 1000 and 0 give {float(seen)} where 1000 is right: exp(1000) is more "
                    "than a float holds, so take the largest logit off first; and exp(-1000) is 0, "
                    "so take the log of the sum alone, not of a share")
    expect("the loss of logits 1000 and 0", seen, 1000.0, 1e-3, {})


CHECKS = {"split": split, "trigram_counts": trigram_counts, "smoothed_loss": smoothed_loss,
          "best_smoothing": best_smoothing, "one_hot_product": one_hot_product,
          "cross_entropy": cross_entropy}
