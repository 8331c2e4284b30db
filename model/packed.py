"""Several requests in one row of tokens: no padding, and each prefix computed once.

    packed = PackedRequests([(25, [11, 8, 13, 10]), (31, [4])], device)
    x = model.hidden(idx, packed.positions, packed.attend)     # idx: (1, N) -> (1, N, C)

A request is a prefix of tokens and the continuations that may follow it, each seeing the prefix
and itself. Above are the lengths of two: a prefix of 25 tokens with four continuations, one of 31
with one. idx holds request after request: the prefix, then its continuations.

    tokens       p0 p1 p2  a0 a1  b0         a prefix of 3, continuations a and b
    positions     0  1  2   3  4   3         each continuation goes on where the prefix ends
    b0 sees      p0 p1 p2          b0

Everything but attention works on the N real tokens; attention on a (B, T) grid, a request a row.
Shapes: B requests, T tokens of the longest, N tokens of all, C width, H heads, D head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.constants import SHORT
from kernels.reference import at_least_fp32, short_attention

PREFIX, NOBODY = 0, -1  # owners of a place in the grid; continuations are 1, 2, ...


class PackedRequests:
    """Where each token of the row stands, and what it sees."""

    def __init__(self, requests: list[tuple[int, list[int]]], device: torch.device):
        """requests: the length of each prefix, and those of its continuations."""
        B = len(requests)
        T = max(prefix + sum(continuations) for prefix, continuations in requests)
        owner = torch.full((B, T), NOBODY)
        position = torch.zeros(B, T, dtype=torch.long)
        for row, (prefix, continuations) in enumerate(requests):
            owner[row, :prefix] = PREFIX
            position[row, :prefix] = torch.arange(prefix)
            start = prefix
            for number, length in enumerate(continuations, 1):
                own = slice(start, start + length)
                owner[row, own] = number
                position[row, own] = torch.arange(prefix, prefix + length)
                start += length

        real = owner != NOBODY  # (B, T)
        # Column 0 is a prefix's: padding sees it too, for a softmax over nothing is NaN.
        same_owner = owner[:, :, None] == owner[:, None, :]  # (B, T, T)
        in_prefix = owner[:, None, :] == PREFIX  # (B, 1, T)
        causal = torch.ones(T, T, dtype=torch.bool).tril()  # (T, T)
        self.sees = ((same_owner | in_prefix) & causal).to(device)  # (B, T, T)

        self.grid = (B, T)
        # (B T,): the token in each place; padding repeats the token before it, and nobody sees it.
        self.token = (real.flatten().cumsum(0) - 1).to(device)
        self.place = real.flatten().nonzero()[:, 0].to(device)  # (N,): the place of each token
        self.positions = position[real][None].to(device)  # (1, N)
        self._cached_bias: Tensor | None = None

    def attend(self, layer: int, qkv: Tensor, n_head: int) -> Tensor:
        """Attention within the requests. qkv: (1, N, 3C) -> (1, N, C)."""
        (B, T), H = self.grid, n_head
        C = qkv.shape[-1] // 3
        D = C // H
        qkv = qkv.view(-1, 3, H, D).permute(1, 2, 0, 3)  # (1, N, 3C) -> (3, H, N, D)
        qkv = qkv.index_select(2, self.token)  # (3, H, B T, D)
        q, k, v = qkv.view(3, H, B, T, D)  # each (H, B, T, D)
        if q.device.type == "cpu" and T <= SHORT:  # as in kernels/reference.py
            q, k, v = (z.reshape(H * B, T, D) for z in (q, k, v))
            y = short_attention(q, k, v, self._bias(H, at_least_fp32(q.dtype)))  # (H B, T, D)
        else:
            y = F.scaled_dot_product_attention(q, k, v, self.sees)  # (H, B, T, D)
        y = y.reshape(H, B * T, D).index_select(1, self.place)  # (H, N, D)
        return y.transpose(0, 1).reshape(1, -1, C)  # (1, N, C)

    def _bias(self, n_head: int, dtype: torch.dtype) -> Tensor:
        """(H B, T, T): 0 where a position sees another, else -inf; made once for all layers."""
        if self._cached_bias is None:
            bias = torch.zeros(self.sees.shape, dtype=dtype).masked_fill_(~self.sees, -math.inf)
            self._cached_bias = bias.repeat(n_head, 1, 1)
        return self._cached_bias
