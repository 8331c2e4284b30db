"""GPT-2: the network of "Language Models are Unsupervised Multitask Learners" (2019).

    model = GPT(GPTConfig())                  # 124,439,808 parameters
    loss = model(idx, targets)                # idx, targets: (B, T) token ids -> mean loss, nats
    logits = model(idx)                       # (B, T) -> (B, T, V)

Pre-LayerNorm, biases everywhere, learned positions, tanh GELU, the embedding as output head.
Parameters carry OpenAI's names, so weights move in and out without a table.
Shapes: B batch, T time, C width, H heads, D = C / H head width, V vocabulary, Vp padded.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import Operators
from model.packed import Packed

VOCAB_MULTIPLE = 128  # 50,257 is odd; tensor cores want their dimensions in multiples of 64 or 128
INIT_STD = 0.02  # GPT-2's initializer_range
# Sizes beyond any published model of this kind: a slip of the keyboard, not a wish.
LARGEST = dict(n_layer=1000, n_head=1000, n_embd=100_000, n_ctx=1_000_000, n_vocab=1_000_000)


@dataclass(frozen=True)
class GPTConfig:
    """GPT-2's shape; the defaults are the 124M model. Field names are OpenAI's."""

    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads; divides n_embd."""
    n_embd: int = 768
    """Width C of the residual stream."""
    n_ctx: int = 1024
    """Context length: the longest T."""
    n_vocab: int = 50257
    """Vocabulary: 256 bytes, 50,000 merges, end of text."""

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            size = getattr(self, name)
            if not 1 <= size <= largest:
                raise ValueError(f"{name} {size}: expected 1 to {largest:,}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding matrix in memory."""
        return -(-self.n_vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Cache:
    """Keys and values of the positions seen so far, so that each new token costs one position."""

    def __init__(self, config: GPTConfig, batch: int, device: torch.device, dtype: torch.dtype):
        D = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch, config.n_head, config.n_ctx, D)
        self.kv = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # positions filled

    def attend(self, layer: int, qkv: Tensor, n_head: int) -> Tensor:
        """Attention of t new positions to all so far. qkv: (B, t, 3C) -> (B, t, C)."""
        B, t, C3 = qkv.shape
        q, k, v = qkv.view(B, t, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, t, D)
        end = self.length + t
        keys, values = self.kv[layer]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        # New position i sees everything up to itself: one token sees all, no mask needed.
        mask = None
        if t > 1:
            mask = torch.ones(t, end, dtype=torch.bool, device=q.device).tril(self.length)
        q = q.to(keys.dtype)
        y = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], mask)
        return y.transpose(1, 2).reshape(B, t, C3 // 3)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig, ops: Operators, layer: int):
        super().__init__()
        self.n_head, self.ops, self.layer = config.n_head, ops, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: Cache | Packed | None = None) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, 3C)
        if cache is None:
            y = self.ops.attention(qkv, self.n_head)  # (B, T, C)
        else:
            y = cache.attend(self.layer, qkv, self.n_head)
        return self.c_proj(y)


class MLP(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class AddLayerNorm(nn.LayerNorm):
    """LayerNorm, fused with adding the branch before it to the residual stream."""

    def __init__(self, config: GPTConfig, ops: Operators):
        super().__init__(config.n_embd, eps=1e-5)
        self.ops = ops

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.ops.layer_norm(x, self.weight, self.bias, branch, self.eps)


class Block(nn.Module):
    """x = x + attention(LayerNorm(x)); x = x + mlp(LayerNorm(x)).

    The last addition is left to the LayerNorm that follows, so that each addition is fused with
    a normalisation: a block takes and returns the stream x and the branch still to be added.
    """

    def __init__(self, config: GPTConfig, ops: Operators, layer: int):
        super().__init__()
        self.ln_1 = AddLayerNorm(config, ops)
        self.attn = Attention(config, ops, layer)
        self.ln_2 = AddLayerNorm(config, ops)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, branch: Tensor | None, cache: Cache | Packed | None = None
    ) -> tuple[Tensor, Tensor]:
        x, y = self.ln_1(x, branch)
        x, y = self.ln_2(x, self.attn(y, cache))
        return x, self.mlp(y)


