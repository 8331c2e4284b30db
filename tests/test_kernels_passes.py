"""The passes of a block whose backward pass is written by hand, interpreted, against the reference.

    pytest tests/test_kernels_passes.py

Errors are relative, in the Frobenius norm. fp32: 1e-6, as in tests/exact.py. bf16: what is stored
is rounded once, by at most 2^-8 of itself; sums of shares are fp32 in either.
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import pytest
import torch

from kernels.passes import REFERENCE, triton_passes
from tests.exact import poison  # noqa: F401

OURS = triton_passes()
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
P = 3  # programs, so that rows are left over at the end


def off(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def sums(width, dtype=torch.float32):
    """The middle columns of wider partial sums, which kernels must keep to."""
    wide = torch.full((P, width + 8), 7.0, dtype=dtype)
    return wide, wide[:, 4 : 4 + width]


def assert_margins_stand(wide):
    assert wide[:, :4].eq(7).all() and wide[:, -4:].eq(7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N, W", [(1, 64), (37, 100), (5, 1100)])  # no tile of either is whole
def test_gelu(N, W, dtype):
    torch.manual_seed(N)
    x, dy = (3 * torch.randn(2, N, W)).to(dtype)
    x[0, :4] = torch.tensor([-30.0, 30.0, -1e4, 1e4])  # where tanh is flat, and exp overflows
    bias = torch.randn(W)
    assert off(OURS.gelu_forward(x, bias), REFERENCE.gelu_forward(x.double(), bias.double())) < (
        LIMIT[dtype])
    wide, partial = sums(W)
    right_wide, right = sums(W, torch.float64)
    expected = REFERENCE.gelu_backward(x.double(), bias.double(), dy.double(), right)
    for got, exact in zip(OURS.gelu_backward(x, bias, dy.clone(), partial), expected, strict=True):
        assert off(got, exact) < LIMIT[dtype]
    assert off(partial.double().sum(0), right.sum(0)) < 1e-6
    assert_margins_stand(wide)


def test_gelu_of_nan_is_nan():
    x = torch.tensor([[float("nan"), 1.0]])
    assert OURS.gelu_forward(x, torch.zeros(2)).isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N, W1, W2", [(1, 64, 64), (37, 300, 100), (13, 100, 700)])
def test_column_sums(N, W1, W2, dtype):
    torch.manual_seed(N)
    first, second = torch.randn(N, W1).to(dtype), torch.randn(N, W2).to(dtype)
    wide, partial = sums(W1 + W2)
    OURS.column_sums(first, second, partial)
    exact = torch.cat((first.double().sum(0), second.double().sum(0)))
    assert off(partial.double().sum(0), exact) < 1e-6
    assert_margins_stand(wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N, C", [(1, 64), (7, 100), (5, 768)])
@pytest.mark.parametrize("with_dtotal", [True, False])
def test_layer_norm_with_the_bias_of_its_branch(N, C, dtype, with_dtotal):
    torch.manual_seed(C)
    x, dtotal = torch.randn(2, N, C)
    branch, dy = torch.randn(2, N, C).to(dtype)
    bias_of_branch, weight, bias = torch.randn(3, C)
    dtotal = dtotal if with_dtotal else None
    inputs = (x, branch, bias_of_branch, weight, bias)
    total, y, mean, rstd = OURS.layer_norm_forward(*inputs, 1e-5, dtype)
    exact = REFERENCE.layer_norm_forward(*(t.double() for t in inputs), 1e-5, torch.float64)
    for got, right, limit in zip(
        (total, y, mean, rstd), exact, (1e-6, LIMIT[dtype], 1e-6, 1e-6), strict=True
    ):
        assert off(got, right) < limit
    wide, partial = sums(3 * C)
    _, right = sums(3 * C, torch.float64)
    ds, dbranch = OURS.layer_norm_backward(
        dy, dtotal, total, weight, mean, rstd, partial, torch.float32, dtype, True)
    # Out of this total: its statistics are what was kept.
    exact_ds, _ = REFERENCE.layer_norm_backward(
        dy.double(), None if dtotal is None else dtotal.double(), total.double(), weight.double(),
        mean.double(), rstd.double(), right, torch.float64, torch.float64, True)
    assert off(ds, exact_ds) < 1e-6
    if dtype == torch.bfloat16:
        assert off(dbranch, exact_ds) < LIMIT[dtype]
    else:
        assert dbranch.numel() == 0  # it is ds
    assert off(partial.double().sum(0), right.sum(0)) < 1e-6
    assert_margins_stand(wide)
