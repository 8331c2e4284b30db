"""Text, token by token, out of a model.

    for tokens in generate(model, idx, SampleConfig(max_tokens=100)):   # tokens: (B,)
        ...

A generator: whoever asks for tokens may stop at any time, or ask something else in between.
Past the context the window keeps its last n_ctx / 2 tokens and is computed anew, because GPT-2's
positions are learned and can't slide.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gpt2 import GPT, Cache


@dataclass(frozen=True)
class SampleConfig:
    """How the next token is drawn."""

    max_tokens: int = 64
    """Tokens to add."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 50
    """Draw from the k likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that hold this probability (nucleus sampling, 1904.09751)."""
    seed: int = 42
    """The same seed gives the same text."""

    def __post_init__(self) -> None:
        if not (self.max_tokens >= 0 and 0 <= self.temperature < float("inf") and self.top_k >= 0):
            raise ValueError("max_tokens, temperature and top_k are finite and not negative")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: expected 0 to 2^63 - 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a probability above 0, not {self.top_p}")


def draw(logits: Tensor, config: SampleConfig, generator: torch.Generator) -> Tensor:
    """Draws a token for each row. logits: (B, V) -> (B,)."""
    if config.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / config.temperature
    if config.top_k:
        kth = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if config.top_p < 1:
        p, order = logits.softmax(-1).sort(-1, descending=True)
        outside = p.cumsum(-1) - p >= config.top_p  # the likeliest token always stays
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    # Drawn on the CPU, so that a seed gives the same text on every device.
    p = F.softmax(logits, -1).cpu()
    return torch.multinomial(p, 1, generator=generator).squeeze(1).to(logits.device)


@torch.no_grad()
def generate(
    model: GPT, idx: Tensor, config: SampleConfig, eot: int | None = None, use_cache: bool = True
) -> Iterator[Tensor]:
    """Yields (B,) tokens until max_tokens are drawn or every row has ended.

    idx: (B, T) prompt of at most n_ctx tokens. A row that has drawn `eot` goes on as `eot`.
    use_cache=False computes the whole window for every token: the slow twin that defines the fast.
    """
    n_ctx = model.config.n_ctx
    if not 1 <= idx.shape[1] <= n_ctx:
        raise ValueError(f"a prompt has 1 to {n_ctx} tokens, not {idx.shape[1]}")
    generator = torch.Generator().manual_seed(config.seed)
    ended = torch.zeros(idx.shape[0], dtype=torch.bool, device=idx.device)
    window, cache = idx, None
    for _ in range(config.max_tokens):
        if window.shape[1] > n_ctx:
            window, cache = window[:, -max(1, n_ctx // 2) :], None
        if use_cache and cache is None:
            cache = Cache(model.config, len(idx), idx.device, _cache_dtype(model))
        fresh = window[:, cache.length :] if cache else window
        x = model.hidden(fresh, cache)[:, -1]  # (B, C)
        tokens = draw(model.logits(x), config, generator)
        if eot is not None:
            tokens = torch.where(ended, eot, tokens)
            ended |= tokens == eot
        yield tokens
        if bool(ended.all()):
            return
        window = torch.cat([window, tokens[:, None]], 1)


def _cache_dtype(model: GPT) -> torch.dtype:
    """What the projection's output will be: the autocast dtype, or the weights' own."""
    weights = model.wte.weight
    if torch.is_autocast_enabled(weights.device.type) and weights.dtype != torch.float64:
        return torch.get_autocast_dtype(weights.device.type)
    return weights.dtype