class GPT(nn.Module):
    """The whole network."""

    def __init__(self, config: GPTConfig, ops: Operators = kernels.TORCH):
        super().__init__()
        self.config, self.ops = config, ops
        self.checkpoint_activations = False  # keep a block's input only, and compute it twice
        self.wte = nn.Embedding(config.padded_vocab, config.n_embd)  # also the output head
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
        self.h = nn.ModuleList(Block(config, ops, i) for i in range(config.n_layer))
        self.ln_f = AddLayerNorm(config, ops)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's own: N(0, 0.02), biases 0, LayerNorms 1.

        Matrices that write to the residual stream are scaled by 1/sqrt(number of them) = 1/sqrt(
        2 n_layer), as the paper says (section 2.3), so that the stream's variance doesn't grow
        with depth.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                std = INIT_STD / math.sqrt(2 * self.config.n_layer) if residual else INIT_STD
                nn.init.normal_(parameter, 0.0, std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        # Padding rows take no probability and no gradient, so what is zero here stays zero.
        self.wte.weight[self.config.n_vocab :] = 0

    def hidden(self, idx: Tensor, cache: Cache | Packed | None = None) -> Tensor:
        """What the head reads. idx: (B, T) token ids, after what the cache holds -> (B, T, C).

        Or idx: (1, N), the trees that a Packed describes -> (1, N, C).
        """
        T, start = idx.shape[1], cache.length if isinstance(cache, Cache) else 0
        positions: slice | Tensor = slice(start, start + T)
        if isinstance(cache, Packed):
            positions = cache.positions  # (1, N)
        elif start + T > self.config.n_ctx:
            raise ValueError(f"{start + T} positions in a context of {self.config.n_ctx}")
        x = self.wte(idx) + self.wpe.weight[positions]  # (B, T, C)
        branch = None
        for block in self.h:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, branch = checkpoint(block, x, branch, use_reentrant=False)
            else:
                x, branch = block(x, branch, cache)
        if isinstance(cache, Cache):
            cache.length += T
        return self.ln_f(x, branch)[1]

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        """Logits (B, T, V), or with targets (B, T) the loss in nats, -100 counting for nothing.

        reduction: "mean" over the targets, or "sum".
        """
        x = self.hidden(idx)
        if targets is None:
            return self.logits(x)
        return self.ops.linear_cross_entropy(
            x.reshape(-1, x.shape[-1]), self.wte.weight, targets.reshape(-1),
            self.config.n_vocab, reduction,
        )

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V); the padding is cut off, so it can never be sampled."""
        return F.linear(x, self.wte.weight)[..., : self.config.n_vocab]

    def compile_blocks(self) -> None:
        """torch.compile on each block, in place, so that parameter names stay.

        Block by block the compiler sees one small graph twelve times over (compiled once), and
        gradients arrive block by block, so DDP can send them while the backward pass goes on.
        """
        for block in self.h:
            block.compile()


def parameter_count(config: GPTConfig) -> int:
    """Parameters without padding rows: 124,439,808 for the default."""
    C, L = config.n_embd, config.n_layer
    block = (3 * C + 3) * C + (C + 1) * C + (8 * C + 5) * C + 4 * C  # attention, MLP, LayerNorms
    return (config.n_vocab + config.n_ctx) * C + L * block + 2 * C


def flops_per_token(config: GPTConfig) -> int:
    """Matrix-product FLOPs of forward and backward for one token at T = n_ctx.

    6 per matrix parameter and 12 L C T for attention, counted as dense: PaLM's formula (arXiv
    2204.02311, appendix B), as in nanoGPT and llm.c, so that the MFU compares with theirs.
    """
    L, C, T = config.n_layer, config.n_embd, config.n_ctx
    matrices = 12 * L * C * C + config.n_vocab * C
    return 6 * matrices + 12 * L * C * T
