"""The race: of several implementations of one pass the fastest that is right on this card.

    findings = race.check(runs, fault_of)                 # on every rank, each on its own card
    findings = race.merge([findings, ...])                # what any rank has found holds for all
    result = race.decide(runs, findings, judge, repeatable=True)           # on one rank
    result.winner, result.said        # "cudnn", "cudnn 0.72 ms, triton 0.95, flash not repeatable"

Logic alone: kernels/candidates.py names who runs, and what is right. A run computes the pass once
and returns its tensors; the judge says how many milliseconds that takes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Run = Callable[[], tuple[Tensor, ...]]
Findings = dict[str, str]  # by name what is against it, "" for nothing

NOT_REPEATABLE = "not repeatable"  # right, but a second run had other bits


class Result(NamedTuple):
    winner: str | None  # None: nobody was left
    said: str


def check(runs: dict[str, Run], fault_of: Callable[[tuple[Tensor, ...]], str]) -> Findings:
    """Runs each twice, looks at what it returns, and compares the bits of both times.

    fault_of: what is wrong with a run's tensors, "" for nothing.
    """
    return {name: _look_at(run, fault_of) for name, run in runs.items()}


def _look_at(run: Run, fault_of: Callable[[tuple[Tensor, ...]], str]) -> str:
    try:
        first, second = run(), run()
        return fault_of(first) or ("" if _same_bits(first, second) else NOT_REPEATABLE)
    except Exception as error:  # it doesn't compile, launch, or know this card or shape
        return _in_a_line(error)


def _same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    """As bytes: no NaN differs from itself, and -0 is not 0."""
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
               for a, b in pairs)


def _in_a_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def merge(of_ranks: list[Findings]) -> Findings:
    """The same names on every rank; a fault of one outweighs bits of another that didn't repeat."""
    merged = {}
    for name in of_ranks[0]:
        of_this = [findings[name] for findings in of_ranks]
        faults = [finding for finding in of_this if finding not in ("", NOT_REPEATABLE)]
        merged[name] = NOT_REPEATABLE if NOT_REPEATABLE in of_this else ""
        if faults:
            merged[name] = faults[0]
    return merged


def may_win(finding: str, repeatable: bool) -> bool:
    """repeatable: only what repeats itself bit for bit."""
    return not finding or finding == NOT_REPEATABLE and not repeatable


def decide(
    runs: dict[str, Run], findings: Findings, judge: Callable[[Run], float], repeatable: bool,
    unit: str = " ms",
) -> Result:
    """Times those that may win. Of equally fast ones the first that was named is taken.

    unit: behind the first time; "" in a line that has said it before.
    """
    times, left_out = {}, {}
    for name, run in runs.items():
        if not may_win(findings[name], repeatable):
            left_out[name] = findings[name]
            continue
        try:
            times[name] = judge(run)
        except Exception as error:  # too little memory for many runs in a row, say
            left_out[name] = _in_a_line(error)
    ranked = sorted(times, key=times.__getitem__)
    said = [_with_time(name, times[name], unit * (name == ranked[0]), findings[name])
            for name in ranked]
    said += [f"{name} {reason}" for name, reason in left_out.items()]
    return Result(ranked[0] if ranked else None, ", ".join(said))


def _with_time(name: str, milliseconds: float, unit: str, finding: str) -> str:
    note = f" ({finding})" if finding else ""
    return f"{name} {milliseconds:.2f}{unit}{note}"
