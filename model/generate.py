"""Text, token by token, out of a model.

    for tokens in generate(model, idx, SampleConfig(max_tokens=100)):   # tokens: (B,)
        ...

A generator: whoever asks for tokens may stop at any time, or ask something else in between.
Past the context the window keeps its last n_ctx / 2 tokens and is computed anew, because GPT-2's
positions are learned and can't slide.

Raises CannotSample, which ends a command with one line, where the logits are no numbers.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from kernels.reference import NOT_CUDNN, product_dtype
from launch import cli
from launch.errors import Failed
from model.gpt2 import GPT

NUMBERS_AT_ONCE = 1024  # rows of uniform_numbers(): 8 KB a stream


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


def uniform_numbers(seed: int, B: int) -> Iterator[Tensor]:
    """What tokens are drawn with: (NUMBERS_AT_ONCE, B) of them, and again; a row a token.

    fp64 multiples of 2^-32 from 0 to below 1. Drawn on the CPU, so that a seed has the same ones on
    every device, and many tokens ahead, so that they are carried there once.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(2**32, (NUMBERS_AT_ONCE, B), generator=generator).double() / 2**32


class KVCache:
    """Keys and values of the positions seen so far, so that each new token costs one position."""

    def __init__(self, model: GPT, batch: int, length: int):
        """Room for `length` positions of `batch` rows."""
        config, weights = model.config, model.wte.weight
        H, D = config.n_head, config.n_embd // config.n_head
        self.ops = model.ops
        # What c_attn's output will be: of autocast's dtype, or of the weights' own.
        dtype = product_dtype(weights.dtype, weights.device)
        shape = (config.n_layer, 2, batch, H, length, D)
        self.kv = torch.empty(shape, device=weights.device, dtype=dtype)
        self.length = 0  # positions filled
        self.position = torch.zeros(1, dtype=torch.long, device=weights.device)  # the same

    def restart(self) -> None:
        """Forgets all positions."""
        self.length = 0
        self.position.zero_()

    def last_hidden(self, model: GPT, idx: Tensor) -> Tensor:
        """What the head reads after the prompt, or after one more token. idx: (B, t) -> (B, C)."""
        t = idx.shape[1]
        positions = self.position if t == 1 else torch.arange(t, device=idx.device)  # (t,)
        x = model.hidden(idx, positions, self.attend)  # (B, t, C)
        self.length += t
        self.position += t
        return x[:, -1]

    def attend(self, layer: int, qkv: Tensor, n_head: int) -> Tensor:
        """Attention of the new positions to all so far. qkv: (B, t, 3C) -> (B, t, C)."""
        B, t, _ = qkv.shape
        if t == 1:
            return self.ops.decode_attention(qkv, self.kv[layer], self.position, n_head)
        assert self.length == 0  # the prompt comes first, and at once
        kv = qkv.view(B, t, 3, n_head, -1)[:, :, 1:]  # (B, t, 2, H, D)
        self.kv[layer, :, :, :, :t] = kv.permute(2, 0, 3, 1, 4)  # (2, B, H, t, D)
        with sdpa_kernel(NOT_CUDNN):  # should attention be PyTorch's
            return self.ops.attention(qkv, n_head)


def generate(
    model: GPT,
    idx: Tensor,
    config: SampleConfig,
    eot: int | None = None,
    use_cache: bool = True,
    lengths: Tensor | None = None,
) -> Iterator[Tensor]:
    """The tokens of generate_with_logits() alone: (B,) each time, on the CPU.

    On a GPU, and with weights that don't change, by model/decode_graph.py, which computes some
    tokens ahead.
    """
    from model import decode_graph  # which is made of what stands here

    if use_cache and decode_graph.fits(model):
        yield from decode_graph.generate(model, idx, config, eot, lengths)
    else:
        for tokens, _ in generate_with_logits(model, idx, config, eot, use_cache, lengths):
            yield tokens.cpu()


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
    shortest = check_prompt(idx, n_ctx, lengths)
    end = T + config.max_tokens
    # Apple's GPUs have no fp64.
    drawn_on = torch.device("cpu") if idx.device.type == "mps" else idx.device
    chunks = (chunk.to(drawn_on) for chunk in uniform_numbers(config.seed, B))
    numbers = itertools.chain.from_iterable(chunks)  # (B,) each
    ended = torch.zeros(B, dtype=torch.bool, device=idx.device)
    window, cache = idx[:, :shortest], None
    for position in range(shortest, end):
        if window.shape[1] > n_ctx:
            window, cache = window[:, -half_of(n_ctx) :], None
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
        tokens = model.ops.draw(
            logits.to(drawn_on), next(numbers), config.temperature, config.top_k, config.top_p
        ).to(idx.device)  # (B,)
        if lengths is not None and position < T:
            tokens = torch.where(position < lengths, idx[:, position], tokens)
        if eot is not None:
            tokens = torch.where(ended, eot, tokens)
            ended |= tokens == eot
        check_drawn(tokens)
        yield tokens, logits
        if bool(ended.all()):
            return
        window = torch.cat([window, tokens[:, None]], 1)  # (B, t + 1)


def check_prompt(idx: Tensor, n_ctx: int, lengths: Tensor | None) -> int:
    """The length of the shortest prompt. ValueError where one is empty or too long."""
    T = idx.shape[1]
    if not 1 <= T <= n_ctx:
        raise ValueError(f"a prompt has 1 to {n_ctx} tokens, not {T}")
    return T if lengths is None else int(lengths.min())


def check_drawn(tokens: Tensor) -> None:
    """Raises CannotSample where draw() found no numbers."""
    if bool((tokens < 0).any()):
        raise CannotSample("the model's logits are no numbers (NaN or infinite), so no token can "
                           "be drawn: its weights are broken, take an earlier checkpoint")


def half_of(n_ctx: int) -> int:
    """How many tokens of a full window go on."""
    return max(1, n_ctx // 2)


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
