"""Text, token by token, out of a model.

    for tokens in generate(model, idx, SampleConfig(max_tokens=100)):   # tokens: (B,)
        ...

A generator: whoever asks for tokens may stop at any time, or ask something else in between.
Past the context the window keeps its last n_ctx / 2 tokens and is computed anew, because GPT-2's
positions are learned and can't slide.

Raises CannotSample, which ends a command with one line, where the logits are no numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from launch import cli
from launch.errors import Failed
from model.gpt2 import GPT

# Logits divided by less than fp32's smallest normal number are no numbers; the largest stands
# alone long before that.
GREEDY_BELOW = torch.finfo(torch.float32).tiny


class CannotSample(Failed):
    """The model's logits are NaN or infinite: there is nothing to draw from."""


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
        cli.within("temperature", self.temperature, 0, 1e6)
        cli.within("top_k", self.top_k, 0, 10**9)
        cli.within("top_p", self.top_p, 1e-9, 1)
        cli.within("seed", self.seed, 0, 2**63 - 1)


def draw(logits: Tensor, config: SampleConfig, generator: torch.Generator) -> Tensor:
    """Draws a token for each row. logits: (B, V) -> (B,). Raises CannotSample."""
    largest = logits.amax(-1, keepdim=True)  # (B, 1); NaN where any is NaN
    if not largest.isfinite().all():
        raise CannotSample("the model's logits are no numbers (NaN or infinite), so no token can "
                           "be drawn: its weights are broken, take an earlier checkpoint")
    if config.temperature < GREEDY_BELOW:
        return logits.argmax(-1)

    V = logits.shape[-1]
    k = min(config.top_k or V, V)
    chosen = None
    if k < V or config.top_p < 1:
        logits, chosen = logits.topk(k)  # (B, k), the likeliest first
    # The largest becomes 0, which any temperature divides.
    logits = (logits - largest).float() / config.temperature
    p = F.softmax(logits, -1)  # (B, k)
    if config.top_p < 1:
        before = p.cumsum(-1) - p  # what the likelier ones hold together: 0 for the likeliest
        p = p.masked_fill(before >= config.top_p, 0)
    # Drawn on the CPU, so that a seed gives the same text on every device.
    drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(logits.device)  # (B, 1)
    if chosen is not None:
        drawn = chosen.gather(1, drawn)  # among the k -> among all
    return drawn.squeeze(1)


class KVCache:
    """Keys and values of the positions seen so far, so that each new token costs one position."""

    def __init__(self, model: GPT, batch: int, length: int):
        """Room for `length` positions of `batch` rows."""
        config, weights = model.config, model.wte.weight
        H, D = config.n_head, config.n_embd // config.n_head
        # What c_attn's output will be: of autocast's dtype, or of the weights' own.
        dtype = weights.dtype
        if torch.is_autocast_enabled(weights.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(weights.device.type)
        shape = (config.n_layer, 2, batch, H, length, D)
        self.kv = torch.empty(shape, device=weights.device, dtype=dtype)
        self.length = 0  # positions filled

    def last_hidden(self, model: GPT, idx: Tensor) -> Tensor:
        """What the head reads after t more tokens. idx: (B, t) -> (B, C) of the last."""
        t = idx.shape[1]
        positions = torch.arange(self.length, self.length + t, device=idx.device)  # (t,)
        x = model.hidden(idx, positions, self.attend)  # (B, t, C)
        self.length += t
        return x[:, -1]

    def attend(self, layer: int, qkv: Tensor, n_head: int) -> Tensor:
        """Attention of t new positions to all so far. qkv: (B, t, 3C) -> (B, t, C)."""
        B, t, C3 = qkv.shape
        q, k, v = qkv.view(B, t, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, t, D)
        start, end = self.length, self.length + t
        keys, values = self.kv[layer]  # each (B, H, length, D)
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        # New position i sees everything up to itself: one token sees all, no mask needed.
        mask = None
        if t > 1:
            mask = torch.ones(t, end, dtype=torch.bool, device=q.device).tril(start)
        q = q.to(keys.dtype)
        y = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], mask)
        return y.transpose(1, 2).reshape(B, t, C3 // 3)  # (B, H, t, D) -> (B, t, C)


def generate(
    model: GPT,
    idx: Tensor,
    config: SampleConfig,
    eot: int | None = None,
    use_cache: bool = True,
    lengths: Tensor | None = None,
) -> Iterator[Tensor]:
    """The tokens of generate_with_logits() alone: (B,) each time."""
    for tokens, _logits in generate_with_logits(model, idx, config, eot, use_cache, lengths):
        yield tokens


@torch.no_grad()
def generate_with_logits(
    model: GPT,
    idx: Tensor,
    config: SampleConfig,
    eot: int | None = None,
    use_cache: bool = True,
    lengths: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (B,) tokens and the (B, V) logits that they were drawn from, until max_tokens are
    drawn or every row has ended.

    idx: (B, T) prompt of at most n_ctx tokens. A row that has drawn `eot` goes on as `eot`.
    lengths: (B,) tokens of each row's prompt, where they differ; what stands after them in idx
    counts for nothing. Generation then begins after the shortest, and a row whose prompt is longer
    yields what is left of it first.
    use_cache=False computes the whole window for every token: the slow twin that defines the fast.
    Raises CannotSample where the model's logits are no numbers.
    """
    n_ctx, (B, T) = model.config.n_ctx, idx.shape
    if not 1 <= T <= n_ctx:
        raise ValueError(f"a prompt has 1 to {n_ctx} tokens, not {T}")
    shortest = T if lengths is None else int(lengths.min())
    end = T + config.max_tokens
    generator = torch.Generator().manual_seed(config.seed)
    ended = torch.zeros(B, dtype=torch.bool, device=idx.device)
    window, cache = idx[:, :shortest], None
    for position in range(shortest, end):
        if window.shape[1] > n_ctx:
            window, cache = window[:, -max(1, n_ctx // 2) :], None
        if use_cache and cache is None:
            cache = KVCache(model, B, min(n_ctx, window.shape[1] + end - position))

        if cache is None:
            x = model.hidden(window)[:, -1]  # (B, C)
            logits = model.logits(x)  # (B, V)
        else:
            fresh = window[:, cache.length :]  # (B, t)
            with _plain_products(fresh.numel() == 1):
                x = cache.last_hidden(model, fresh)  # (B, C)
                logits = model.logits(x)  # (B, V)
        tokens = draw(logits, config, generator)  # (B,)
        if lengths is not None and position < T:
            tokens = torch.where(position < lengths, idx[:, position], tokens)
        if eot is not None:
            tokens = torch.where(ended, eot, tokens)
            ended |= tokens == eot
        yield tokens, logits
        if bool(ended.all()):
            return
        window = torch.cat([window, tokens[:, None]], 1)  # (B, t + 1)


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
