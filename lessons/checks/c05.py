"""Checks of lesson 5: gradients in fp64 within 1e-12, the kernel in fp32 within 1e-6."""

import importlib.util
import os
from collections.abc import Callable

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

import torch
from torch import Tensor

from kernels import reference
from lessons.checks import describe
from lessons.checks.tensors import expect_tensor, numbers
from lessons.course import Wrong
from lessons.solutions import e05

KERNEL = 1e-6  # fp32 rounds by 6e-8, of either sign, in sums of some hundred products


def cross_entropy_backward(answer: Callable) -> None:
    logits, targets = 3 * numbers(7, 27), torch.tensor([0, 5, 26, 5, 13, 1, 0])
    right, given = e05.cross_entropy_backward(logits, targets), logits.clone()
    p, one_hot = logits.softmax(1), torch.eye(27, dtype=torch.float64)[targets]
    expect_tensor("dlogits", answer(given, targets), right, {
        "the loss is a mean: divide by n": right * 7,
        "the 1 at the target is not taken off": p / 7,
        "the sign is turned round": -right,
        "1 is taken off everywhere, and belongs to the target alone": (p - 1) / 7,
        "divided by n twice": right / 7,
        "divided by the V columns, and the mean is over the n rows": right * 7 / 27,
        "softmax goes along a row, dim 1": (logits.softmax(0) - one_hot) / 7})
    if not torch.equal(given, logits):
        raise Wrong("the caller's logits have been changed: work on a copy")


def batchnorm_backward(answer: Callable) -> None:
    n, x, dy = 32, numbers(32, 20), numbers(32, 20, seed=6)
    gain, inv = 1 + 0.1 * numbers(1, 20, seed=7), (x.var(0, keepdim=True) + 1e-5) ** -0.5
    xhat = (x - x.mean(0)) * inv
    right = e05.batchnorm_backward(dy, xhat, gain, inv)
    along = gain * inv / n * xhat * (dy * xhat).sum(0)  # of the biased variance
    mean = gain * inv * dy.mean(0)
    expect_tensor("dx", answer(dy, xhat, gain, inv), right, {
        "1 for n / (n - 1): the biased variance": right + along / (n - 1),
        "(n - 1) / n for n / (n - 1)": right + along * (n / (n - 1) - (n - 1) / n),
        "what the mean hands back, sum(dy), is missing": right + mean,
        "what the variance hands back is missing": right + along * n / (n - 1),
        "mean and variance depend on x too: that is gain * inv * dy alone": gain * inv * dy,
        "gain is missing": right / gain,
        "inv is missing": right / inv,
        "the sign is turned round": -right,
        "not divided by n": right * n})


def layernorm_backward(answer: Callable) -> None:
    x, dy, weight = 2 + numbers(6, 48), numbers(6, 48, seed=6), numbers(48, seed=7)
    right = e05.layernorm_backward(dy, x, weight)
    seen = answer(dy, x, weight)
    if not isinstance(seen, tuple | list) or len(seen) != 3:
        raise Wrong(f"three gradients are asked for, dx, dweight, dbias, not {describe(seen)}")

    def with_inv(inv: Tensor, g: Tensor, factor: float = 1.0) -> Tensor:
        xhat = (x - x.mean(1, keepdim=True)) * inv
        along = factor * xhat * (g * xhat).mean(1, keepdim=True)
        return inv * (g - g.mean(1, keepdim=True) - along)

    biased, unbiased = x.var(1, correction=0, keepdim=True), x.var(1, keepdim=True)
    inv, g = (biased + 1e-5) ** -0.5, dy * weight
    xhat = (x - x.mean(1, keepdim=True)) * inv
    expect_tensor("dx", seen[0], right[0], {
        "the unbiased variance: LayerNorm divides by C": with_inv((unbiased + 1e-5) ** -0.5, g),
        "the unbiased variance, with its factor C / (C - 1)": with_inv(
            (unbiased + 1e-5) ** -0.5, g, 48 / 47),
        "C / (C - 1) belongs to an unbiased variance, and this one is biased": with_inv(
            inv, g, 48 / 47),
        "eps is missing": with_inv(biased**-0.5, g),
        "what the mean hands back is missing": right[0] + inv * g.mean(1, keepdim=True),
        "what the variance hands back is missing": with_inv(inv, g, 0.0),
        "the sign is turned round": -right[0],
        "weight is missing": with_inv(inv, dy),
        "weight belongs inside: it differs along the row": weight * with_inv(inv, dy),
        "mean and variance depend on x too: that is weight * inv * dy alone": g * inv})
    expect_tensor("dweight", seen[1], right[1], {
        "x, and not (x - mean) / sqrt(var + eps)": (dy * x).sum(0),
        "the mean over the rows, and not the sum": right[1] / 6,
        "xhat is missing: that is dbias": dy.sum(0),
        "dy, and not dy * weight": (g * xhat).sum(0)})
    expect_tensor("dbias", seen[2], right[2], {
        "the mean over the rows, and not the sum": right[2] / 6,
        "weight comes after the bias is added, and does not belong here": g.sum(0)})


