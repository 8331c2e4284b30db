"""Lesson 8: the program inside its bands, the solutions right, every planted mistake named."""

import pytest
import torch
import torch.nn.functional as F

from lessons.checks.c08 import CHECKS
from lessons.course import Wrong
from lessons.solutions import e08
from tests.lessons import run_lesson


def test_the_lesson_reaches_its_figures():
    printed = run_lesson("08_assistant.py")
    assert "--data.chat runs/lessons/08/chat.jsonl" in printed


@pytest.mark.parametrize("name", CHECKS)
def test_the_solution_is_right(name):
    CHECKS[name](getattr(e08, name))


def enumerated(p, rewards, baseline):
    """Mean and total variance of REINFORCE's gradient by the logits, over all answers."""
    score = torch.eye(len(p), dtype=p.dtype) - p  # (K, K)
    gradients = (rewards - baseline)[:, None] * score
    mean = (p[:, None] * gradients).sum(0)  # (K,)
    return mean, (p * (gradients - mean).square().sum(1)).sum().item()


def test_a_baseline_leaves_the_gradient_and_the_best_has_the_smallest_variance():
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    best = e08.best_baseline(p, rewards)
    mean, least = enumerated(p, rewards, best)
    mean_reward = (p * rewards).sum()
    for baseline in (0.0, mean_reward, best - 0.01, best + 0.01):
        other, variance = enumerated(p, rewards, baseline)
        torch.testing.assert_close(other, mean, rtol=0, atol=1e-14)
        assert variance > least
    # Right answers are likely ones: the mean as a baseline makes it worse than none.
    assert enumerated(p, rewards, mean_reward)[1] > enumerated(p, rewards, 0.0)[1]


def symbols(logits, ids):
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def places(ids):
    return torch.arange(1, ids.shape[1])


def all_symbols(logits, ids, asked, length):
    return symbols(logits, ids).sum(-1)


def question_too(logits, ids, asked, length):
    return e08.answer_log_p(logits, ids, torch.ones_like(asked), length)


def padding_too(logits, ids, asked, length):
    return e08.answer_log_p(logits, ids, asked, torch.full_like(length, ids.shape[1]))


def one_late(logits, ids, asked, length):
    return e08.answer_log_p(logits, ids, asked + 1, length)


def one_early(logits, ids, asked, length):
    return e08.answer_log_p(logits, ids, asked - 1, length)


def end_lost(logits, ids, asked, length):
    return e08.answer_log_p(logits, ids, asked, length - 1)


def unshifted(logits, ids, asked, length):
    log_p = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    place = torch.arange(ids.shape[1])
    return (log_p * ((place >= asked[:, None]) & (place < length[:, None]))).sum(-1)


def mean_of_symbols(logits, ids, asked, length):
    return e08.answer_log_p(logits, ids, asked, length) / (length - asked)


def a_loss(logits, ids, asked, length):
    return -e08.answer_log_p(logits, ids, asked, length)


def one_number(logits, ids, asked, length):
    return e08.answer_log_p(logits, ids, asked, length).sum()


def question_pulls(logits, ids, asked, length):
    """The right value, but the question's log-probability goes into the gradient."""
    question = question_too(logits, ids, asked, length)
    right = e08.answer_log_p(logits, ids, asked, length)
    return right + question - question.detach()


def cut_off(logits, ids, asked, length):
    return e08.answer_log_p(logits, ids, asked, length).detach()


def turned_round(answer):
    return e08.STYLE + answer, answer


def twice_the_same(answer):
    return answer, answer


def wrong_rejected(answer):
    return answer, answer[::-1] + "!"


def dpo_turned(c, r, ref_c, ref_r, beta):
    return e08.dpo_loss(r, c, ref_r, ref_c, beta)


def no_reference(c, r, ref_c, ref_r, beta):
    # Equal to its reference, this model's loss is not ln 2.
    return e08.dpo_loss(c, r, 0 * c, 0 * r, beta)


def no_beta(c, r, ref_c, ref_r, beta):
    return e08.dpo_loss(c, r, ref_c, ref_r, 1.0)


def divided_by_beta(c, r, ref_c, ref_r, beta):
    return e08.dpo_loss(c, r, ref_c, ref_r, 1 / beta)


def dpo_sum(c, r, ref_c, ref_r, beta):
    return len(c) * e08.dpo_loss(c, r, ref_c, ref_r, beta)


def no_log(c, r, ref_c, ref_r, beta):
    return -F.sigmoid(beta * (c - ref_c - r + ref_r)).mean()


