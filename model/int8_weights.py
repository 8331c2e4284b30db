"""Matrices as 8-bit whole numbers, for a model on a CPU that is only read: --dtype int8.

    store_in_int8(model, torch.bfloat16)    # in place; products of many rows in bf16

Half of bf16's bytes, and one text takes little but the time to read them. Each row of a matrix
becomes whole numbers from -127 to 127 and a scale, the row's largest number / 127 (absmax by
row: arXiv 2208.07339), so no number moves by more than half a scale. What a
matrix is multiplied with stays as it is. Embeddings, biases and LayerNorms stay too.

Shapes: C inputs, O outputs.
"""

import torch
import torch.nn as nn
from torch import Tensor

from kernels import int8, reference
from launch.errors import BadInput
from model.generate import store_in
from model.gpt2 import GPT

# Rows up to which the C product is taken: it goes through the matrix once, and multiplies in fp32.
# Of 3,072 x 768 on two Zen 4 cores 8 rows took 0.35 ms, and 16 rows 0.70; turned into bf16 first
# and multiplied then, 0.36 and 0.44.
FEW = 8
LARGEST = 127


class Int8Product:
    """x @ weight.T + bias, the weight in whole numbers. x: (..., C) -> (..., O)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        """weight: (O, C), bias: (O,); dtype: of what comes out, and of products of more than FEW
        rows. RuntimeError where the product can't be compiled."""
        self.few, self.dtype = int8.compiled(), dtype
        self.bias = None if bias is None else dense(bias)
        weight = dense(weight)
        # A row of zeros is zeros by any scale. One with a NaN or an infinity is NaN, as it has to
        # be: so is its scale, or 0 times it.
        self.scale = weight.abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny) / LARGEST
        self.whole = (weight / self.scale[:, None]).round().to(torch.int8)  # (O, C)

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() <= FEW * x.shape[-1]:
            return self.few(x, self.whole, self.scale, self.bias).to(self.dtype)
        return reference.int8_linear(x.to(self.dtype), self.whole, self.scale, self.bias)


def dense(tensor: Tensor) -> Tensor:
    """In fp32, as it lies in memory without gaps: what C reads."""
    return tensor.float().contiguous()


def store_in_int8(model: GPT, dtype: torch.dtype) -> GPT:
    """Keeps the matrices of every product in 8-bit whole numbers alone. GPT-2's embedding, which is
    read by token as well, stays beside them in `dtype`.

    model: GPT-2 or the speedrun's, in eval mode on a CPU, in fp32. dtype: bf16 or fp32, what
    products of many rows are computed in. hidden() and logits() are what remains of it, as of
    model/packed_weights.py. Raises BadInput where this machine can't.
    """
    model.requires_grad_(False)
    try:
        for module in model.modules():
            if type(module) is nn.Linear:
                bias = None if module.bias is None else module.bias.detach()
                product = Int8Product(module.weight.detach(), bias, dtype)
                module.forward = product  # type: ignore[method-assign, assignment]
                module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
        if isinstance(model, GPT):
            head = Int8Product(model.wte.weight.detach(), None, dtype)
            V = model.config.n_vocab
            model.logits = lambda x: head(x)[..., :V]  # type: ignore[method-assign]
    except RuntimeError as error:
        raise BadInput(f"--dtype int8 can't be had on this machine: {error}") from None
    return model if dtype == torch.float32 else store_in(model, dtype)
