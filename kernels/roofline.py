"""What each kernel has to do, in bytes and FLOP, and the time below which a card cannot do it.

    work("attention_forward", GPT2)         # Work(bytes=..., flops=...)
    floor(work(...), CARDS["h100"])         # seconds, and "memory" or "tensor"

The bytes are those that must cross the memory bus once, at bf16 activations and an fp32 residual
stream; the FLOP those of the matrix products, with the causal half of attention's scores.
"""

import math
from typing import NamedTuple

from kernels.cards import Card


class Shape(NamedTuple):
    """One micro-batch of one model."""

    B: int
    T: int
    C: int
    H: int
    V: int  # padded vocabulary


GPT2 = Shape(B=64, T=1024, C=768, H=12, V=50304)  # 124M, 65,536 tokens on one GPU


class Work(NamedTuple):
    bytes: float
    flops: float


def work(kernel: str, s: Shape) -> Work:
    """One launch; `lm_head` is the three matrix products around the cross_entropy kernel."""
    N = s.B * s.T
    activation = 2.0 * N * s.C  # (N, C) in bf16
    statistic = 4.0 * N * s.H  # (B, H, T) in fp32
    product = 2.0 * N * s.T * s.C / 2  # T x T x C, the causal half
    return {
        # reads qkv; writes out and lse
        "attention_forward": Work(4 * activation + statistic, 2 * product),
        # reads qkv, out, dout, lse; writes dq and delta
        "attention_dq": Work(6 * activation + 2 * statistic, 3 * product),
        # reads qkv, dout, lse, delta; writes dk and dv
        "attention_dkdv": Work(6 * activation + 2 * statistic, 4 * product),
        # reads x (fp32) and branch; writes their sum (fp32) and y
        "layer_norm_forward": Work(6 * activation, 0.0),
        # reads dy, the sum and its gradient (fp32 both); writes dx (fp32) and dbranch
        "layer_norm_backward": Work(8 * activation, 0.0),
        # reads the logits twice, writes them once
        "cross_entropy": Work(3 * 2.0 * N * s.V, 0.0),
        # reads qkv; writes its twin and the norms of q and k
        "qk_norm_rotary_forward": Work(6 * activation + 2 * statistic, 0.0),
        # reads dqkv, q, k and their norms; writes dqkv
        "qk_norm_rotary_backward": Work(8 * activation + 2 * statistic, 0.0),
        # reads and writes (N, 4C)
        "relu_squared_forward": Work(8 * activation, 0.0),
        # reads dy and x; writes dx
        "relu_squared_backward": Work(12 * activation, 0.0),
        # as without the bias, which is a row
        "layer_norm_forward_bias": Work(6 * activation, 0.0),
        "layer_norm_backward_bias": Work(8 * activation, 0.0),
        # reads and writes (N, 4C)
        "gelu_forward": Work(8 * activation, 0.0),
        # reads dy and x; writes dx and y
        "gelu_backward": Work(16 * activation, 0.0),
        # reads (N, 3C) and (N, C)
        "column_sums": Work(4 * activation, 0.0),
        # reads a row of wte (fp32) for each token; writes it, with its position
        "embedding_forward": Work(4 * activation, 0.0),
        # reads dx (fp32), and adds it to some rows of dwte
        "embedding_backward": Work(2 * activation, 0.0),
        # reads the keys and values of T positions of B streams
        "decode_attention": Work(2 * activation, 0.0),
        # reads the logits of B streams
        "draw": Work(2.0 * s.B * s.V, 0.0),
        # two windows of 128 numbers, read and written in fp64
        "judge_step": Work(2 * 2 * 128 * 8.0, 0.0),
        # the logits, dh and dW
        "lm_head": Work(6.0 * N * s.V, 3 * 2.0 * N * s.V * s.C),
    }[kernel]


def floor(work: Work, card: Card) -> tuple[float, str]:
    """Seconds that the card needs at its printed rates, and what for."""
    memory = work.bytes / card.memory_bandwidth
    tensor = work.flops / card.bf16_flops
    return (memory, "memory") if memory > tensor else (tensor, "tensor")


class Passes(NamedTuple):
    """How often one program of an attention kernel goes through its inner loops."""

    whole: int  # the loop without a mask
    masked: int  # the one across the diagonal


def passes(kernel: str, T: int, m: int, n: int) -> list[Passes]:
    """Of each tile of one head, from its first rows on. (m, n): the tile, of kernels/tiles.py."""
    transposed = kernel == "attention_dkdv"  # a tile of keys, and steps of queries
    rows, step = (n, m) if transposed else (m, n)
    found = []
    for start in range(0, T, rows):
        end = min(start + rows, T)
        # The queries after these keys, or the keys before these queries.
        whole = math.ceil((T - end) / step) if transposed else start // step
        found.append(Passes(whole, math.ceil((end - start) / step)))
    return found


def loop_floor(kernel: str, s: Shape, m: int, n: int, loops: list[float], card: Card) -> float:
    """Seconds that an attention kernel's inner loops take, with all SMs busy and nothing else.

    loops: cycles of one pass of the unmasked loop and of the one across the diagonal, or of the
    one loop that does both.
    """
    head = passes(kernel, s.T, m, n)
    cycles = sum(tile.whole * loops[0] + tile.masked * loops[-1] for tile in head)
    return s.B * s.H * cycles / card.sms / card.clock_hz
