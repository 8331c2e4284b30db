"""Lesson 6: the tree's joints, its BatchNorm, and the convolution that it is."""

from torch import Tensor


def flatten_consecutive(x: Tensor, n: int) -> Tensor:
    """Puts n neighbours side by side: (N, T, C) -> (N, T / n, n C), the first of them first.

    Where a single place is left, that axis goes: (N, T, C) -> (N, T C) for n = T.
    """
    raise NotImplementedError


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """BatchNorm's (mean, unbiased variance) of each channel, each (C,).

    x: (N, C) or (N, T, C): a channel's numbers are those of all rows and all places.
    """
    raise NotImplementedError


def dilated(x: Tensor, weights: list[Tensor]) -> Tensor:
    """The tree over every window of a sequence, in one pass: (T, E) -> (T - 2^L + 1, H).

    The tree has L layers and takes 2^L places: layer i is tanh(two neighbours side by side @
    weights[i]), weights[0] being (2 E, H) and all others (2 H, H), and their first half is the
    older neighbour's. Row t of the answer is the tree's output for the window x[t : t + 2^L].
    """
    raise NotImplementedError


def next_output(x: Tensor, memory: list[list[Tensor]], weights: list[Tensor]) -> Tensor:
    """One more place of the same: (E,) -> (H,), the tree's output for the window that ends in x.

    memory[i] holds the inputs of layer i at the 2^i places before this one, the oldest first. It
    is brought up to date for the next call: one in, one out. Nothing else may be computed again.
    """
    raise NotImplementedError
