"""HellaSwag's questions with GPT-2 124M, random weights: questions/s.

    python -m tests.bench hellaswag

Made-up questions of HellaSwag's lengths: 4 endings of 10 to 30 tokens behind a context of 20 to 90.
The plain way asks one at a time in fp32, four padded rows and all their logits, as build-nanogpt
does. The values compared are the mean losses a token.
"""

import random
from functools import partial

import torch
import torch.nn.functional as F

from eval.likelihood import Request, negative_loglikelihoods
from launch.config import ReadDtype
from launch.world import World, autocast, choose_dtype, keep_freed_memory
from model.config import GPTConfig
from model.gpt2 import GPT
from model.reading import ready_to_read
from tests.bench import plain
from tests.bench.pairs import Done, Row, Work
from tests.bench.training import QUICK, first_weights

ALONE = World(0, 1, torch.device("cpu"))


def rows(quick: bool = False) -> list[Row]:
    """The table's rows of HellaSwag."""
    if quick:
        return [row("HellaSwag, quick", QUICK, "fp32", 1)]
    dtypes = sorted({"fp32", choose_dtype("auto", ALONE.device)}, reverse=True)
    return [row(f"HellaSwag 124M, {dtype}", GPTConfig(), dtype, 8) for dtype in dtypes]


def row(name: str, config: GPTConfig, dtype: str, count: int) -> Row:
    """One of them. Rounding in fp32 is far below 1e-4 nats of a loss of 11; bf16's below 0.05."""
    return Row(name, "questions", partial(one_at_a_time, config, count),
               partial(packed, config, dtype, count), tolerance=0.05 if dtype == "bf16" else 1e-4)


def questions(config: GPTConfig, count: int) -> list[Request]:
    """A context and four endings each, drawn from a fixed seed."""
    rng = random.Random(3)
    longest = config.n_ctx - 40

    def some(low: int, high: int) -> list[int]:
        return [rng.randrange(config.n_vocab) for _ in range(rng.randint(low, high))]

    return [Request(some(20, min(90, longest)), [some(10, 30) for _ in range(4)])
            for _ in range(count)]


def one_at_a_time(config: GPTConfig, count: int) -> Work:
    """The plain way."""
    model = plain.PlainGPT(config).eval()
    model.load_state_dict(first_weights(config))
    asked = questions(config, count)

    @torch.no_grad()
    def work() -> Done:
        total, tokens = 0.0, 0
        for context, endings in asked:
            T = len(context) + max(map(len, endings))
            idx, counted = torch.zeros(4, T, dtype=torch.long), torch.zeros(4, T)
            for i, ending in enumerate(endings):
                end = len(context) + len(ending)
                idx[i, :end] = torch.tensor(context + ending)
                counted[i, len(context) : end] = 1
            logits = model(idx)[:, :-1]  # (4, T - 1, V)
            losses = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none")
            total += float((losses.view(4, T - 1) * counted[:, 1:]).sum())
            tokens += int(counted.sum())
        return Done(count, total / tokens)

    return work


def packed(config: GPTConfig, dtype: ReadDtype, count: int) -> Work:
    """As eval.hellaswag does it: each context computed once, several questions in one row."""
    keep_freed_memory()
    model = GPT(config).eval()
    model.load_state_dict(first_weights(config))
    ready_to_read(model, dtype, ALONE.device)
    asked = questions(config, count)
    tokens = sum(len(ending) for request in asked for ending in request.continuations)

    def work() -> Done:
        with autocast(ALONE.device, dtype):
            losses = negative_loglikelihoods(model, asked, ALONE)[0]
        return Done(count, sum(losses) / tokens)

    return work
