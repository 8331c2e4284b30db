"""Lesson 5: the program inside its bands, the solutions right, every planted mistake named."""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import inspect
import textwrap

import pytest
import torch

from lessons.checks.c05 import CHECKS
from lessons.course import Wrong
from lessons.exercises import e05 as stubs
from lessons.grade import load
from lessons.solutions import e05
from tests.lessons import run_lesson


def test_the_lesson_reaches_its_figures():
    run_lesson("05_backprop.py")


@pytest.mark.parametrize("name", CHECKS)
def test_the_solution_is_right(name):
    CHECKS[name](getattr(e05, name))


def test_the_kernel_without_its_lines_is_to_do():
    with pytest.raises(NotImplementedError):
        CHECKS["dkdv_step"](stubs.dkdv_step)


def not_a_mean(logits, targets):
    return e05.cross_entropy_backward(logits, targets) * len(targets)


def softmax_alone(logits, targets):
    return logits.softmax(1) / len(targets)


def down_the_columns(logits, targets):
    d = logits.softmax(0)
    d[torch.arange(len(targets)), targets] -= 1
    return d / len(targets)


def changes_its_input(logits, targets):
    right = e05.cross_entropy_backward(logits, targets)
    logits -= 1
    return right


def biased(dy, xhat, gain, inv):
    n = len(dy)
    return gain * inv / n * (n * dy - dy.sum(0) - xhat * (dy * xhat).sum(0))


def without_the_mean(dy, xhat, gain, inv):
    n = len(dy)
    return gain * inv / n * (n * dy - n / (n - 1) * xhat * (dy * xhat).sum(0))


def straight_through(dy, xhat, gain, inv):
    return gain * inv * dy


def without_gain(dy, xhat, gain, inv):
    return e05.batchnorm_backward(dy, xhat, torch.ones_like(gain), inv)


def layernorm(correction=0, eps=1e-5, inside=True, dweight=None):
    def layernorm_backward(dy, x, weight):
        inv = (x.var(1, correction=correction, keepdim=True) + eps) ** -0.5
        xhat = (x - x.mean(1, keepdim=True)) * inv
        g = dy * weight if inside else dy
        dx = inv * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))
        right = e05.layernorm_backward(dy, x, weight)
        return dx if inside else weight * dx, dweight(dy, x) if dweight else right[1], right[2]
    return layernorm_backward


@pytest.mark.parametrize("name, wrong, told", [
    ("cross_entropy_backward", not_a_mean, "divide by n"),
    ("cross_entropy_backward", softmax_alone, "not taken off"),
    ("cross_entropy_backward",
     lambda x, y: e05.cross_entropy_backward(x, y) * x.shape[0] / x.shape[1], "by the V columns"),
    ("cross_entropy_backward", lambda x, y: -e05.cross_entropy_backward(x, y), "turned round"),
    ("cross_entropy_backward", down_the_columns, "dim 1"),
    ("cross_entropy_backward", changes_its_input, "work on a copy"),
    ("batchnorm_backward", biased, r"off by 0.\d+, .*1 for n / \(n - 1\): the biased variance"),
    ("batchnorm_backward", without_the_mean, r"sum\(dy\), is missing"),
    ("batchnorm_backward", straight_through, "depend on x too"),
    ("batchnorm_backward", without_gain, "gain is missing"),
    ("layernorm_backward", layernorm(correction=1), "LayerNorm divides by C"),
    ("layernorm_backward", layernorm(eps=0), "eps is missing"),
    ("layernorm_backward", layernorm(inside=False), "weight belongs inside"),
    ("layernorm_backward", layernorm(dweight=lambda dy, x: (dy * x).sum(0)), r"x, and not \(x - "),
    ("layernorm_backward", lambda dy, x, weight: dy, "three gradients"),
    ("layernorm_backward", lambda dy, x, weight: None, "is there a return"),
    ("layernorm_backward",
     lambda dy, x, weight: [-d for d in e05.layernorm_backward(dy, x, weight)], "turned round"),
    ("batchnorm_backward", lambda *given: -e05.batchnorm_backward(*given), "turned round"),
    ("attention_delta", lambda o, do: (o * do).mean(-1), "the mean over the head's width"),
    ("attention_delta", lambda o, do: (o * o).sum(-1), "without do"),
    ("attention_delta", lambda o, do: o * do, "shape"),
])
def test_a_mistake_is_named(name, wrong, told):
    with pytest.raises(Wrong, match=told):
        CHECKS[name](wrong)


# Lines of the solution's kernel, and what stands there in a wrong one.
@pytest.mark.parametrize("right, wrong, told", [
    ("dv = tl.dot(p_t.to(do.dtype), do, dv, ", "dv = tl.dot(p_t.to(do.dtype), do, ",
     "dk is right and dv is not"),
    ("p_t * (dp_t - delta_i[None, :])", "p_t * dp_t", "dv is right and dk is not"),
    ("delta_i[None, :]", "delta_i[:, None]", "dv is right and dk is not"),
    ("dp_t = tl.dot(v, do.T", "dp_t = tl.dot(k, do.T", "dv is right and dk is not"),
    ("dv = tl.dot(p_t", "dv = tl.dot(s_t", "dk is right and dv is not"),
    ("dp_t = tl.dot(v, do.T", "dp_t = tl.dot(v, do", "dv is right and dk is not"),
    ("dk = tl.dot(ds_t.to(q.dtype), q, dk", "dk = tl.dot(ds_t.to(q.dtype), lse, dk",
     "the kernel stops"),
    ("return dk, dv", "return dv, dk", "dk is returned first"),
    ("return dk, dv", "pass", "is there a return"),
], ids=["= for +=", "no delta", "delta along the keys", "k for v", "scores for p", "no transpose",
        "no tile", "swapped", "no return"])
def test_a_mistake_in_the_kernel_is_placed(tmp_path, right, wrong, told):
    """Written to a file, as a student's is: Triton reads the source of what it compiles."""
    source = inspect.getsource(e05)
    assert source.count(right) == 1
    path = tmp_path / "e05.py"
    path.write_text(textwrap.dedent(source).replace(right, wrong))
    step = load(path, "dkdv_step")
    with pytest.raises(Wrong, match=told):
        CHECKS["dkdv_step"](step)
