"""The network of the speedrun: what five years of published changes make of GPT-2, in one file.

    model = SpeedrunGPT(GPTConfig(arch="speedrun", n_head=6))     # heads 128 wide
    loss = model(idx, targets)                # called as model/gpt2.py's GPT is: model/network.py

It follows the best plain script of modded-nanogpt's third track (its entry 36: 1.70 B tokens to a
loss of 3.28 on FineWeb, T = 1,024), with the skip from the embedding of its first track. Each
change stands where it is made, with its source and what it is for.
Shapes: B batch, T time, C width, H heads, D = C / H head width, V vocabulary, Vp padded.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import Operators
from model.gpt2 import Attend, GPTConfig

SOFTCAP = 15.0  # logits stay within it: no run-away confidence (record 18; Gemma 2, 2408.00118)
ROPE_BASE = 1024.0  # longest wavelength over 2 pi: the context (track 3)
SHARPNESS = 1.36  # q is longer by it: normalised, q k^T / sqrt(D) is small (track 3: 0.12 q k^T)
INIT_VARIANCE = 1 / 3  # of weights, times 1 / fan-in: torch's uniform default (track 3)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without gain (1910.07467): x over its root mean square. (..., C) -> (..., C)."""
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)


def rotary_angles(T: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's rotations, each (T, D/2), fp32 (RoPE, 2104.09864).

    Half of the pairs turn, from a radian a position down to 1 / ROPE_BASE; the others stand still,
    and carry content without position (track 3).
    """
    frequency = ROPE_BASE ** -torch.linspace(0, 1, math.ceil(D / 4), device=device)
    frequency = F.pad(frequency, (0, D // 2 - len(frequency)))  # (D/2,)
    angle = torch.arange(T, device=device)[:, None] * frequency  # (T, D/2)
    return angle.cos(), angle.sin()


class Attention(nn.Module):
    """Causal self-attention: positions by rotation, queries and keys normalised in each head."""

    def __init__(self, config: GPTConfig, ops: Operators, layer: int):
        super().__init__()
        self.n_head, self.ops, self.layer = config.n_head, ops, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend | None) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, C) -> (B, T, 3C)
        # QK-norm keeps the scores in range at high learning rates (2010.04245, 2302.05442).
        qkv = self.ops.qk_norm_rotary(qkv, self.n_head, *rotary, SHARPNESS)
        if attend is None:
            y = self.ops.attention(qkv, self.n_head)  # (B, T, C)
        else:
            y = attend(self.layer, qkv, self.n_head)  # (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Two linear layers around relu(x)^2, which is sparse and cheaper than GELU (Primer,
    2109.08668)."""

    def __init__(self, config: GPTConfig, ops: Operators):
        super().__init__()
        self.ops = ops
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, C) -> (B, T, 4C)
        x = self.ops.relu_squared(x)
        return self.c_proj(x)  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """GPT-2's two lines, after a third that mixes the embedding in again."""

    def __init__(self, config: GPTConfig, ops: Operators, layer: int):
        super().__init__()
        self.attn = Attention(config, ops, layer)
        self.mlp = MLP(config, ops)

    def forward(
        self, x: Tensor, x0: Tensor, mix: Tensor, rotary: tuple[Tensor, Tensor],
        attend: Attend | None = None,
    ) -> Tensor:
        x = mix[0] * x + mix[1] * x0  # (B, T, C): learned, at first 1 and 0 (record 9)
        x = x + self.attn(norm(x), rotary, attend)
        x = x + self.mlp(norm(x))
        return x


class SpeedrunGPT(nn.Module):
    """The whole network."""

    def __init__(self, config: GPTConfig, ops: Operators = kernels.TORCH):
        super().__init__()
        self.config, self.ops = config, ops
        self.checkpoint_activations = False  # keep a block's input only, and compute it twice
        self.wte = nn.Embedding(config.padded_vocab, config.n_embd)
        self.h = nn.ModuleList(Block(config, ops, i) for i in range(config.n_layer))
        self.x0_mix = nn.Parameter(torch.empty(config.n_layer, 2))  # of each block: of x, of x0
        # Not tied to wte: each has its own learning rate (record 8).
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Embedding N(0, 1). What writes to the residual stream, and the head, is 0: at first every
        block hands its input on and every token is equally likely (record 5)."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                nn.init.zeros_(parameter)
            elif name == "wte.weight":
                nn.init.normal_(parameter, 0.0, 1.0)
            elif name == "x0_mix":
                parameter.copy_(torch.tensor([1.0, 0.0]))
            else:
                fan_in = parameter.shape[1]
                nn.init.normal_(parameter, 0.0, math.sqrt(INIT_VARIANCE / fan_in))
        # Padding rows take no probability and no gradient, so what is zero here stays zero.
        self.wte.weight[self.config.n_vocab :] = 0

    def hidden(
        self, idx: Tensor, positions: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """What the head reads, as in GPT.hidden. idx: (B, T) token ids -> (B, T, C)."""
        T, D = idx.shape[1], self.config.n_embd // self.config.n_head
        if positions is None and T > self.config.n_ctx:
            raise ValueError(f"{T} positions in a context of {self.config.n_ctx}")
        cos, sin = rotary_angles(self.config.n_ctx, D, idx.device)  # each (n_ctx, D/2)
        if positions is None:
            rotary = cos[:T], sin[:T]  # each (T, D/2)
        else:
            rotary = cos[positions], sin[positions]  # each (T, D/2) or (B, T, D/2)
        # The stream keeps the weights' master dtype, also where the embedding is stored in bf16.
        x = x0 = norm(self.wte(idx).to(self.x0_mix.dtype))  # (B, T, C), (record 8)
        for block, mix in zip(self.h, self.x0_mix, strict=True):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, x0, mix, rotary, attend, use_reentrant=False)
            else:
                x = block(x, x0, mix, rotary, attend)
        return norm(x)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        """Logits (B, T, V), or with targets (B, T) the loss in nats, as in GPT.forward."""
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        x = x.reshape(-1, self.config.n_embd)  # (B T, C)
        return self.ops.linear_cross_entropy(
            x, self.lm_head.weight, targets.reshape(-1), self.config.n_vocab, reduction, SOFTCAP
        )

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V); the padding is cut off, so it can never be sampled."""
        z = self.lm_head(x)[..., : self.config.n_vocab]
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        return SOFTCAP * torch.tanh(wide / SOFTCAP)
