"""Steps are judged by the rule of launch/spikes.py, and by the kernel to the last bit."""

import math
import random
import statistics

import numpy as np
import pytest
import torch

from kernels import selfcheck, verdict
from kernels.judge_step import judge_step
from kernels.verdict import GOOD, LOSS_HIGH, NORM_HIGH, Limits

W = 128
LIMITS = Limits(z=7.0, narrowest=0.01, early_steps=10, early_times=10.0, outliers=True, halts=False)


def some_state(draw: random.Random, count: int, streak: int = 0, halted: int = 0) -> torch.Tensor:
    losses, norms = ([round(draw.gauss(mean, 0.1), 2) for _ in range(count)] for mean in (3, 1))
    missing = [0.0] * (W - count)
    numbers = [*missing, *losses, *missing, *norms, count, streak, halted]
    return torch.tensor(numbers, dtype=torch.float64)


def by_statistics(state: torch.Tensor, loss: float, norm: float, clip: float) -> int:
    """The rule once more, by Python's statistics, which are exact."""
    count, streak, _ = state[2 * W :].int().tolist()
    windows = [state[W - count : W].tolist(), state[2 * W - count : 2 * W].tolist()]
    high = []
    for value, window in zip((loss, norm), windows, strict=True):
        if count == W:
            mean, deviation = statistics.fmean(window), statistics.pstdev(window)
            high.append((value - mean) / max(deviation, 0.01 * mean) > 7)
        else:
            high.append(count >= 10 and value > 10 * statistics.median(window))
    if high[0]:
        return LOSS_HIGH
    if streak and (count < W or clip < math.inf and norm <= 10 * statistics.fmean(windows[1])):
        return GOOD  # as large as in the batch before
    return NORM_HIGH if high[1] else GOOD


def test_the_rule_is_that_of_exact_statistics():
    draw, seen = random.Random(0), set()
    for _ in range(300):
        count = draw.choice([0, 1, 9, 10, 11, 50, 127, W, W, W])
        state = some_state(draw, count, streak=draw.choice([0, 2]))
        loss, norm = draw.choice([3.0, 3.5, 4.0, 40.0]), draw.choice([1.0, 1.5, 2.0, 9.0, 20.0])
        clip = draw.choice([1.0, math.inf])
        after, report, skip, _ = verdict.judge_step(
            state, torch.tensor(loss), torch.tensor(norm), None, clip, LIMITS)
        expected = by_statistics(state, loss, norm, clip)
        assert report[0] == expected
        assert skip == (expected != GOOD)
        seen.add((expected, count == W))
        if expected == GOOD:
            assert after[W - 1] == loss and after[2 * W - 1] == norm
            assert torch.equal(after[: W - 1], state[1:W])
        else:
            assert torch.equal(after[: 2 * W], state[: 2 * W])
            assert after[2 * W + verdict.STREAK] == state[2 * W + verdict.STREAK] + 1
    assert seen == {(code, full) for code in (GOOD, LOSS_HIGH, NORM_HIGH) for full in (True, False)}


@pytest.mark.parametrize("norm, clip, divisor", [(4.0, 1.0, 4.0), (0.5, 1.0, 1.0),
                                                 (4.0, math.inf, 1.0), (8.0, 2.0, 4.0)])
def test_what_gradients_are_divided_by(norm, clip, divisor):
    state = some_state(random.Random(0), 5)
    for judge in (verdict.judge_step, judge_step):
        *_, got = judge(state, torch.tensor(3.0), torch.tensor(norm), None, clip, LIMITS)
        # clip_grad_norm_ adds 1e-6 to the norm
        assert got.item() == pytest.approx(divisor, abs=1.1e-6)


def test_the_kernel_has_the_definitions_bits():
    draw, seen = random.Random(1), set()
    flag_choices = [None, None, (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    for _ in range(120):
        count = draw.choice([0, 1, 2, 9, 10, 11, 50, 127, W, W, W])
        state = some_state(draw, count, draw.choice([0, 2]), draw.random() < 0.1)
        limits = LIMITS._replace(outliers=draw.random() < 0.8, halts=draw.random() < 0.3)
        loss = torch.tensor(draw.choice([3.0, 3.1, 4.0, 40.0, math.nan, math.inf]))
        norm = torch.tensor(draw.choice([1.0, 1.1, 2.0, 7.0, 40.0, math.nan, math.inf, 0.0]))
        clip = draw.choice([1.0, math.inf])
        flags = draw.choice(flag_choices)
        flags = flags and torch.tensor(flags, dtype=torch.float64)
        exact = verdict.judge_step(state, loss, norm, flags, clip, limits)
        with np.errstate(invalid="ignore"):  # 0 / 0: a norm of 0 and an empty window
            got = judge_step(state, loss, norm, flags, clip, limits)
        for a, b in zip(got, exact, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))
        seen.add(int(exact[1][0]))
    assert seen == set(range(8))


def test_a_judge_that_is_wrong_somewhere_is_found():
    """As a GPU that contracts products and sums would be."""
    device = torch.device("cpu")
    assert not selfcheck.judge_differs(judge_step, device)

    def wrong(*arguments):
        state, report, skip, divisor = verdict.judge_step(*arguments)
        return state, torch.cat((report[:3], report[3:] * (1 + 2**-52))), skip, divisor

    assert selfcheck.judge_differs(wrong, device).startswith("a loss of")
