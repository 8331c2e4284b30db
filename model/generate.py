"""Text, token by token, out of a model.

    for tokens in generate(model, idx, SampleConfig(max_tokens=100)):   # tokens: (B,)
        ...

A generator: whoever asks for tokens may stop at any time, or ask something else in between.
Past the context the window keeps its last n_ctx / 2 tokens and is computed anew, because GPT-2's
positions are learned and can't slide.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from launch import cli
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
        cli.within("max_tokens", self.max_tokens, 0, 10**9)
        if self.temperature != 0:  # below it logits / temperature leave fp32
            cli.within("temperature", self.temperature, 1e-6, 1e6, "(or 0: the likeliest token)")
        cli.within("top_k", self.top_k, 0, 10**9)
        cli.within("top_p", self.top_p, 1e-9, 1)
        cli.within("seed", self.seed, 0, 2**63 - 1)


def draw(logits: Tensor, config: SampleConfig, generator: torch.Generator) -> Tensor:
    """Draws a token for each row. logits: (B, V) -> (B,)."""
    if config.temperature == 0:
        return logits.argmax(-1)
    V = logits.shape[-1]
    k = min(config.top_k or V, V)
    chosen = None
    if k < V or config.top_p < 1:
        logits, chosen = logits.topk(k)  # (B, k), the likeliest first
    p = F.softmax(logits.float() / config.temperature, -1)
    if config.top_p < 1:
        p = p.masked_fill(p.cumsum(-1) - p >= config.top_p, 0)  # the likeliest always stays
    # Drawn on the CPU, so that a seed gives the same text on every device.
    drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(logits.device)  # (B, 1)
    return (drawn if chosen is None else chosen.gather(1, drawn)).squeeze(1)


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    config: SampleConfig,
    eot: int | None = None,
    use_cache: bool = True,
    lengths: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yields (B,) tokens until max_tokens are drawn or every row has ended.

    idx: (B, T) prompt of at most n_ctx tokens. A row that has drawn `eot` goes on as `eot`.
    lengths: (B,) tokens of each row's prompt, where they differ; what stands after them in idx
    counts for nothing. Generation then begins after the shortest, and a row whose prompt is longer
    yields what is left of it first.
    use_cache=False computes the whole window for every token: the slow twin that defines the fast.
    """
    n_ctx, T = model.config.n_ctx, idx.shape[1]
    if not 1 <= T <= n_ctx:
        raise ValueError(f"a prompt has 1 to {n_ctx} tokens, not {T}")
    shortest = T if lengths is None else int(lengths.min())
    generator = torch.Generator().manual_seed(config.seed)
    ended = torch.zeros(idx.shape[0], dtype=torch.bool, device=idx.device)
    window, cache = idx[:, :shortest], None
    end = T + config.max_tokens
    for position in range(shortest, end):
        if window.shape[1] > n_ctx:
            window, cache = window[:, -max(1, n_ctx // 2) :], None
        if use_cache and cache is None:
            room = replace(model.config, n_ctx=min(n_ctx, window.shape[1] + end - position))
            cache = Cache(room, len(idx), idx.device, _cache_dtype(model))
        fresh = window[:, cache.length :] if cache else window
        with _plain_products(cache is not None and fresh.numel() == 1):
            x = model.hidden(fresh, cache)[:, -1]  # (B, C)
            logits = model.logits(x)
        tokens = draw(logits, config, generator)
        if lengths is not None and position < T:
            tokens = torch.where(position < lengths, idx[:, position], tokens)
        if eot is not None:
            tokens = torch.where(ended, eot, tokens)
            ended |= tokens == eot
        yield tokens
        if bool(ended.all()):
            return
        window = torch.cat([window, tokens[:, None]], 1)


def store_in(model: GPT, dtype: torch.dtype) -> GPT:
    """Keeps the matrices in bf16 or fp16, in place, as autocast would cast them at every step.

    Half the memory, and half the bytes to read for each token. Positions and LayerNorms stay in
    fp32, and so does the residual stream. For reading aloud, not for training.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)
    model.wte.to(dtype)
    return model


@contextmanager
def _plain_products(one_token: bool) -> Iterator[None]:
    """PyTorch's own products in place of oneDNN's, for one token of one text on a CPU.

    A product with one row reads its matrix and does little else, and there PyTorch's bf16 loop is
    two to three times as fast as oneDNN's (python -m tests.baseline_sampling). With more rows
    oneDNN wins. GPUs don't look at the switch, and fp32 products go to MKL in either position.
    """
    before = torch.backends.mkldnn.enabled
    if one_token:
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def _cache_dtype(model: GPT) -> torch.dtype:
    """What the projection's output will be: the autocast dtype, or the weights' own."""
    weights = model.wte.weight
    if torch.is_autocast_enabled(weights.device.type) and weights.dtype != torch.float64:
        return torch.get_autocast_dtype(weights.device.type)
    return weights.dtype
