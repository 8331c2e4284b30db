"""GPT-2 as a plain PyTorch script has it: what the rows of the bench are compared with.

Modules of torch.nn, attention by F.scaled_dot_product_attention, all logits at once, AdamW without
fused kernels, fp32, one step after the other; sampling that computes the whole context again for
every token. Its weights are those of a model of this project, so that both come to the same losses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import GPTConfig


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)  # (B, T, C) each
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")  # (B, T, 4C)
        return x + self.mlp["c_proj"](hidden)


class PlainGPT(nn.Module):
    """(B, T) tokens -> (B, T, V) logits."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab, config.n_embd)
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe.weight[: idx.shape[1]]  # (B, T, C)
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)[..., : self.config.n_vocab]


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """AdamW as PyTorch gives it, with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))


def step(model: PlainGPT, optimizer: torch.optim.AdamW, inputs: Tensor, targets: Tensor) -> float:
    """One training step on (B, T) inputs and targets. Returns the loss, in nats."""
    logits = model(inputs)  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def first_step(config: GPTConfig, B: int, T: int) -> float:
    """A new model and its first step, as a script does it from its first line on."""
    model = PlainGPT(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, 0.0, 0.02)
    idx = torch.randint(config.n_vocab, (B, T + 1))
    return step(model, optimizer_of(model), idx[:, :-1].contiguous(), idx[:, 1:].contiguous())


@torch.no_grad()
def sample(model: PlainGPT, idx: Tensor, new_tokens: int) -> Tensor:
    """(B, T) prompt -> (B, T + new_tokens), the likeliest token each time."""
    for _ in range(new_tokens):
        logits = model(idx)[:, -1]  # (B, V)
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], 1)
    return idx
