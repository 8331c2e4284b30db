"""Lesson 8: losses of examples, preferences and rewards.

    python -m lessons.grade 08
"""

from torch import Tensor

STYLE = "sure: "


def answer_log_p(logits: Tensor, ids: Tensor, asked: Tensor, length: Tensor) -> Tensor:
    """The log-probability of each row's answer, summed over its symbols: (B,).

    logits: (B, T, V), those at position t are about symbol t + 1. ids: (B, T), rows of a question,
    an answer and padding: symbols 0 to asked - 1 are the question's, asked to length - 1 the
    answer's. asked, length: (B,). Neither question nor padding may count: logits that foretell
    them get a gradient of exactly 0.
    """
    raise NotImplementedError


def preference_pair(answer: str) -> tuple[str, str]:
    """(chosen, rejected) for a right answer, so that a model learns to leave out the STYLE."""
    raise NotImplementedError


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """Direct preference optimisation's loss (arXiv 2305.18290, equation 7), the mean over pairs.

    chosen, rejected: (B,) log-probabilities of answers by the model; ref_*: by the reference.
    """
    raise NotImplementedError


def reward(right: str, reply: str) -> float:
    """1.0 if a reply is the right answer, with STYLE before it or without, else 0.0."""
    raise NotImplementedError


def reinforce_loss(log_p: Tensor, rewards: Tensor) -> Tensor:
    """A loss whose gradient is REINFORCE's: minus the mean of advantage times log-probability.

    log_p, rewards: (P, S), S samples of each of P questions. The advantage of a sample is its
    reward less the mean reward of its question's samples.
    """
    raise NotImplementedError


def best_baseline(p: Tensor, rewards: Tensor) -> Tensor:
    """The constant b that makes the variance of REINFORCE's gradient smallest: E[R s^2] / E[s^2].

    p: (K,), a softmax's probabilities of K answers, rewards: (K,). s^2 of an answer is the squared
    length of its score, the gradient of its log-probability by the softmax's K logits.
    """
    raise NotImplementedError