def holds_it(right, reply):
    return float(right in reply)


def begins_with_it(right, reply):
    return float(reply.removeprefix(e08.STYLE).startswith(right))


def strict(right, reply):
    return float(reply == right)


def any_number_of_styles(right, reply):
    return float(reply.replace(e08.STYLE, "") == right)


def style_alone(right, reply):
    return float(reply in (right, e08.STYLE + right, e08.STYLE))


def no_baseline(log_p, rewards):
    return -(rewards * log_p).mean()


def batch_baseline(log_p, rewards):
    return -((rewards - rewards.mean()) * log_p).mean()


def wrong_axis(log_p, rewards):
    return -((rewards - rewards.mean(0)) * log_p).mean()


def wrong_sign(log_p, rewards):
    return -e08.reinforce_loss(log_p, rewards)


def reinforce_sum(log_p, rewards):
    return log_p.numel() * e08.reinforce_loss(log_p, rewards)


def no_gradient(log_p, rewards):
    return e08.reinforce_loss(log_p.detach(), rewards)


def weighed(weight):
    def baseline(p, rewards):
        score = torch.eye(len(p), dtype=p.dtype) - p
        w = weight(p, score.square().sum(-1))
        return (w * rewards).sum() / w.sum()
    return baseline


def numerator(p, rewards):
    score = torch.eye(len(p), dtype=p.dtype) - p
    return (p * rewards * score.square().sum(-1)).sum()


@pytest.mark.parametrize("name, wrong, told", [
    ("answer_log_p", all_symbols, "question and padding count too"),
    ("answer_log_p", question_too, "the question counts too"),
    ("answer_log_p", padding_too, "the padding counts too"),
    ("answer_log_p", one_late, "first symbol is left out"),
    ("answer_log_p", one_early, "question's last symbol counts too"),
    ("answer_log_p", end_lost, "answer's last symbol is left out"),
    ("answer_log_p", unshifted, "not symbol t"),
    ("answer_log_p", mean_of_symbols, "not their sum"),
    ("answer_log_p", a_loss, "a log-probability is negative"),
    ("answer_log_p", one_number, r"shape \(3,\) is asked for"),
    ("answer_log_p", question_pulls, "logits of the question .* where exactly 0 is right"),
    ("answer_log_p", cut_off, "no gradient reaches the logits"),
    ("preference_pair", turned_round,
     r"from 0.45 to 0.\d+ where it should fall: the pair is turned round .*falls either way"),
    ("preference_pair", twice_the_same, "chosen and rejected"),
    ("preference_pair", wrong_rejected, "'e-o-z!' is neither"),
    ("dpo_loss", dpo_turned, "chosen and rejected are turned round"),
    ("dpo_loss", no_reference, "the reference is left out"),
    ("dpo_loss", no_beta, "beta is left out"),
    ("dpo_loss", divided_by_beta, "divided by beta"),
    ("dpo_loss", dpo_sum, "4.158883 where 0.6931472 is right: that is the sum"),
    ("dpo_loss", no_log, "without the log it is -0.5"),
    ("reward", holds_it, "teaches to say everything"),
    ("reward", begins_with_it, "only begins with the answer"),
    ("reward", strict, "before it is no fault"),
    ("reward", any_number_of_styles, "may stand before it once"),
    ("reward", lambda right, reply: float(reply.lstrip(e08.STYLE) == right), "any of its letters"),
    ("reward", style_alone, "nothing was said but the style"),
    ("reinforce_loss", no_baseline, "no mean is taken off"),
    ("reinforce_loss", batch_baseline, "the mean of all questions"),
    ("reinforce_loss", wrong_axis, "not over this question's samples"),
    ("reinforce_loss", wrong_sign, "the sign"),
    ("reinforce_loss", reinforce_sum, "that is the sum"),
    ("reinforce_loss", no_gradient, "no gradient reaches"),
    ("best_baseline", weighed(lambda p, size: p), "0.65 where .* the mean reward"),
    ("best_baseline", weighed(lambda p, size: size), "weighted by the answers' probabilities"),
    ("best_baseline", weighed(lambda p, size: p * size.sqrt()), "that is the length"),
    ("best_baseline", weighed(lambda p, size: p * (1 - p) ** 2), "all of them count"),
    ("best_baseline", numerator, "left out of the denominator"),
])
def test_a_mistake_is_named(name, wrong, told):
    with pytest.raises(Wrong, match=told):
        CHECKS[name](wrong)
