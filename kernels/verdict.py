"""Whether a training step may be applied: the definition in plain PyTorch, and what it counts.

    state, report, skip, divisor = judge_step(state, loss, norm, flags, clip, limits)

All of it is tensors, so a GPU judges a step before its host knows of it. kernels/judge_step.py does
the same in one launch, to the last bit. launch/spikes.py has the limits and what follows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Limits(NamedTuple):
    """What makes a step a bad one; launch/spikes.py has the numbers."""

    z: float  # so many standard deviations above the mean of a full window are too many
    narrowest: float  # of the mean: a smaller deviation is taken for this
    early_steps: int  # good steps from which on a window that isn't full judges,
    early_times: float  # by so many times its median; later a norm may be as many times the mean
    outliers: bool  # False: only what is no number is bad
    halts: bool  # after a bad step all others are void, until the host has said what follows


# What a verdict is about, as report[0] says it. VOID: of a step that came after one that halts.
GOOD, LOSS_NOT_FINITE, NORM_NOT_FINITE, LOSS_HIGH, NORM_HIGH, OVERFLOW, FAULT, VOID = range(8)
# Behind the two windows in the state: good steps in them, bad ones since the last good one, and
# whether the run halts.
COUNT, STREAK, HALTED = range(3)


def judge_step(
    state: Tensor, loss: Tensor, norm: Tensor, flags: Tensor | None, clip: float, limits: Limits
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whether a training step may be applied: (state after it, report, skip, divisor), all on the
    state's device.

    state: (2 W + 3,) fp64: losses and gradient norms of the last W good steps, the newest last, and
    three counts. loss, norm: scalars. flags: (2 or more,) fp64, not 0 where its data can't be
    read, and where fp16's scale was too large; None: neither. clip: the largest norm, inf for any.

    report: (6,) fp64: which verdict, loss, norm, of an outlier how far it lies out and from where
    (squared standard deviations and mean of a full window, else times and median), and how many
    numbers the windows had. skip, divisor: scalars, fp32, that fused AdamW takes as found_inf and
    grad_scale: 1 where the step is left out; what gradients are divided by, for their norm to be at
    most clip. W is a power of two. Sums are made by halves, so that every device has the same bits.
    """
    W = (len(state) - 3) // 2
    losses, norms, (count, streak, halted) = state[:W], state[W : 2 * W], state[2 * W :]
    divisor = ((norm.float() + 1e-6) / clip).clamp(min=1.0)  # 1e-6: clip_grad_norm_'s
    loss, norm = loss.double(), norm.double()
    fault, overflow = torch.zeros_like(state[:2]) if flags is None else flags[:2]
    full = count == W

    def outlier(value: Tensor, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(whether it is one, how far it lies out, from where)."""
        mean = _sum_by_halves(window) / W
        variance = _sum_by_halves((window - mean).square()) / W
        narrowest = (limits.narrowest * mean).square()
        # Squares are compared: not every device's square root is rounded as IEEE 754 says.
        z_squared = (value - mean).square() / torch.maximum(variance, narrowest)
        late = (value > mean) & ~(z_squared <= limits.z**2)
        median = _median_of_last(window, count)
        times = value / median
        early = (count >= limits.early_steps) & ~(value <= limits.early_times * median)
        is_one = torch.where(full, late, early)
        return is_one, torch.where(full, z_squared, times), torch.where(full, mean, median)

    loss_high, loss_far, loss_from = outlier(loss, losses)
    norm_high, norm_far, norm_from = outlier(norm, norms)
    # Where a step was just left out, and the same weights have a large gradient in the next batch,
    # too, they would have it in every batch. If the clip bears it, the step is taken: any norm
    # while the first ones jump, later up to as many times the mean.
    lasting = (norm <= limits.early_times * norm_from) & math.isfinite(clip)
    norm_high &= (streak == 0) | full & ~lasting

    verdict = torch.full_like(loss, GOOD)
    for applies, code in (  # from the weakest to the strongest
        (norm_high & limits.outliers, NORM_HIGH), (loss_high & limits.outliers, LOSS_HIGH),
        (~norm.isfinite(), NORM_NOT_FINITE), (~loss.isfinite(), LOSS_NOT_FINITE),
        (overflow != 0, OVERFLOW), (fault != 0, FAULT), (halted != 0, VOID),
    ):
        verdict = torch.where(applies, code, verdict)
    good, bad = verdict == GOOD, (verdict >= LOSS_NOT_FINITE) & (verdict <= NORM_HIGH)
    halted = (halted != 0) | (verdict == FAULT) | bad & limits.halts

    far = torch.where(verdict == LOSS_HIGH, loss_far, norm_far)
    origin = torch.where(verdict == LOSS_HIGH, loss_from, norm_from)
    counts = torch.stack((
        torch.where(good, (count + 1).clamp(max=W), count),
        torch.where(good, 0.0, streak + bad), halted.double(),
    ))
    shifted = torch.cat((losses[1:], loss[None], norms[1:], norm[None]))
    windows = torch.where(good, shifted, state[: 2 * W])
    report = torch.stack((verdict, loss, norm, far, origin, count))
    return torch.cat((windows, counts)), report, (~good).float(), divisor


def _sum_by_halves(x: Tensor) -> Tensor:
    """The sum of a power of two of numbers: halves are added up until one is left."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def _median_of_last(window: Tensor, count: Tensor) -> Tensor:
    """The median of a window's last `count` numbers; NaN where there are none."""
    W = len(window)
    place = torch.arange(W, device=window.device)
    window = torch.where(place < W - count, math.inf, window)  # those that aren't there come last
    ordered = window.sort().values
    middle = ((place == (count - 1) // 2) | (place == count // 2)) & (count > 0)
    chosen = torch.where(middle, ordered, 0.0)
    return _sum_by_halves(chosen) / middle.sum()
