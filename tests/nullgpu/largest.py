"""The largest micro-batch that a card holds: found by runs that fit and runs that don't."""

from collections.abc import Callable

from tests.nullgpu.rows import Row
from tests.nullgpu.running import Workplace, start

FULL = "is full: halve --micro_batch"  # what launch/errors.py says of a GPU


class OtherProblem(Exception):
    """A run that failed, and not because the card is full."""


def largest_batch(row: Row, place: Workplace, guess: int) -> int:
    """Sequences that one rank computes at once, at most. Raises OtherProblem."""
    def fits(batch: int) -> bool:
        out, problem = start(row, place, batch=batch)
        if problem and FULL not in problem:
            raise OtherProblem(problem)
        return not problem

    return largest(fits, guess)


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest n that fits, 0 if none does. A guess that is right takes two questions; from
    another, the steps double until they have passed the border, which then is halved down to."""
    low, high, step = 0, guess + 1, 1  # low fits, high doesn't
    if fits(guess):
        low = guess
        while fits(low + step):
            low, step = low + step, 2 * step
        high = low + step
    else:
        high = guess
        while high - step > 0 and not fits(high - step):
            high, step = high - step, 2 * step
        low = max(0, high - step)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
