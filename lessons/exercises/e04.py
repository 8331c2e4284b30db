"""Lesson 4: starts that can't learn, BatchNorm, and how to be rid of it after training."""

from torch import Tensor


def zero_start_loss(train: Tensor, dev: Tensor, classes: int) -> float:
    """The dev loss, in nats, at which lesson 4's network ends that starts from zeros everywhere.

    All matrices and biases are 0 at first, and it is trained on (letters before, letter after)
    until nothing changes any more. train, dev: (n,), the letters after, each in [0, classes).
    """
    raise NotImplementedError


def who_learns(zero: set[str]) -> set[str]:
    """The names of the parameters whose gradient in the first step is not all 0.

    logits = tanh(C[before] @ W1 + b1) @ W2 + b2, where b1 and b2 start at 0, and so do the
    matrices in `zero`, out of {"C", "W1", "W2"}; the others start at random.
    """
    raise NotImplementedError


def batchnorm(
    x: Tensor, gain: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm in training, as in lesson 4's deep network: (y, running mean, running variance).

    x: (n, C), the rest (C,). y = gain (x - mean) / sqrt(var + 1e-5) + bias, by the batch's own mean
    and unbiased variance (n - 1). What runs along keeps 0.9 of itself and takes 0.1 of the batch's.
    Returns new tensors.
    """
    raise NotImplementedError


def fold_batchnorm(
    W: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    """(W', b') with x @ W' + b' = gain (x @ W - mean) / sqrt(var + 1e-5) + bias for every x.

    W: (inputs, outputs), the rest (outputs,); mean and var are the running ones, so BatchNorm is
    nothing but a linear function by now.
    """
    raise NotImplementedError


def update_to_data(before: Tensor, after: Tensor) -> float:
    """The fourth picture: log10 of the update's standard deviation over that of the weights.

    before, after: a matrix before and after one step. Standard deviations are the unbiased ones.
    """
    raise NotImplementedError
