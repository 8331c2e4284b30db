"""The loop that recomputes the whole context for every token, beside the cache: tokens/s.

    python -m tests.baseline_sampling [NEW_TOKENS [ROUNDS]]      # GPT-2 124M, random weights

One stream, a prompt of 8 tokens. Each round times every way once, so that a machine that slows
down slows all of them; printed are medians over the rounds, and the ratio to the first row.
"""

import copy
import statistics
import sys
import time

import torch

from launch.world import autocast, keep_freed_memory
from model.generate import SampleConfig, generate, store_in
from model.gpt2 import GPT, GPTConfig


def seconds(model: GPT, dtype: str, use_cache: bool, new_tokens: int) -> float:
    """Wall time of new_tokens after a prompt of 8."""
    idx = torch.arange(8)[None]
    start = time.perf_counter()
    with autocast(torch.device("cpu"), dtype):
        for _ in generate(model, idx, SampleConfig(new_tokens), use_cache=use_cache):
            pass
    return time.perf_counter() - start


def compare(new_tokens: int = 100, rounds: int = 5) -> None:
    """Prints the table."""
    keep_freed_memory()
    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval()
    small = store_in(copy.deepcopy(model), torch.bfloat16)
    ways = {
        "recomputed, fp32": (model, "fp32", False),
        "recomputed, bf16": (small, "bf16", False),
        "cached, fp32": (model, "fp32", True),
        "cached, bf16": (small, "bf16", True),
    }
    for way in ways.values():
        seconds(*way, 4)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(*way, new_tokens))
    first = next(iter(times.values()))
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(first, taken, strict=True))
        print(f"{name:18} {new_tokens / statistics.median(taken):6.1f} tok/s   x {ratio:.2f}")


if __name__ == "__main__":
    compare(*map(int, sys.argv[1:]))
