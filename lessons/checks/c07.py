"""Checks of lesson 7."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lessons.checks import describe, expect, expect_shape
from lessons.course import Wrong
from lessons.solutions import e07

# Doubles of size 1, sums of a dozen products: some 1e-15.
ROUNDING = 1e-12
ENOUGH = 0.98  # the share right after 500 steps; seeds 0, 1 and 2 gave 1.000, 0.997, 1.000


def name_mistake(what: str, seen: Tensor, right: Tensor, mistakes: dict[str, Tensor]) -> None:
    """Raises Wrong unless two tensors are equal to rounding, and says whose number it is."""
    expect_shape(what, seen, tuple(right.shape))
    apart = (seen - right).abs().max().item()
    if apart <= ROUNDING:
        return
    line = f"{what}: off by up to {apart:.2g}"
    for mistake, wrong in mistakes.items():
        if torch.allclose(seen.double(), wrong.double(), 0, ROUNDING, equal_nan=True):
            raise Wrong(f"{line}: {mistake}")
    raise Wrong(line)


def one_by_one(
    qkv: Tensor, n_head: int, scale: float | None = None, keep: str = "past", late: bool = False
) -> Tensor:
    """The slow twin: head after head. keep: what a position sees. late: masked after softmax."""
    T, D = qkv.shape[1], qkv.shape[2] // 3 // n_head
    ones = torch.ones(T, T, dtype=torch.bool)
    sees = {"past": ones.tril(), "all": ones, "future": ones.triu(), "before": ones.tril(-1)}[keep]
    heads = []
    for h in range(n_head):
        q, k, v = (part[..., h * D : (h + 1) * D] for part in qkv.chunk(3, -1))  # (B, T, D)
        scores = q @ k.mT * (D**-0.5 if scale is None else scale)  # (B, T, T)
        if late:
            weights = scores.softmax(-1) * sees
        else:
            weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        heads.append(weights @ v)
    return torch.cat(heads, -1)


def all_heads(answer: Callable) -> None:
    generator = torch.Generator().manual_seed(7)
    B, T, H, D = 2, 5, 3, 4
    C = H * D
    qkv = torch.randn(B, T, 3 * C, generator=generator, dtype=torch.float64)
    right = one_by_one(qkv, H)
    columns = qkv.view(B, T, 3, D, H).transpose(3, 4).reshape(B, T, 3 * C)
    interleaved = one_by_one(columns, H).view(B, T, H, D).transpose(2, 3).reshape(B, T, C)
    name_mistake("all heads", answer(qkv, H), right, {
        "scores are divided by sqrt(C), the width, and not by sqrt(D), the head's":
            one_by_one(qkv, H, C**-0.5),
        "scores are not divided by sqrt(D)": one_by_one(qkv, H, 1.0),
        "scores are divided by D, not by its root": one_by_one(qkv, H, 1 / D),
        "every position sees the future: the mask is missing": one_by_one(qkv, H, keep="all"),
        "the mask is turned round: positions see the future only":
            one_by_one(qkv, H, keep="future"),
        "a position does not see itself": one_by_one(qkv, H, keep="before"),
        "masked after the softmax, so weights no longer sum to 1": one_by_one(qkv, H, late=True),
        "heads take every third column: view as (.., H, D), not as (.., D, H)": interleaved,
        "(B, H, T, D) was reshaped without transposing H and T back":
            right.view(B, T, H, D).transpose(1, 2).reshape(B, T, C),
    })


def write_sum(answer: Callable) -> None:
    for a, b in ((7, 45), (99, 98), (0, 0), (60, 3)):
        seen, right = answer(a, b), e07.write_sum(a, b)
        if seen == right:
            continue
        digits = f"{a + b:03}"
        mistakes = {
            "the sum stands as written, not reversed": f"{a:02}+{b:02}={digits}",
            "operands have two digits, with a zero before": f"{a}+{b}={digits[::-1]}",
            "the sum has three digits, with zeros before": f"{a:02}+{b:02}={str(a + b)[::-1]}",
            "operands stay as they are": f"{a:02}"[::-1] + "+" + f"{b:02}"[::-1] + "="
                                         + digits[::-1],
        }
        why = [mistake for mistake, wrong in mistakes.items() if seen == wrong]
        raise Wrong(": ".join([f"{a} and {b}: {seen!r} where {right!r} is right", *why[:1]]))


def answer_targets(answer: Callable) -> None:
    sums = [e07.write_sum(7, 45), e07.write_sum(99, 98)]
    rows = torch.tensor([[e07.SYMBOLS.index(symbol) for symbol in written] for written in sums])
    before, after, right = rows.clone(), rows[:, 1:], e07.answer_targets(rows)

    def from_place(place: int, source: Tensor, outside: int = -100) -> Tensor:
        return torch.where(torch.arange(8) >= place, source, outside)

    seen = answer(rows)
    if not torch.equal(rows, before):
        raise Wrong("the rows that were given have been changed: work on a clone")
    name_mistake("the targets", seen, right, {
        "the question counts too": after,
        "targets are what follows each symbol; these are one place too early":
            from_place(6, rows[:, :-1]),
        "these are what a place reads, not what follows it": from_place(5, rows[:, :-1]),
        "the first digit is left out: it is the \"=\" that foretells it": from_place(6, after),
        "the \"=\" is a target, and it is no digit of the answer": from_place(4, after),
        "outside the answer stands 0, which is the digit 0, and not -100":
            from_place(5, after, 0),
    })


def exact_match(answer: Callable) -> None:
    sums = [e07.write_sum(7, 45), e07.write_sum(99, 98), e07.write_sum(12, 12), "30+40=070"]
    answers = ["250", "791", "440", "171"]  # right, right, one digit wrong, two
    expect("the share of right answers", answer(answers, sums), 0.5, ROUNDING, {
        "that is how many there are, not their share": 2,
        "that is the share of right digits: a sum with one wrong digit is wrong": 9 / 12,
        "answers are compared with the digits as written": 0.0,
    })


def adder(answer: Callable) -> None:
    known, asked = e07.held_out(e07.write_sum)
    questions = [written[:e07.QUESTION] for written in asked]
    ask = answer(list(known))
    if not callable(ask):
        raise Wrong(f"a function that answers questions is asked for, not {describe(ask)}")
    replies: Any = ask(questions)
    if not isinstance(replies, list) or len(replies) != len(asked):
        raise Wrong(f"a list of {len(asked)} answers is asked for, not {describe(replies)}")
    score = e07.exact_match(replies, asked)
    if score >= ENOUGH:
        return
    line = f"{score:.3f} of 1,000 sums never seen where {ENOUGH} and more is right"
    if e07.exact_match([reply[::-1] for reply in replies], asked) > max(score, 0.5):
        raise Wrong(f"{line}: the answers come with digits as written, not reversed")
    if sum(reply == "===" for reply in replies) > 500:
        raise Wrong(f"{line}: it repeats what it reads; a target is what follows a symbol")
    if score > 0.5:
        raise Wrong(f"{line}: so much is had with digits as written, where the hundreds come before"
                    " the carry is known, or with too few steps")
    raise Wrong(line)


CHECKS = {check.__name__: check
          for check in (all_heads, write_sum, answer_targets, exact_match, adder)}
