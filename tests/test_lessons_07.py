"""Lesson 7: the program inside its bands, the solutions right, every planted mistake named."""

import pytest
import torch

from lessons.checks.c07 import CHECKS, one_by_one
from lessons.course import Wrong
from lessons.solutions import e07
from tests.lessons import run_lesson


def test_the_lesson_reaches_its_figures():
    run_lesson("07_gpt.py", pictures={"ladder"})


@pytest.mark.parametrize("name", CHECKS)
def test_the_solution_is_right(name):
    CHECKS[name](getattr(e07, name))


def test_all_heads_are_the_heads_one_by_one_with_gradients():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 96, generator=generator, dtype=torch.float64, requires_grad=True)
    up = torch.randn(2, 8, 32, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad(f(x, 4), x, up)[0] for f in (e07.all_heads, one_by_one)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def the_published_scale(qkv, n_head):
    return one_by_one(qkv, n_head, scale=(qkv.shape[-1] // 3) ** -0.5)


def no_scale(qkv, n_head):
    return one_by_one(qkv, n_head, scale=1.0)


def no_root(qkv, n_head):
    return one_by_one(qkv, n_head, scale=3 * n_head / qkv.shape[-1])


def no_mask(qkv, n_head):
    return one_by_one(qkv, n_head, keep="all")


def mask_turned_round(qkv, n_head):
    return one_by_one(qkv, n_head, keep="future")


def blind_to_itself(qkv, n_head):
    return one_by_one(qkv, n_head, keep="before")


def masked_late(qkv, n_head):
    return one_by_one(qkv, n_head, late=True)


def split(qkv, n_head):
    B, T, C3 = qkv.shape
    return qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)


def attend(q, k, v):
    future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf).softmax(-1) @ v


def not_transposed_back(qkv, n_head):
    B, T, C3 = qkv.shape
    return attend(*split(qkv, n_head)).reshape(B, T, C3 // 3)


def every_third_column(qkv, n_head):
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, -1, n_head).permute(2, 0, 4, 1, 3)  # each (B, H, T, D)
    return attend(q, k, v).permute(0, 2, 3, 1).reshape(B, T, C3 // 3)


def heads_not_joined(qkv, n_head):
    return attend(*split(qkv, n_head))


def digits_as_written(a, b):
    return f"{a:02}+{b:02}={a + b:03}"


def short_operands(a, b):
    return f"{a}+{b}={f'{a + b:03}'[::-1]}"


def short_sum(a, b):
    return f"{a:02}+{b:02}={str(a + b)[::-1]}"


def all_reversed(a, b):
    return f"{a:02}"[::-1] + "+" + f"{b:02}"[::-1] + "=" + f"{a + b:03}"[::-1]


def question_too(rows):
    return rows[:, 1:]


def in_place(rows):
    rows[:, :6] = -100
    return rows[:, 1:]


def unshifted(rows):
    return torch.where(torch.arange(8) >= 5, rows[:, :-1], -100)


def one_early(rows):
    return torch.where(torch.arange(8) >= 6, rows[:, :-1], -100)


def first_digit_lost(rows):
    return torch.where(torch.arange(8) >= 6, rows[:, 1:], -100)


def equals_sign_too(rows):
    return torch.where(torch.arange(8) >= 4, rows[:, 1:], -100)


def zeros_outside(rows):
    return torch.where(torch.arange(8) >= 5, rows[:, 1:], 0)


def number_right(answers, sums):
    return len(sums) * e07.exact_match(answers, sums)


def by_digit(answers, sums):
    pairs = zip("".join(answers), "".join(written[6:] for written in sums), strict=True)
    right = [a == b for a, b in pairs]
    return sum(right) / len(right)


def against_digits_as_written(answers, sums):
    return e07.exact_match(answers, [written[:6] + written[:5:-1] for written in sums])


def turned(sums):
    return [written[:6] + written[:5:-1] for written in sums]


def learnt_as_written(sums):
    ask = e07.adder(turned(sums))
    return lambda questions: [answer[::-1] for answer in ask(questions)]


def answers_as_written(sums):
    return lambda questions: [f"{int(q[:2]) + int(q[3:5]):03}" for q in questions]


def learnt_to_repeat(sums):
    return lambda questions: ["===" for _ in questions]


def hardly_trained(sums):
    return e07.adder(sums, steps=10)


def no_function(sums):
    return None


def one_answer(sums):
    return lambda questions: ["000"]


@pytest.mark.parametrize("name, wrong, told", [
    ("all_heads", the_published_scale, r"by sqrt\(C\), the width, and not by sqrt\(D\)"),
    ("all_heads", no_scale, "are not divided"),
    ("all_heads", no_root, "divided by D, not by its root"),
    ("all_heads", no_mask, "the mask is missing"),
    ("all_heads", mask_turned_round, "the mask is turned round"),
    ("all_heads", blind_to_itself, "does not see itself"),
    ("all_heads", masked_late, "masked after the softmax"),
    ("all_heads", not_transposed_back, "without transposing"),
    ("all_heads", every_third_column, "every third column"),
    ("all_heads", heads_not_joined, r"shape \(2, 5, 12\) is asked for"),
    ("write_sum", digits_as_written, "'07\\+45=052' .* as written, not reversed"),
    ("write_sum", short_operands, "operands have two digits"),
    ("write_sum", short_sum, "the sum has three digits"),
    ("write_sum", all_reversed, "operands stay as they are"),
    ("answer_targets", question_too, "the question counts too"),
    ("answer_targets", in_place, "have been changed"),
    ("answer_targets", unshifted, "what a place reads"),
    ("answer_targets", one_early, "one place too early"),
    ("answer_targets", first_digit_lost, "the first digit is left out"),
    ("answer_targets", equals_sign_too, "no digit of the answer"),
    ("answer_targets", zeros_outside, "stands 0"),
    ("exact_match", number_right, "how many there are"),
    ("exact_match", by_digit, "a sum with one wrong digit is wrong"),
    ("exact_match", against_digits_as_written, "digits as written"),
    ("adder", learnt_as_written, "0.9.. of .* hundreds come before the carry"),
    ("adder", answers_as_written, "come with digits as written"),
    ("adder", learnt_to_repeat, "repeats what it reads"),
    ("adder", hardly_trained, "of 1,000 sums never seen where 0.98 and more is right"),
    ("adder", no_function, "a function that answers questions is asked for, not None"),
    ("adder", one_answer, "a list of 1000 answers is asked for, not a list of 1"),
])
def test_a_mistake_is_named(name, wrong, told):
    with pytest.raises(Wrong, match=told):
        CHECKS[name](wrong)
