"""Triton's interpreter, made fit to test with: import this before anything imports triton.

It turns the interpreter on (triton decides when a kernel is defined), and mends what is wrong in
Triton 3.7's: bf16 is kept as bit patterns in uint16, which products, sums and comparisons would
take for numbers, and fp32 -> bf16 truncates. Here products and casts go through fp32 and round to
the nearest even, as on the GPU; any other arithmetic on bf16 raises, which also holds the kernels
to fp32. Overflow of int32, silent on the GPU, raises too. Triton 3.6's takes a number out of an
array of one as NumPy 2.4 no longer allows.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

# ruff: noqa: E402
import pytest

pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle
from triton.runtime.jit import JITFunction

if isinstance(tl.zeros, JITFunction):
    raise ImportError(
        "triton was imported before TRITON_INTERPRET=1 was set: see tests/conftest.py"
    )


def is_bf16(x: TensorHandle | tl.tensor) -> bool:
    return x.dtype.scalar == tl.bfloat16


def to_fp32(x: TensorHandle) -> TensorHandle:
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def to_bf16(x: TensorHandle) -> TensorHandle:
    """Round to nearest, ties to even; every NaN becomes the one quiet NaN."""
    bits = np.ascontiguousarray(x.data, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(x.data), np.uint16(0x7FC0), rounded), tl.bfloat16)


_dot, _cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
_fp_to_fp, _binary = InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.binary_op
_reduce, _patch_tensor = ReduceOps.apply, interpreter._patch_lang_tensor


def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    a, b = (to_fp32(x) if is_bf16(x) else x for x in (a, b))
    return _dot(self, a, b, d, input_precision, max_num_imprecise_acc)


def cast(self, source, to):
    if is_bf16(source) and to.scalar == tl.float32:
        return to_fp32(source)
    if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        return to_bf16(source)
    if is_bf16(source) or to.scalar == tl.bfloat16:
        raise TypeError(f"cast {source.dtype} to {to} through fp32")
    return _cast(self, source, to)


def fp_to_fp(self, source, to, rounding):
    if is_bf16(source) or to.scalar == tl.bfloat16:
        return cast(self, source, to)
    return _fp_to_fp(self, source, to, rounding)


def binary(self, left, right, op):
    if is_bf16(left) or is_bf16(right):
        raise TypeError(f"{op.__name__} on bf16: convert to fp32 first")
    return _binary(self, left, right, op)


def reduce(self, operands):
    for x in operands if isinstance(operands, (tuple, list)) else [operands]:
        if is_bf16(x):
            raise TypeError("reduction of bf16: convert to fp32 first")
    return _reduce(self, operands)


def patch_tensor(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast
InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.binary_op = fp_to_fp, binary
ReduceOps.apply = reduce
interpreter._patch_lang_tensor = patch_tensor
object.__setattr__(interpreter.interpreter_builder.options, "debug", True)  # int32 overflow raises
