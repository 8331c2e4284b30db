"""The speedrun's network: what years of published changes make of GPT-2.

    model = SpeedrunGPT(GPTConfig(arch="speedrun", n_head=6))   # called as GPT is: model/network.py

After modded-nanogpt: the best plain script of its track 3 (entry 36: 1.70 B tokens to a loss of
3.28 on FineWeb), and of its track 1 the skip from the embedding (record 9). Each change has its
source beside it. Shapes: B batch, T time, C width, D head width, V vocabulary, Vp padded.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels import operators
from kernels.operators import Operators
from kernels.reference import at_least_fp32, rotary_angles
from model.document_mask import DocumentMask
from model.first_weights import draw_normal
from model.gpt2 import Attend, GPTConfig, run_block
from model.value_embeddings import ValueEmbeddings

SOFTCAP = 15.0  # logits stay within it: no run-away confidence (record 18; Gemma 2, 2408.00118)
ROPE_BASE = 1024.0  # longest wavelength over 2 pi: the context (RoPE, 2104.09864; track 3)
SHARPNESS = 1.36  # q is longer by it: normalised, q k^T / sqrt(D) is small (track 3: 0.12 q k^T)
INIT_VARIANCE = 1 / 3  # of weights, times 1 / fan-in: torch's uniform default (track 3)

Rotary = tuple[Tensor, Tensor]  # cos and sin of the positions' angles


def norm(x: Tensor) -> Tensor:
    """RMSNorm without gain (1910.07467): x over its root mean square. (..., C) -> (..., C)."""
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


class Attention(nn.Module):
    """Causal self-attention: positions by rotation, queries and keys normalised in each head."""

    def __init__(self, config: GPTConfig, ops: Operators, layer: int):
        super().__init__()
        self.n_head, self.ops, self.layer = config.n_head, ops, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, values: Tensor | None, attend: Attend | None):
        qkv = self.c_attn(x)  # (B, T, C) -> (B, T, 3C)
        if values is not None:  # the token's own, (B, T, C), added to v
            qkv = qkv + F.pad(values.to(qkv.dtype), (2 * x.shape[-1], 0))
        # QK-norm keeps the scores in range at high learning rates (2010.04245, 2302.05442).
        qkv = self.ops.qk_norm_rotary(qkv, self.n_head, *rotary, SHARPNESS)
        if attend is None:
            return self.c_proj(self.ops.attention(qkv, self.n_head))  # (B, T, C)
        return self.c_proj(attend(self.layer, qkv, self.n_head))


class MLP(nn.Module):
    """Two linear layers around relu(x)^2, sparse and cheaper than GELU (Primer, 2109.08668)."""

    def __init__(self, config: GPTConfig, ops: Operators):
        super().__init__()
        self.ops = ops
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ops.relu_squared(self.c_fc(x))  # (B, T, C) -> (B, T, 4C)
        return self.c_proj(x)  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """GPT-2's two lines, after a third that mixes the embedding in again."""

    def __init__(self, config: GPTConfig, ops: Operators, layer: int):
        super().__init__()
        self.attn = Attention(config, ops, layer)
        self.mlp = MLP(config, ops)

    def forward(self, x: Tensor, x0: Tensor, mix: Tensor, rotary: Rotary, values: Tensor | None,
                attend: Attend | None) -> Tensor:
        x = mix[0] * x + mix[1] * x0  # (B, T, C): learned, at first 1 and 0 (record 9)
        x = x + self.attn(norm(x), rotary, values, attend)
        x = x + self.mlp(norm(x))
        return x


class SpeedrunGPT(nn.Module):
    """The whole network."""

    def __init__(self, config: GPTConfig, ops: Operators = operators.TORCH):
        super().__init__()
        self.config, self.ops = config, ops
        self.checkpoint_activations = False  # keep a block's input only, and compute it twice
        self.wte = nn.Embedding(config.padded_vocab, config.n_embd)
        self.h = nn.ModuleList(Block(config, ops, i) for i in range(config.n_layer))
        self.x0_mix = nn.Parameter(torch.empty(config.n_layer, 2))  # of each block: of x, of x0
        self.value_embeddings = ValueEmbeddings(config)  # an option, empty where it is off
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab, bias=False)  # untied: record 8
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """At first blocks hand their input on, and all tokens are equally likely (record 5)."""
        drawn = [(self.wte.weight[: self.config.n_vocab], 1.0)]  # padding rows are always 0
        for name, parameter in self.named_parameters():
            if name.endswith(("c_attn.weight", "c_fc.weight")):
                drawn.append((parameter, (INIT_VARIANCE / self.config.n_embd) ** 0.5))
            else:
                nn.init.zeros_(parameter)
        self.x0_mix[:, 0] = 1
        draw_normal(*drawn)

    def hidden(
        self, idx: Tensor, positions: Tensor | None = None, attend: Attend | None = None,
        order: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, as in GPT.hidden. idx: (B, T) token ids -> (B, T, C)."""
        T, D = idx.shape[1], self.config.n_embd // self.config.n_head
        if positions is None and T > self.config.n_ctx:
            raise ValueError(f"{T} positions in a context of {self.config.n_ctx}")
        cos, sin = rotary_angles(self.config.n_ctx, D, ROPE_BASE, idx.device)  # each (n_ctx, D/2)
        places = slice(T) if positions is None else positions
        rotary = cos[places], sin[places]  # each (T, D/2) or (B, T, D/2)
        # The stream keeps the weights' master dtype, also where the embedding is stored in bf16.
        x, _ = self.ops.embedding(idx, self.wte.weight, None, order)  # (B, T, C)
        x = x0 = norm(x.to(self.x0_mix.dtype))  # (record 8)
        for i, block in enumerate(self.h):
            values = self.value_embeddings.of_layer(i, idx)  # (B, T, C) or None
            x = run_block(self, block, x, x0, self.x0_mix[i], rotary, values, attend)
        return norm(x)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, reduction: str = "mean",
        order: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or with targets (B, T) the loss in nats: as GPT.forward."""
        attend = None
        if self.config.document_mask and targets is not None:
            attend = DocumentMask(idx, end_of_text=self.config.n_vocab - 1).attend
        x = self.hidden(idx, attend=attend, order=order)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        return self.ops.linear_cross_entropy(
            x.flatten(0, 1), self.lm_head.weight, targets.flatten(),  # (B T, C), (Vp, C), (B T,)
            self.config.n_vocab, reduction, SOFTCAP)

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V); the padding is cut off, so it can never be sampled."""
        z = self.lm_head(x)[..., : self.config.n_vocab]
        return SOFTCAP * torch.tanh(z.to(at_least_fp32(z.dtype)) / SOFTCAP)
