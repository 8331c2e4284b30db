"""Lesson 8, solved. The questions stand in lessons/exercises/e08.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

STYLE = "sure: "


def answer_log_p(logits: Tensor, ids: Tensor, asked: Tensor, length: Tensor) -> Tensor:
    log_p = logits[:, :-1].log_softmax(-1)  # (B, T - 1, V): position t foretells symbol t + 1
    log_p = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T - 1)
    foretold = torch.arange(1, ids.shape[1])  # (T - 1,): which symbol each is about
    answer = (foretold >= asked[:, None]) & (foretold < length[:, None])  # (B, T - 1)
    return (log_p * answer).sum(-1)


def preference_pair(answer: str) -> tuple[str, str]:
    return answer, STYLE + answer


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)  # (B,)
    return -F.logsigmoid(beta * margin).mean()


def reward(right: str, reply: str) -> float:
    return float(reply.removeprefix(STYLE) == right)


def reinforce_loss(log_p: Tensor, rewards: Tensor) -> Tensor:
    advantage = rewards - rewards.mean(1, keepdim=True)  # (P, S): better or worse than its prompt's
    return -(advantage * log_p).mean()


def best_baseline(p: Tensor, rewards: Tensor) -> Tensor:
    score = torch.eye(len(p), dtype=p.dtype) - p  # (K, K): row k is d log p[k] / d logits
    size = score.square().sum(-1)  # (K,)
    return (p * rewards * size).sum() / (p * size).sum()