def attention_delta(answer: Callable) -> None:
    o, do = numbers(2, 9, 8), numbers(2, 9, 8, seed=6)
    expect_tensor("delta", answer(o, do), e05.attention_delta(o, do), {
        "the mean over the head's width, and not the sum": (o * do).mean(-1),
        "o^2: that is without do": (o * o).sum(-1),
        "divided by sqrt(D), which belongs to the scores": (o * do).sum(-1) / 8**0.5,
        "the sign is turned round": -(o * do).sum(-1)})


def dkdv_errors(step: Callable) -> dict[str, float]:
    """The relative errors of dk and dv with this _dkdv_step in kernels/attention.py, interpreted.

    Two tiles of 64 keys, the last nearly empty, so that both kinds of tile occur.
    """
    from kernels import attention, tiles

    B, T, H, D = 1, 65, 1, 64
    qkv, dout = numbers(B, T, 3 * H * D), numbers(B, T, H * D, seed=6)
    exact = qkv.clone().requires_grad_()
    reference.attention(exact, H).backward(dout)
    theirs, pick = attention._dkdv_step, tiles.pick
    attention._dkdv_step = step
    tiles.pick = lambda *_: tiles.Tile(64, 64, 4, 1, False)
    try:
        ours = qkv.float().requires_grad_()
        attention.attention(ours, H).backward(dout.float())
    finally:
        attention._dkdv_step, tiles.pick = theirs, pick
    assert ours.grad is not None and exact.grad is not None
    errors = {}
    parts = zip(("dk", "dv"), ours.grad.split(H * D, 2)[1:], exact.grad.split(H * D, 2)[1:],
                strict=True)
    for name, got, right in parts:
        errors[name] = ((got.double() - right).norm() / right.norm()).item()
    return errors


# The four lines of the exercise, each with what it looks like when it is wrong.
KERNEL_MISTAKES = {
    (False, True): "dk is right and dv is not: dv += p^T do, added to what dv held",
    (True, False): "dv is right and dk is not: dp = do v^T, ds = p (dp - delta), dk += ds^T q",
    (True, True): "dk and dv are both wrong: each is added to what it held before, and dk is "
                  "returned first",
}


def dkdv_step(answer: Callable) -> None:
    if importlib.util.find_spec("triton") is None:
        raise Wrong("it needs Triton, which there is for Linux: pip install triton")
    import triton
    from triton.runtime.errors import InterpreterError

    try:
        answer = getattr(answer, "fn", answer)  # of somebody who has written @triton.jit above it
        errors = dkdv_errors(triton.jit(answer))
    except InterpreterError as error:
        cause = error.__cause__ or error
        if isinstance(cause, NotImplementedError) or "NotImplementedError" in repr(cause):
            raise NotImplementedError from None
        if "NoneType" in repr(cause):
            raise Wrong("nothing comes back from it: is there a return?") from None
        raise Wrong(f"the kernel stops: {cause}") from None
    wrong = errors["dk"] > KERNEL, errors["dv"] > KERNEL
    if any(wrong):
        sizes = ", ".join(f"{name} by {error:.2g} of itself" for name, error in errors.items())
        raise Wrong(f"off: {sizes}; {KERNEL_MISTAKES[wrong]}")


CHECKS = {"cross_entropy_backward": cross_entropy_backward,
          "batchnorm_backward": batchnorm_backward, "layernorm_backward": layernorm_backward,
          "attention_delta": attention_delta, "dkdv_step": dkdv_step}
