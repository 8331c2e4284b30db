"""The draw of a token in Triton: temperature, top-k, top-p and the cumulative sum in one launch.

kernels/reference.py says what is drawn. Of a row of logits x_i with the largest x_max, a token
weighs

    w_i = exp((x_i - x_max) / temperature), rounded down to a whole number of 2^-40

and it is kept where x_i is no less than what top-k and top-p leave:

    x_k = the largest x with #{i: x_i >= x} >= k
    x_p = the largest x with sum_{x_i >= x} w_i >= p sum_{x_i >= x_k} w_i

both found by bisection between the bit patterns of -inf and x_max, a pass over the row for each
bit. Sums are of whole numbers, so their order is of no matter. The token drawn is the first whose
sum of weights, with those of the kept ones before it, is above u times the sum of all.

One program reads a row again and again, out of the L2 cache: 100 KB in bf16 for GPT-2.

Shapes: B streams, V tokens.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launcher, reference, tiles
from kernels.constants import DRAW_UNITS

UNITS = tl.constexpr(float(DRAW_UNITS))
NONE = tl.constexpr(-math.inf)
# Low bits that are 0 in every number of the dtype, written as fp32.
SPARE_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit
def _read(row, start, V, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """(BLOCK,) logits from start on, in fp32; -inf from V on."""
    cells = start + tl.arange(0, BLOCK)
    if EDGE:
        x = tl.load(row + cells, mask=cells < V, other=NONE)
    else:
        x = tl.load(row + cells)
    return x.to(tl.float32)


@triton.jit
def _value(pattern, SPARE: tl.constexpr):
    """The fp32 number of a pattern: those of all numbers, in their order, without spare bits."""
    bits = pattern.to(tl.int32) << SPARE
    bits = tl.where(bits < 0, (bits | ((1 << SPARE) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _pattern(value, SPARE: tl.constexpr):
    """The pattern of an fp32 number, int64."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SPARE).to(tl.int64)


@triton.jit
def _weight(x, least, largest, per_temperature):
    """The weights of logits, int64; 0 below `least`."""
    w = tl.exp((x - largest) * per_temperature) * UNITS
    return tl.where(x >= least, w, 0.0).to(tl.int64)


@triton.jit
def _mass_of(x, least, largest, per_temperature, WEIGHTS: tl.constexpr):
    """How many of these logits are no less than `least`, or what they weigh."""
    if WEIGHTS:
        return tl.sum(_weight(x, least, largest, per_temperature))
    else:
        return tl.sum((x >= least).to(tl.int32)).to(tl.int64)


@triton.jit
def _mass(row, V, least, largest, per_temperature, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """The same of a whole row."""
    whole = V // BLOCK * BLOCK
    edge = _read(row, whole, V, BLOCK, EDGE=True)
    mass = _mass_of(edge, least, largest, per_temperature, WEIGHTS)
    for start in range(0, whole, BLOCK):
        x = _read(row, start, V, BLOCK, EDGE=False)
        mass += _mass_of(x, least, largest, per_temperature, WEIGHTS)
    return mass


@triton.jit
def _least(
    row, V, target, largest, per_temperature,
    WEIGHTS: tl.constexpr, BLOCK: tl.constexpr, SPARE: tl.constexpr,
):
    """The largest logit at and above which there is as much as `target`, by _mass; else -inf."""
    low = _pattern(largest * 0 + NONE, SPARE)
    high = _pattern(largest, SPARE) + 1
    while low + 1 < high:
        middle = low + (high - low) // 2
        mass = _mass(row, V, _value(middle, SPARE), largest, per_temperature, WEIGHTS, BLOCK)
        if mass >= target:
            low = middle
        else:
            high = middle
    return _value(low, SPARE)


@triton.jit
def _first(holds, start, V):
    """The first token of a block from `start` on of which this holds, V where there is none."""
    return tl.min(tl.where(holds, start + tl.arange(0, holds.shape[0]), V))


@triton.jit(do_not_specialize=["V", "top_k"])
def draw_tokens(
    logits, u, out, stride, V, per_temperature, top_k, top_p,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, SPARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, one row: grid (B,). It alone writes this row of out (B,).

    logits: (B, V), rows `stride` apart; u: (B,) fp64. TOP_K and TOP_P: whether they leave any out.
    """
    row = logits + tl.program_id(0).to(tl.int64) * stride
    whole = V // BLOCK * BLOCK
    m = _read(row, whole, V, BLOCK, EDGE=True)
    for start in range(0, whole, BLOCK):
        m = tl.maximum(m, _read(row, start, V, BLOCK, EDGE=False), tl.PropagateNan.ALL)
    is_number = tl.sum((m != m).to(tl.int32)) == 0
    largest = tl.max(tl.where(m == m, m, NONE))
    is_number = is_number & (tl.abs(largest) < float("inf"))

    drawn = V
    if is_number:
        if GREEDY:
            for start in range(0, whole, BLOCK):
                drawn = min(drawn, _first(_read(row, start, V, BLOCK, False) == largest, start, V))
            drawn = min(drawn, _first(_read(row, whole, V, BLOCK, True) == largest, whole, V))
        else:
            least = largest * 0 + NONE
            if TOP_K:
                least = _least(row, V, top_k, largest, per_temperature, False, BLOCK, SPARE)
            total = _mass(row, V, least, largest, per_temperature, True, BLOCK)
            if TOP_P:
                share = total.to(tl.float64) * top_p
                least = tl.maximum(
                    least, _least(row, V, share, largest, per_temperature, True, BLOCK, SPARE))
                total = _mass(row, V, least, largest, per_temperature, True, BLOCK)
            target = (tl.load(u + tl.program_id(0)) * total.to(tl.float64)).to(tl.int64)
            target = min(target, total - 1)  # so that there is a sum above it, also for u = 1
            before = total * 0
            for start in range(0, whole, BLOCK):
                x = _read(row, start, V, BLOCK, EDGE=False)
                w = _weight(x, least, largest, per_temperature)
                drawn = min(drawn, _first(before + tl.cumsum(w) > target, start, V))
                before += tl.sum(w)
            x = _read(row, whole, V, BLOCK, EDGE=True)
            w = _weight(x, least, largest, per_temperature)
            drawn = min(drawn, _first(before + tl.cumsum(w) > target, whole, V))
    else:
        drawn = -1
    tl.store(out + tl.program_id(0), drawn.to(tl.int64))


def draw(
    logits: Tensor, u: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Draws a token of each row. logits: (B, V), bf16, fp16 or fp32; u: (B,) fp64. Returns (B,)
    int64. ValueError for another dtype. Defined by kernels/reference.py."""
    tiles.check_dtype("draw", logits.dtype)
    B, V = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    out = torch.empty(B, dtype=torch.long, device=logits.device)
    k = min(top_k or V, V)
    tile = tiles.pick("draw", tiles.arch(logits.device), 65536)
    launcher.launch(draw_tokens, (B,),
        logits, u, out, logits.stride(0), V, 1 / max(temperature, reference.GREEDY_BELOW), k, top_p,
        GREEDY=temperature < reference.GREEDY_BELOW, TOP_K=k < V, TOP_P=top_p < 1,
        SPARE=SPARE_BITS[logits.dtype], BLOCK=tile.n, num_warps=tile.warps,
    )
    return out
