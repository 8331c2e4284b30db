"""Lesson 7: all heads in one tensor, and addition with digits reversed.

    python -m lessons.grade 07
"""

from collections.abc import Callable

from torch import Tensor

SYMBOLS = "0123456789+="  # number of a symbol: its place here


def all_heads(qkv: Tensor, n_head: int) -> Tensor:
    """Causal attention of all heads at once, without a loop over heads.

    qkv: (B, T, 3C), the queries of all heads, then the keys, then the values; in each, the first D
    columns are head 0's, the next head 1's. Returns (B, T, C), heads side by side:
    softmax over s <= t of (q[t] . k[s] / sqrt(D)), times v[s], with D = C / n_head.
    """
    raise NotImplementedError


def write_sum(a: int, b: int) -> str:
    """A sum of two numbers of 0 to 99, its three digits reversed: (7, 45) -> "07+45=250"."""
    raise NotImplementedError


def answer_targets(rows: Tensor) -> Tensor:
    """What a model is to foretell from rows[:, :-1]: the three digits of the answer alone.

    rows: (B, 9), sums as numbers of symbols. Returns (B, 8): what follows each symbol, -100 (which
    cross_entropy passes over) wherever that isn't a digit of the answer.
    """
    raise NotImplementedError


def exact_match(answers: list[str], sums: list[str]) -> float:
    """The share of answers with all three digits right. answers: "250"; sums: "07+45=250"."""
    raise NotImplementedError


def adder(sums: list[str]) -> Callable[[list[str]], list[str]]:
    """Trains a model on sums and returns what asks it: ["07+45="] -> ["250"], greedily.

    sums: 9,000 of the 10,000 pairs, with digits as the caller writes them. Then it is asked the
    other 1,000; 0.98 of them right will do. The lesson's: 2 layers, 4 heads, width 64, context 10;
    500 steps of 128 sums, AdamW (0.9, 0.99), weight decay 0.1, gradients clipped at 1, learning
    rate 3e-3 to 3e-4 along a cosine after 50 steps of warm-up. Eight seconds. GPT is in
    model/gpt2.py, for you to use.
    """
    raise NotImplementedError
