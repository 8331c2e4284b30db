"""kernels/verdict.py's judge_step in one launch, where PyTorch's takes some 200 on a GPU.

    state, report, skip, divisor = judge_step(state, loss, norm, flags, clip, limits)

Arithmetic is fp64, sums are made by halves as in the definition, and products are not contracted
with sums (enable_fp_fusion), so state and report have the definition's bits. skip and divisor are
what fused AdamW takes as found_inf and grad_scale: 1 where the step is left out; what gradients are
divided by, for their norm to be at most the clip.

Shapes: W numbers in each of the state's two windows, a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launcher, tiles, verdict
from kernels.verdict import Limits

GOOD, LOSS_NOT_FINITE, NORM_NOT_FINITE, LOSS_HIGH, NORM_HIGH, OVERFLOW, FAULT, VOID = (
    tl.constexpr(code) for code in range(8))  # as in kernels/verdict.py
assert verdict.VOID == VOID.value


@triton.jit
def _sum_by_halves(x, WINDOW: tl.constexpr, HALVINGS: tl.constexpr):
    """The sum of x (W,): halves are added up until one number is left."""
    for i in tl.static_range(HALVINGS):
        x = tl.sum(tl.reshape(x, (2, WINDOW // 2 ** (i + 1))), 0)  # of two numbers: in either order
    return tl.sum(x, 0)


@triton.jit
def _median_of_last(window, place, count, WINDOW: tl.constexpr, HALVINGS: tl.constexpr):
    """The median of the last `count` of the WINDOW numbers at a pointer: of those with
    (count - 1) // 2 and count // 2 others below, where the earlier of equal ones is the lower."""
    own = tl.load(window + place)
    rank = tl.zeros([WINDOW], tl.int32)
    for i in range(WINDOW - count, WINDOW):
        other = tl.load(window + i)
        rank += ((other < own) | ((other == own) & (i < place))).to(tl.int32)
    middle = (rank == (count - 1) // 2) | (rank == count // 2)
    middle = middle & (place >= WINDOW - count)
    total = _sum_by_halves(tl.where(middle, own, 0.0), WINDOW, HALVINGS)
    found = tl.sum(middle.to(tl.int32), 0).to(tl.float64)
    return total / tl.where(found > 0, found, float("nan"))  # NaN where there are none


@triton.jit
def _outlier(
    value, window, place, count, Z: tl.constexpr, NARROWEST: tl.constexpr,
    EARLY_STEPS: tl.constexpr, EARLY_TIMES: tl.constexpr,
    WINDOW: tl.constexpr, HALVINGS: tl.constexpr,
):
    """(whether value is one, how far it lies out, from where). window: a pointer."""
    if count == WINDOW:
        numbers = tl.load(window + place)
        origin = _sum_by_halves(numbers, WINDOW, HALVINGS) / WINDOW  # their mean
        off = numbers - origin
        variance = _sum_by_halves(off * off, WINDOW, HALVINGS) / WINDOW
        narrowest, above = NARROWEST * origin, value - origin
        far = above * above / tl.maximum(variance, narrowest * narrowest)
        inside = (value <= origin) | (far <= Z * Z)
    else:
        origin = _median_of_last(window, place, count, WINDOW, HALVINGS)
        far = value / origin
        inside = (value <= EARLY_TIMES * origin) | (count < EARLY_STEPS)
    return inside == 0, far, origin


@triton.jit
def judge(
    state, loss, norm, flags, new_state, report, skip, divisor, clip,
    Z: tl.constexpr, NARROWEST: tl.constexpr, EARLY_STEPS: tl.constexpr, EARLY_TIMES: tl.constexpr,
    OUTLIERS: tl.constexpr, HALTS: tl.constexpr, HAS_FLAGS: tl.constexpr,
    WINDOW: tl.constexpr, HALVINGS: tl.constexpr,
):
    """One program judges one step. state, new_state: (2 W + 3,) fp64, two buffers; report: (6,)
    fp64; skip, divisor: fp32; flags: (2 or more,) fp64, fault and overflow."""
    place, losses, norms = tl.arange(0, WINDOW), state, state + WINDOW
    count = tl.load(state + 2 * WINDOW).to(tl.int32)
    streak, halted = tl.load(state + 2 * WINDOW + 1), tl.load(state + 2 * WINDOW + 2)
    own_norm = tl.load(norm)  # in the precision that the gradients are clipped in
    loss_value, norm_value = tl.load(loss).to(tl.float64), own_norm.to(tl.float64)

    loss_high, loss_far, loss_from = _outlier(
        loss_value, losses, place, count, Z, NARROWEST, EARLY_STEPS, EARLY_TIMES, WINDOW, HALVINGS)
    norm_high, norm_far, norm_from = _outlier(
        norm_value, norms, place, count, Z, NARROWEST, EARLY_STEPS, EARLY_TIMES, WINDOW, HALVINGS)
    lasting = (norm_value <= EARLY_TIMES * norm_from) & (clip < float("inf"))
    norm_high = norm_high & ((streak == 0) | ((count == WINDOW) & (lasting == 0)))

    verdict = tl.where(norm_high & OUTLIERS, NORM_HIGH, GOOD)  # from the weakest to the strongest
    verdict = tl.where(loss_high & OUTLIERS, LOSS_HIGH, verdict)
    verdict = tl.where(tl.abs(norm_value) < float("inf"), verdict, NORM_NOT_FINITE)
    verdict = tl.where(tl.abs(loss_value) < float("inf"), verdict, LOSS_NOT_FINITE)
    if HAS_FLAGS:
        verdict = tl.where(tl.load(flags + 1) != 0, OVERFLOW, verdict)
        verdict = tl.where(tl.load(flags) != 0, FAULT, verdict)
    verdict = tl.where(halted != 0, VOID, verdict)

    good = verdict == GOOD
    bad = (verdict >= LOSS_NOT_FINITE) & (verdict <= NORM_HIGH)
    halts = (halted != 0) | (verdict == FAULT) | (bad & HALTS)

    # The windows, moved on by one, or as they were.
    before = tl.where(good, place + 1, place)  # where the number that comes to a place has been
    newest = good & (place == WINDOW - 1)
    kept = before < WINDOW
    old_loss = tl.load(losses + before, mask=kept, other=0.0)
    old_norm = tl.load(norms + before, mask=kept, other=0.0)
    tl.store(new_state + place, tl.where(newest, loss_value, old_loss))
    tl.store(new_state + WINDOW + place, tl.where(newest, norm_value, old_norm))
    more = tl.where(good, tl.minimum(count + 1, WINDOW), count)
    tl.store(new_state + 2 * WINDOW, more.to(tl.float64))
    tl.store(new_state + 2 * WINDOW + 1, tl.where(good, 0.0, streak + bad.to(tl.float64)))
    tl.store(new_state + 2 * WINDOW + 2, halts.to(tl.float64))

    of_loss = verdict == LOSS_HIGH
    tl.store(report, verdict.to(tl.float64))
    tl.store(report + 1, loss_value)
    tl.store(report + 2, norm_value)
    tl.store(report + 3, tl.where(of_loss, loss_far, norm_far))
    tl.store(report + 4, tl.where(of_loss, loss_from, norm_from))
    tl.store(report + 5, count.to(tl.float64))
    tl.store(skip, tl.where(good, 0.0, 1.0))
    tl.store(divisor, tl.maximum((own_norm.to(tl.float32) + 1e-6) / clip, 1.0))


def judge_step(
    state: Tensor, loss: Tensor, norm: Tensor, flags: Tensor | None, clip: float, limits: Limits
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(state after the step, report, skip, divisor), all on the state's device.

    flags: (2,) fp64, fault and overflow; None: neither. clip: inf leaves gradients as they are.
    """
    W = (len(state) - 3) // 2
    new_state, report = torch.empty_like(state), state.new_empty(6)
    skip, divisor = (state.new_empty((), dtype=torch.float32) for _ in range(2))
    launcher.launch(judge, (1,),
        state, loss, norm, flags if flags is not None else state, new_state, report, skip, divisor,
        clip, Z=limits.z, NARROWEST=limits.narrowest, EARLY_STEPS=limits.early_steps,
        EARLY_TIMES=limits.early_times, OUTLIERS=limits.outliers, HALTS=limits.halts,
        HAS_FLAGS=flags is not None, WINDOW=W, HALVINGS=W.bit_length() - 1,
        num_warps=tiles.pick("judge_step", tiles.arch(state.device), 1).warps,
        enable_fp_fusion=False,  # kernels/audit.py compiles it so, too
    )
    return new_state, report, skip, divisor
