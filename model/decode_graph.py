"""The loop of model/generate.py on a GPU: a token is one replay of a graph, and nobody waits.

    for tokens in generate(model, idx, SampleConfig(max_tokens=100), eot):   # tokens: (B,), CPU

The host would need longer to launch a token's 100 kernels than a GPU needs to run them. So they are
captured once, and launched together from then on (torch.cuda.CUDAGraph). A graph does the same with
the same memory at every replay: whatever changes from token to token lies on the device, and is
read and moved on there. Tokens come back by copies that the host only looks at, AHEAD tokens
later; what was computed past the end of a text is cut. Who asks for tokens gets exactly those of
generate_with_logits(), the definition.

Shapes: B streams, T tokens of the longest prompt, W tokens of the window.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.reference import product_dtype
from model.generate import (
    NUMBERS_AT_ONCE,
    KVCache,
    SampleConfig,
    check_drawn,
    check_prompt,
    half_of,
    uniform_numbers,
)
from model.gpt2 import GPT

CAPTURES = "cuda"  # ROCm too: torch calls it so
AHEAD = 8  # tokens: enough that a GPU never waits for the host's answer to one


def fits(model: GPT) -> bool:
    """Whether a captured graph stays right: on CUDA, and with weights that nobody changes or casts.

    Weights in training are neither; those that eval.sample loads are both.
    """
    weight = model.wte.weight
    return (
        weight.device.type == CAPTURES
        and not any(parameter.requires_grad for parameter in model.parameters())
        and product_dtype(weight.dtype, weight.device) == weight.dtype
    )


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    config: SampleConfig,
    eot: int | None = None,
    lengths: Tensor | None = None,
) -> Iterator[Tensor]:
    """What model/generate.py's generate() yields: (B,) tokens each time, on the CPU."""
    B, T = idx.shape
    steps = T + config.max_tokens - check_prompt(idx, model.config.n_ctx, lengths)
    loop = Loop(model, idx, config, lengths)
    ended = torch.zeros(B, dtype=torch.bool)
    for step in range(steps):
        while loop.launched < min(steps, step + 1 + AHEAD):
            loop.launch()
        tokens = loop.read(step)  # (B,)
        if eot is not None:
            tokens = torch.where(ended, eot, tokens)
            ended |= tokens == eot
        check_drawn(tokens)
        yield tokens
        if bool(ended.all()):
            return


class Loop:
    """Launches token after token; what it needs for the next one lies on the device.

    window: (B, W + 1), the tokens in sight; cache.position: how many of them are in the cache, and
    so the place of the next to be read; row: the place of the next uniform numbers.
    """

    def __init__(
        self, model: GPT, idx: Tensor, config: SampleConfig, lengths: Tensor | None
    ) -> None:
        n_ctx, (B, T), device = model.config.n_ctx, idx.shape, idx.device
        self.model, self.config = model, config
        self.shortest = check_prompt(idx, n_ctx, lengths)
        W = min(n_ctx, T + config.max_tokens)
        self.cache = KVCache(model, B, W)
        self.window = torch.zeros(B, W + 1, dtype=torch.long, device=device)
        self.window[:, :T] = idx
        self.lengths = None if lengths is None else lengths.clone()
        self.numbers = uniform_numbers(config.seed, B)
        self.u = torch.empty(NUMBERS_AT_ONCE, B, dtype=torch.float64, device=device)
        self.row = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(B, dtype=torch.long, device=device)  # the latest
        self.launched = 0
        self.replay: Callable[[], None] | None = None
        self.compiled = False
        self.copies = Copies(AHEAD + 1, B)

    def launch(self) -> None:
        """One more token of every stream, and its copy to the host."""
        if self.launched % NUMBERS_AT_ONCE == 0:
            self.u.copy_(pinned(next(self.numbers)), non_blocking=True)
            self.row.zero_()
        W = self.cache.kv.shape[-2]
        if self.launched == 0:
            self._read_window(self.shortest)
        elif self.cache.length == W:  # the window is full: its last half is computed anew
            kept = half_of(W)
            self.window[:, :kept] = self.window[:, -kept:].clone()
            self.cache.restart()
            if self.lengths is not None:
                self.lengths.zero_()  # prompts are behind us
            self._read_window(kept)
        elif not self.compiled:  # what a kernel's first launch compiles can't be captured
            self._read_token()
            self.compiled = True
        else:
            if self.replay is None:
                before = self.cache.length
                self.replay = capture(self._read_token)
                self.cache.length = before  # capturing ran nothing
            self.replay()
            self.cache.length += 1
        self.copies.start(self.launched, self.tokens)
        self.launched += 1

    def read(self, step: int) -> Tensor:
        """(B,) tokens of a step that was launched; those of AHEAD steps before it are gone."""
        return self.copies.read(step)

    def _read_window(self, t: int) -> None:
        """Puts the first t tokens of the window into the empty cache, and draws the next."""
        self._draw(self.cache.last_hidden(self.model, self.window[:, :t]))

    def _read_token(self) -> None:
        """Puts one more token into the cache, and draws the next. Captured."""
        newest = self.window.index_select(1, self.cache.position)  # (B, 1)
        self._draw(self.cache.last_hidden(self.model, newest))

    def _draw(self, x: Tensor) -> None:
        """Draws the token behind the newest one in the window. x: (B, C)."""
        config, place = self.config, self.cache.position
        logits = self.model.logits(x)  # (B, V)
        u = self.u.index_select(0, self.row)[0]  # (B,)
        tokens = self.model.ops.draw(
            logits, u, config.temperature, config.top_k, config.top_p)  # (B,)
        if self.lengths is not None:  # a longer prompt goes on
            given = self.window.index_select(1, place)[:, 0]  # (B,)
            tokens = torch.where(place < self.lengths, given, tokens)
        self.tokens.copy_(tokens)
        # -1, for logits that are no numbers, is for the host: it can't be looked up.
        self.window.index_copy_(1, place, tokens.clamp(min=0)[:, None])
        self.row += 1


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """What repeats the step's kernels, without running them now."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def pinned(x: Tensor) -> Tensor:
    """x in memory that a GPU reads and writes while the host goes on."""
    return x.pin_memory()


class Copies:
    """Tokens on their way to the host: a place in pinned memory and an event for each of `places`
    steps."""

    def __init__(self, places: int, B: int) -> None:
        self.rows = pinned(torch.empty(places, B, dtype=torch.long))
        self.events = [torch.cuda.Event() for _ in range(places)]

    def start(self, step: int, tokens: Tensor) -> None:
        """Copies the (B,) tokens of a step, over those of `places` steps before."""
        place = step % len(self.events)
        self.rows[place].copy_(tokens, non_blocking=True)
        self.events[place].record()

    def read(self, step: int) -> Tensor:
        """The (B,) tokens of a step, once they have come."""
        place = step % len(self.events)
        if not self.events[place].query():
            self.events[place].synchronize()
        return self.rows[place].clone()

