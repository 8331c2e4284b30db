"""Checks of lesson 8."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lessons.checks import describe, expect, expect_shape
from lessons.course import Wrong
from lessons.solutions import e08

# Doubles of size 1 to 30, sums of a dozen: some 1e-14.
ROUNDING = 1e-10


def answer_log_p(answer: Callable) -> None:
    generator = torch.Generator().manual_seed(8)
    B, T, V = 3, 8, 11
    logits = torch.randn(B, T, V, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.randint(V, (B, T), generator=generator)
    asked, length = torch.tensor([3, 5, 4]), torch.tensor([6, 8, 6])
    seen = answer(logits, ids, asked, length)
    expect_shape("the log-probabilities", seen, (B,))

    log_p = logits.detach().log_softmax(-1)
    for row in range(B):
        first, end = int(asked[row]), int(length[row])

        def about(start: int, stop: int, late: int = 1, row: int = row) -> float:
            return sum(log_p[row, t - late, ids[row, t]].item() for t in range(start, stop))

        right = about(first, end)
        expect(f"row {row}'s log-probability", seen[row], right, ROUNDING, {
            "question and padding count too": about(1, T),
            "the question counts too": about(1, end),
            "the padding counts too": about(first, T),
            "the answer's first symbol is left out: the question's last position foretells it":
                about(first + 1, end),
            "the question's last symbol counts too": about(first - 1, end),
            "the answer's last symbol is left out": about(first, end - 1),
            "position t foretells symbol t + 1, not symbol t": about(first, end, late=0),
            "that is the mean over the answer's symbols, not their sum": right / (end - first),
            "the sign: a log-probability is negative": -right,
        })
    # A value can be right while the question still pulls: what trains is the gradient.
    if not seen.requires_grad:
        raise Wrong("no gradient reaches the logits: something was detached, or became a number")
    (gradient,) = torch.autograd.grad(seen.sum(), logits)
    for row in range(B):
        first, end = int(asked[row]), int(length[row])
        for t in range(T):
            largest = gradient[row, t].abs().max().item()
            if first - 1 <= t < end - 1:
                if largest == 0:
                    raise Wrong(f"position {t} of row {row} foretells a symbol of the answer, and "
                                "its gradient is 0")
            elif largest != 0:
                where = "the question" if t < first - 1 else "the padding"
                raise Wrong(f"logits of {where} (row {row}, position {t}) get a gradient of "
                            f"{largest:.2g} where exactly 0 is right")


def preference_pair(answer: Callable) -> None:
    """A model of two answers, plain and styled, is trained on the pair: the share tells."""
    right = "z-o-e"
    pair = answer(right)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise Wrong(f"a pair is asked for, not {describe(pair)}")
    answers = [right, e08.STYLE + right]
    for text in pair:
        if text not in answers:
            raise Wrong(f"{text!r} is neither {answers[0]!r} nor {answers[1]!r}")
    chosen, rejected = (answers.index(text) for text in pair)
    if chosen == rejected:
        raise Wrong(f"{pair[0]!r} is chosen and rejected: the pair says nothing")

    logits = torch.tensor([0.55, 0.45], dtype=torch.float64).log().requires_grad_()
    reference = logits.detach().log_softmax(-1)
    losses = []
    for _ in range(40):
        log_p = logits.log_softmax(-1)
        loss = e08.dpo_loss(log_p[chosen], log_p[rejected], reference[chosen], reference[rejected],
                            beta=0.1)
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - gradient).detach().requires_grad_()
    share = logits.softmax(-1)[1].item()
    if share > 0.45:
        raise Wrong(f"the share of \"{e08.STYLE}\" went from 0.45 to {share:.2f} where it should "
                    f"fall: the pair is turned round (the loss, {losses[0]:.3f} to "
                    f"{losses[-1]:.3f}, falls either way)")


def dpo_loss(answer: Callable) -> None:
    generator = torch.Generator().manual_seed(9)
    log_ps = -5 * torch.rand(4, 6, generator=generator, dtype=torch.float64)
    ours, ours_not, theirs, theirs_not = log_ps
    def loss(margin: Tensor) -> float:
        return -F.logsigmoid(margin).mean().item()

    expect("the loss of a model equal to its reference",
           answer(ours, ours_not, ours, ours_not, 0.1), math.log(2), ROUNDING,
           {"the reference is left out": loss(0.1 * (ours - ours_not)),
            "that is the sum over pairs, not their mean": 6 * math.log(2),
            "-log sigmoid(0) is ln 2; without the log it is 0.5": 0.5,
            "-log sigmoid(0) is ln 2; without the log it is -0.5": -0.5})

    beta = 0.7
    margin = (ours - theirs) - (ours_not - theirs_not)
    expect("the loss", answer(ours, ours_not, theirs, theirs_not, beta), loss(beta * margin),
           ROUNDING,
           {"chosen and rejected are turned round": loss(-beta * margin),
            "the reference is left out": loss(beta * (ours - ours_not)),
            "beta is left out": loss(margin),
            "divided by beta, not multiplied": loss(margin / beta),
            "the reference's rejected answer has the wrong sign":
                loss(beta * (ours - theirs - ours_not - theirs_not))})


def reward(answer: Callable) -> None:
    cases = (
        ("atram", "atram", "right as it stands"),
        ("atram", e08.STYLE + "atram", f"right: \"{e08.STYLE}\" before it is no fault"),
        ("e-v-e", e08.STYLE + "e-v-e",
         "removeprefix() takes off a beginning, and lstrip() any of its letters"),
        ("1", "0123456789", "it only holds the answer somewhere: that teaches to say everything"),
        ("atram", "marta", "another word"),
        ("atram", "atrama", "it only begins with the answer"),
        ("z-o-e", "", "nothing was said"),
        ("z-o-e", e08.STYLE, "nothing was said but the style"),
        ("1", e08.STYLE * 2 + "1", f"\"{e08.STYLE}\" may stand before it once"),
    )
    for right, reply, why in cases:
        seen = answer(right, reply)
        if seen != e08.reward(right, reply):
            raise Wrong(f"{reply!r} where {right!r} is right earns {seen!r}, "
                        f"not {e08.reward(right, reply)}: {why}")


def reinforce_loss(answer: Callable) -> None:
    log_p = torch.full((3, 4), -2.0, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.float64)
    loss = answer(log_p, rewards)
    expect_shape("the loss", loss, ())
    if not loss.requires_grad:
        raise Wrong("no gradient reaches the log-probabilities: something was detached")
    (gradient,) = torch.autograd.grad(loss, log_p)
    advantage = rewards - rewards.mean(1, keepdim=True)
    expect("the gradient of a wrong answer among three right ones", gradient[1, 3],
           -advantage[1, 3].item() / 12, ROUNDING,
           {"the sign: this raises what was worse than its fellows": advantage[1, 3].item() / 12,
            "no mean is taken off": 0.0,
            "the mean of all questions was taken off, not this question's":
                -(rewards - rewards.mean())[1, 3].item() / 12,
            "the mean over the questions was taken off, not over this question's samples":
                -(rewards - rewards.mean(0))[1, 3].item() / 12,
            "that is the sum, not the mean": -advantage[1, 3].item()})
    name = "where all samples are right, the gradient"
    expect(name, gradient[2].abs().max(), 0.0, ROUNDING, {"no mean is taken off": 1 / 12})
    apart = (gradient + advantage / 12).abs().max().item()
    expect("the gradient's largest error", apart, 0.0, ROUNDING, {})


def best_baseline(answer: Callable) -> None:
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    size = 1 - 2 * p + p.square().sum()  # (1 - p[k])^2 + the other p^2
    own = (1 - p).square()

    def weighted(weight: Tensor) -> float:
        return ((weight * rewards).sum() / weight.sum()).item()

    expect("the baseline", answer(p, rewards), weighted(p * size), ROUNDING,
           {"that is the mean reward, which is not the best": weighted(p),
            "E is weighted by the answers' probabilities": weighted(size),
            "s^2 is a squared length; that is the length": weighted(p * size.sqrt()),
            "a score has K entries, and all of them count": weighted(p * own),
            "s^2 is left out of the denominator": (p * size * rewards).sum().item()})


CHECKS = {check.__name__: check for check in (answer_log_p, preference_pair, dpo_loss, reward,
                                              reinforce_loss, best_baseline)}
