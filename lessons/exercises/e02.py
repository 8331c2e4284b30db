"""Lesson 2: names split and counted, the loss, and a row for a one-hot product.

Letters are numbers: 0 is the dot that begins and ends a name, a to z are 1 to 26.
"""

import torch
from torch import Tensor


def split(names: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(train, dev, test): shuffled by random.seed(42) and random.shuffle, then cut at int(0.8 n)
    and int(0.9 n). The list `names` stays as it is."""
    raise NotImplementedError


def trigram_counts(names: list[str]) -> Tensor:
    """(27, 27, 27) int64: [x1, x2, y] is how often y follows x1 x2. Two dots come before a name,
    one after it."""
    raise NotImplementedError


def smoothed_loss(counts: Tensor, x: Tensor, y: Tensor, a: float) -> float:
    """-mean ln p(y | x), with a added to each of the counts (27, 27) before rows become shares.

    x, y: (N,) int64.
    """
    raise NotImplementedError


def best_smoothing(train: tuple[Tensor, Tensor], dev: tuple[Tensor, Tensor],
                   tried: list[float]) -> float:
    """The one of `tried` whose smoothed loss on dev is lowest, with the counts of train.

    train, dev: (x, y), each (N,) int64.
    """
    raise NotImplementedError


def one_hot_product(W: Tensor, x: Tensor) -> Tensor:
    """(N, C): what one_hot(x) @ W gives, without a one-hot vector. W: (V, C), x: (N,) int64."""
    raise NotImplementedError


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-mean ln softmax(logits)[y], a scalar, by exp, sum and log alone. Logits may be large.

    logits: (N, V), y: (N,) int64.
    """
    raise NotImplementedError


if __name__ == "__main__":
    print(cross_entropy(torch.zeros(1, 27), torch.tensor([3])))  # ln 27
