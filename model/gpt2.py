"""GPT-2: the network of "Language Models are Unsupervised Multitask Learners" (2019).

    model = GPT(GPTConfig())                  # 124,439,808 parameters
    loss = model(idx, targets)                # idx, targets: (B, T) token ids -> mean loss, nats
    logits = model(idx)                       # (B, T) -> (B, T, V)

Pre-LayerNorm, biases everywhere, learned positions, tanh GELU, the embedding as output head.
Parameters carry OpenAI's names, so weights move in and out without a table.
Shapes: B batch, T time, C width, H heads, D = C / H head width, V vocabulary, Vp padded.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import operators
from kernels.operators import Operators
from model.config import GPTConfig
from model.first_weights import draw_normal

INIT_STD = 0.02  # GPT-2's initializer_range
# attend(layer, qkv, n_head): (B, T, 3C) -> (B, T, C). What may take the place of causal attention
# within a row: a cache's (model/generate.py), or that of several requests in one row
# (model/packed.py).
Attend = Callable[[int, Tensor, int], Tensor]
# fused(x, branch): what Block.forward computes, by model/fused_block.py.
Fused = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
# watch(layer, x, branch): told behind each block what it returns (model/diagnostics.py).
Watch = Callable[[int, Tensor, Tensor], None]


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig, ops: Operators, layer: int):
        super().__init__()
        self.n_head, self.ops, self.layer = config.n_head, ops, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, C) -> (B, T, 3C): queries, keys and values side by side
        # In each head: y = softmax(q k^T / sqrt(D)) v, a position seeing itself and those before.
        if attend is not None:
            y = attend(self.layer, qkv, self.n_head)  # (B, T, C)
        elif self.training and self.dropout:  # of the softmax; the kernels have none
            y = operators.TORCH.attention(qkv, self.n_head, self.dropout)  # (B, T, C)
        else:
            y = self.ops.attention(qkv, self.n_head)  # (B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"  # torch's words
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, C) -> (B, T, 4C)
        x = F.gelu(x, approximate=self.approximate)
        x = self.c_proj(x)  # (B, T, 4C) -> (B, T, C)
        return F.dropout(x, self.dropout, self.training)


class LayerNorm(nn.LayerNorm):
    """LayerNorm, which can also be fused with the addition before it."""

    def __init__(self, config: GPTConfig, ops: Operators):
        super().__init__(config.n_embd, eps=1e-5)
        self.ops = ops

    def fused_add(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + branch, LayerNorm(x + branch)), each (B, T, C); with no branch nothing is added."""
        return self.ops.layer_norm(x, self.weight, self.bias, branch, self.eps)


class Block(nn.Module):
    """The two lines that nanoGPT has in this place:

        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))

    Computed so that every addition is fused with the LayerNorm that follows it. The last addition
    is followed by the next block's LayerNorm, so it is left to that block: a block takes and
    returns the residual stream x and the branch that has yet to be added to it.
    """

    def __init__(self, config: GPTConfig, ops: Operators, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config, ops)
        self.attn = Attention(config, ops, layer)
        self.ln_2 = LayerNorm(config, ops)
        self.mlp = MLP(config)
        self.fused: Fused | None = None  # on a GPU: the same lines and their derivatives by hand

    def forward(
        self, x: Tensor, branch: Tensor | None, attend: Attend | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.fused is not None and attend is None:
            return self.fused(x, branch)
        x, normed = self.ln_1.fused_add(x, branch)  # x = x + branch; normed = ln_1(x)
        branch = self.attn(normed, attend)
        x, normed = self.ln_2.fused_add(x, branch)  # x = x + branch; normed = ln_2(x)
        branch = self.mlp(normed)
        return x, branch  # each (B, T, C)


def run_block(model: Any, block: nn.Module, *inputs: Any) -> Any:
    """block(*inputs). With model.checkpoint_activations only the inputs are kept, and the block is
    computed once more in the backward pass."""
    if model.checkpoint_activations and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class GPT(nn.Module):
    """The whole network."""

    def __init__(self, config: GPTConfig, ops: Operators = operators.TORCH):
        super().__init__()
        self.config, self.ops = config, ops
        self.checkpoint_activations = False  # keep a block's input only, and compute it twice
        self.watch: Watch | None = None
        self.before_blocks: Callable[[], None] | None = None  # model/fused_block.py: copy_weights
        self.wte = nn.Embedding(config.padded_vocab, config.n_embd)  # also the output head
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
        self.h = nn.ModuleList(Block(config, ops, i) for i in range(config.n_layer))
        self.ln_f = LayerNorm(config, ops)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's own: N(0, 0.02), biases 0, LayerNorms 1.

        Matrices that write to the residual stream are scaled by 1/sqrt(number of them) = 1/sqrt(
        2 n_layer), as the paper says (section 2.3), so that the stream's variance doesn't grow
        with depth.
        """
        drawn = []
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                std = INIT_STD / math.sqrt(2 * self.config.n_layer) if residual else INIT_STD
                drawn.append((parameter, std))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        draw_normal(*drawn)
        # Padding rows take no probability and no gradient, so what is zero here stays zero.
        self.wte.weight[self.config.n_vocab :] = 0

    def hidden(
        self, idx: Tensor, positions: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """What the head reads. idx: (B, T) token ids -> (B, T, C).

        positions: (T,) or (B, T) where the tokens stand, if that isn't 0 to T - 1; attend: what
        computes attention, if not each token is to see its row up to itself.
        """
        if positions is None:
            x, _ = self.embed(idx)  # (B, T, C)
        else:
            x = self.wte(idx) + self.wpe.weight[positions]  # of (T, C) or (B, T, C)
        return self.through_blocks(x, attend)

    def embed(self, idx: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sum of token and position embeddings, (B, T, C), and the head's weight: wte.

        order: (B T,) the places of the tokens sorted by token: a GPU need not sort them then.
        """
        T = idx.shape[1]
        if T > self.config.n_ctx:
            raise ValueError(f"{T} positions in a context of {self.config.n_ctx}")
        return self.ops.embedding(idx, self.wte.weight, self.wpe.weight, order)

    def through_blocks(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """What the blocks and the last LayerNorm make of the embeddings. (B, T, C) both."""
        x = F.dropout(x, self.config.dropout, self.training)
        if self.before_blocks is not None and attend is None:  # else blocks go by their own lines
            self.before_blocks()
        branch = None
        for layer, block in enumerate(self.h):
            x, branch = run_block(self, block, x, branch, attend)
            if self.watch is not None:
                self.watch(layer, x, branch)
        _, normed = self.ln_f.fused_add(x, branch)
        return normed  # (B, T, C)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, reduction: str = "mean",
        order: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or with targets (B, T) the loss in nats, -100 counting for nothing.

        reduction: "mean" over the targets, or "sum". order: as embed() takes it.
        """
        x, head = self.embed(idx, order)  # (B, T, C), (Vp, C)
        x = self.through_blocks(x)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        x = x.reshape(-1, self.config.n_embd)  # (B T, C)
        targets = targets.reshape(-1)  # (B T,)
        return self.ops.linear_cross_entropy(
            x, head, targets, self.config.n_vocab, reduction
        )

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V); the padding is cut off, so it can never be sampled."""
        return F.linear(x, self.wte.weight)[..., : self.config.n_vocab]
