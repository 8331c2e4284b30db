"""The interpreter's mends: without them the kernel tests would show nothing about bf16.

pytest tests/test_kernels_interpreter.py
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def round_trip(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(tl.bfloat16))


@triton.jit
def product(a, b, c, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def add(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at) + tl.load(x + at))


@triton.jit
def total(x, y, N: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, N))))


@triton.jit
def square(x, y):
    value = tl.load(x)
    tl.store(y, value * value)


def test_fp32_rounds_to_the_nearest_bf16():
    """As PyTorch rounds: ties to even (1 + 2^-8 is one), infinities and NaN kept."""
    x = torch.randn(64)
    x[:5] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), float("nan"), -(2.0**-130)])
    y = torch.empty(64, dtype=torch.bfloat16)
    round_trip[(1,)](x, y, N=64)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_bf16_products_are_those_of_numbers():
    a, b = torch.randn(2, 16, 16).bfloat16()
    c = torch.empty(16, 16)
    product[(1,)](a, b, c, N=16)
    torch.testing.assert_close(c, a.float() @ b.float())


@pytest.mark.parametrize("kernel", [add, total])
def test_other_arithmetic_on_bf16_is_refused(kernel):
    x = torch.ones(16).bfloat16()
    with pytest.raises(triton.runtime.errors.InterpreterError, match="convert to fp32 first"):
        kernel[(1,)](x, torch.empty_like(x), N=16)


def test_overflow_of_int32_raises():
    x = torch.tensor([65536], dtype=torch.int32)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="overflow"):
        square[(1,)](x, torch.empty_like(x))
