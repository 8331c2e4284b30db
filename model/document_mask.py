"""Attention that ends at the borders of documents: an option of the speedrun's network.

    tokens     EOT a b c EOT d e        every document begins with end of text
    document    1  1 1 1  2  2 2
    e sees                EOT d e

Through PyTorch's masked attention, which our kernels and flash attention don't know: slower than
attention without a mask on every device. Rotary positions see distances only, so they needn't
begin anew in each document.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class DocumentMask:
    """What every token of a batch sees. idx: (B, T) tokens."""

    def __init__(self, idx: Tensor, end_of_text: int) -> None:
        document = (idx == end_of_text).cumsum(1)  # (B, T)
        same = document[:, :, None] == document[:, None, :]  # (B, T, T)
        T = idx.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
        self.sees = (same & causal)[:, None]  # (B, 1, T, T), for all heads

    def attend(self, layer: int, qkv: Tensor, n_head: int) -> Tensor:
        """Attention within documents. qkv: (B, T, 3C) -> (B, T, C)."""
        B, T, C3 = qkv.shape
        q, k, v = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, self.sees)  # (B, H, T, D)
        return y.transpose(1, 2).reshape(B, T, C3 // 3)
