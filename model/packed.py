"""Many short sequences in one row of tokens: no padding, and shared beginnings computed once.

    packed = Packed([(25, [11, 8, 13, 10]), (31, [4])], device)   # two trees: stem, branches
    x = model.hidden(idx, packed)      # idx: (1, N), stems and branches one after the other

A tree is a stem of tokens and the branches that may follow it, each seeing the stem and itself.
Everything but attention works on the N real tokens; attention on a (B, T) grid, a tree a row.
Shapes: B trees, T tokens of the longest tree, N tokens of all, C width, H heads, D head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import SHORT


class Packed:
    """Where each token of the row stands, and what it sees."""

    def __init__(self, trees: list[tuple[int, list[int]]], device: torch.device):
        B, T = len(trees), max(stem + sum(branches) for stem, branches in trees)
        owner = torch.full((B, T), -1)  # 0 the stem, 1.. the branches, -1 nobody
        position = torch.zeros(B, T, dtype=torch.long)
        for row, (stem, branches) in enumerate(trees):
            owner[row, :stem], position[row, :stem] = 0, torch.arange(stem)
            start = stem
            for number, length in enumerate(branches, 1):
                own = slice(start, start + length)
                owner[row, own], position[row, own] = number, torch.arange(stem, stem + length)
                start += length
        real = owner >= 0
        token = real.flatten().cumsum(0) - 1  # padding repeats the token before it; nobody sees it
        # Column 0 is a stem's: padding sees it too, for a softmax over nothing is NaN.
        sees = (owner[:, :, None] == owner[:, None]) | (owner[:, None] == 0)
        sees = (sees & torch.ones(T, T, dtype=torch.bool).tril()).to(device)
        self.grid = (B, T)
        self.token = token.to(device)  # (B T,) the token in each place of the grid
        self.place = real.flatten().nonzero()[:, 0].to(device)  # (N,) the place of each token
        self.positions = position[real][None].to(device)  # (1, N)
        self.sees = sees  # (B, T, T)
        self._made: Tensor | None = None

    def attend(self, layer: int, qkv: Tensor, n_head: int) -> Tensor:
        """Attention within the trees. qkv: (1, N, 3C) -> (1, N, C)."""
        (B, T), C3 = self.grid, qkv.shape[-1]
        H, D = n_head, C3 // 3 // n_head
        qkv = qkv.view(-1, 3, H, D).permute(1, 2, 0, 3)  # (3, H, N, D)
        q, k, v = qkv.index_select(2, self.token).view(3, H, B, T, D)
        if q.device.type == "cpu" and T <= SHORT:  # as in kernels/reference.py
            q, k, v = (z.reshape(H * B, T, D) for z in (q, k, v))
            scores = torch.baddbmm(self._bias(H, q.dtype), q, k.mT, alpha=D**-0.5)
            y = scores.softmax(-1) @ v  # (H B, T, T) @ (H B, T, D)
        else:
            y = F.scaled_dot_product_attention(q, k, v, self.sees)
        y = y.reshape(H, B * T, D).index_select(1, self.place)  # (H, N, D)
        return y.transpose(0, 1).reshape(1, -1, C3 // 3)

    def _bias(self, n_head: int, dtype: torch.dtype) -> Tensor:
        """(H B, T, T): 0 where a position sees another, else -inf; made once for all layers."""
        if self._made is None:
            bias = torch.zeros(self.sees.shape, dtype=dtype).masked_fill_(~self.sees, -math.inf)
            self._made = bias.repeat(n_head, 1, 1)
        return self._made
