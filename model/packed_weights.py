"""Matrices in the layout that oneDNN reads fastest, for a model on a CPU that is only read.

    pack(model)     # in place: its weights must not change any more, and have no gradients

A product of few rows does little but read its matrix, and PyTorch's own reads it in an order that
suits nobody, or in oneDNN's hands lays it out anew each time. Laid out in blocks once, 50,304 x 768
and 8 rows took 3.7 ms and not 7.4 in bf16, 6.2 and not 22.7 in fp32, where PyTorch asks MKL (two
Zen 4 cores). Of 2,048 rows fp32's gain was a sixth, bf16's next to none.

Shapes: N rows, C inputs, O outputs.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model.gpt2 import GPT

# The rows for which oneDNN chooses the layout. Others are served too: between 8 and 256 none of 1
# to 2,048 rows was slower by more than noise.
ROWS = 8
CHECKED = 256  # outputs, of the first and of the last, that are held against fp64
# The norm of the error over that of the result. Of fp32 products of C terms it is some sqrt(C)
# 2^-24 (1e-5 for C = 28,000), and 2^-9 or so where a library has rounded to bf16 on the way;
# results in bf16 are rounded by up to 2^-8 each.
WORST = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


class PackedProduct:
    """x @ weight.T + bias by a packed matrix. x: (..., C) -> (..., O), in the weight's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight: (O, C) in fp32 or bf16; bias: (O,). RuntimeError where oneDNN can't."""
        self.bias, self.dtype = bias, weight.dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        # One row of bf16 is faster by PyTorch's own loop (model/generate.py: _plain_products).
        self.plain = weight if weight.dtype == torch.bfloat16 else None

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        one_row = x.numel() == x.shape[-1]
        if self.plain is not None and one_row and not torch.backends.mkldnn.enabled:
            return F.linear(x, self.plain, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def is_right(self, weight: Tensor) -> bool:
        """Whether products of ROWS rows agree with fp64's, up to what rounding explains."""
        x = torch.randn(ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
        x = x.to(self.dtype)
        y = self(x).double()  # (ROWS, O)
        for some in (slice(CHECKED), slice(-CHECKED, None)):
            bias = None if self.bias is None else self.bias[some].double()
            exact = F.linear(x.double(), weight[some].double(), bias)  # (ROWS, CHECKED)
            if not (y[:, some] - exact).norm() <= WORST[self.dtype] * exact.norm():
                return False
        return True


def pack(model: GPT) -> GPT:
    """Packs the matrices of every product. Those of fp32 are kept in this layout alone, but for
    GPT-2's embedding; of bf16 both are kept. A matrix that can't be packed, or whose products are
    wrong then, stays.

    model: GPT-2 or the speedrun's, in eval mode on a CPU, its matrices in fp32 or bf16 as store_in
    leaves them. hidden() and logits() are what remains of it: no gradients, no loss by forward(),
    nothing to save or move.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if type(module) is nn.Linear and (product := packed(module.weight, module.bias)):
            module.forward = product  # type: ignore[method-assign, assignment]
            if product.plain is None:
                module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
    if isinstance(model, GPT) and (head := packed(model.wte.weight)):  # the table is still read
        V = model.config.n_vocab
        model.logits = lambda x: head(x)[..., :V]  # type: ignore[method-assign]
    return model


def packed(weight: Tensor, bias: Tensor | None = None) -> PackedProduct | None:
    """The product by this matrix; None where it would be wrong, or there is no oneDNN."""
    if not torch.backends.mkldnn.is_available() or weight.dtype not in WORST:
        return None
    try:
        product = PackedProduct(weight.detach(), None if bias is None else bias.detach())
        return product if product.is_right(weight) else None
    except (AttributeError, RuntimeError):  # another PyTorch, or another CPU, has no such operator
        return None
