"""The loop that asks one question at a time, as build-nanogpt does, beside packed passes.

    python -m tests.baseline_hellaswag ROWS.jsonl [N [ROUNDS]]    # GPT-2 124M, random weights

Printed are questions/s, the ratio to the loop in fp32 by the clock and by CPU seconds (which hold
on a machine that others use too), and how far the mean loss a token of an ending is from the
loop's. A round times the loops on a slice of the questions and every packed way on all of them, so
that a machine that slows down slows all; packed ways by the median round.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from eval.choice import Question
from eval.hellaswag import read_questions
from eval.likelihood import Request, negative_loglikelihoods
from launch.world import World, autocast, keep_freed_memory
from model.generate import store_in
from model.gpt2 import GPT, GPTConfig

ALONE = World(0, 1, torch.device("cpu"))


@torch.no_grad()
def loop(model: GPT, questions: list[Question]) -> list[float]:
    """Four padded rows a question, all their logits, the losses of the endings' tokens."""
    losses = []
    for question in questions:
        context, endings = question.requests[0]
        T = len(context) + max(len(ending) for ending in endings)
        idx = torch.zeros(4, T, dtype=torch.long)
        counted = torch.zeros(4, T)
        for row, ending in enumerate(endings):
            end = len(context) + len(ending)
            idx[row, :end] = torch.tensor(context + ending)
            counted[row, len(context) : end] = 1
        logits = model(idx)[:, :-1].float()  # (4, T - 1, V)
        each = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none")
        losses += (each.view(4, T - 1) * counted[:, 1:]).sum(1).tolist()
    return losses


def packed(model: GPT, questions: list[Question]) -> list[float]:
    """Packed, but every ending with a context of its own."""
    requests = [Request(request.context, [tokens]) for q in questions for request in q.requests
                for tokens in request.continuations]
    return negative_loglikelihoods(model, requests, ALONE)[0]


def shared(model: GPT, questions: list[Question]) -> list[float]:
    """As eval.hellaswag does it."""
    requests = [request for q in questions for request in q.requests]
    return negative_loglikelihoods(model, requests, ALONE)[0]


def compare(path: str, n: int = 100, rounds: int = 4) -> None:
    """Prints the table."""
    keep_freed_memory()
    torch.manual_seed(0)
    questions = read_questions(Path(path), n)
    model = GPT(GPTConfig()).eval()
    small = store_in(copy.deepcopy(model), torch.bfloat16)
    Way = tuple[Callable[[GPT, list[Question]], list[float]], GPT, str]
    ways: dict[str, Way] = {
        "loop, fp32": (loop, model, "fp32"),
        "loop, bf16": (loop, small, "bf16"),
        "packed, fp32": (packed, model, "fp32"),
        "packed, bf16": (packed, small, "bf16"),
        "shared, fp32": (shared, model, "fp32"),
        "shared, bf16": (shared, small, "bf16"),
    }
    losses: dict[str, list[float]] = {name: [] for name in ways}
    times: dict[str, list[float]] = {name: [] for name in ways}  # seconds a question
    work: dict[str, list[float]] = {name: [] for name in ways}  # CPU seconds a question
    for turn in range(-1, rounds):  # turn -1 warms up
        for name, (way, asked, dtype) in ways.items():
            part = questions[:2] if turn < 0 else questions
            if way is loop and turn >= 0:
                part = questions[turn::rounds]
            start, begun = time.perf_counter(), time.process_time()
            with autocast(ALONE.device, dtype):
                found = way(asked, part)
            if turn >= 0:
                times[name].append((time.perf_counter() - start) / len(part))
                work[name].append((time.process_time() - begun) / len(part))
                losses[name] = losses[name] + found if way is loop else found
    in_loop_order = [q for turn in range(rounds) for q in questions[turn::rounds]]
    tokens = torch.tensor([n for q in in_loop_order for n in q.token_lengths])
    first = torch.tensor(losses["loop, fp32"])
    for name in ways:
        by_clock, by_work = (statistics.mean(t["loop, fp32"]) / statistics.median(t[name])
                             for t in (times, work))
        found = torch.tensor(losses[name])
        if not name.startswith("loop"):
            rows = found.view(-1, 4)
            found = torch.cat([rows[turn::rounds] for turn in range(rounds)]).flatten()
        far = ((found - first) / tokens).abs().max()
        speed = 1 / statistics.median(times[name])
        print(f"{name:14} {speed:6.2f} questions/s   x {by_clock:5.2f} (CPU x {by_work:5.2f})   "
              f"largest difference {far:.1e} nats a token")


if __name__ == "__main__":
    compare(sys.argv[1], *map(int, sys.argv[2:]))
