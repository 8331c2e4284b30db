"""AdamW as GPT-2's reproductions use it, and the learning rate of each step."""

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimConfig:
    """Hyper-parameters; the defaults are the 124M model's (GPT-3: arXiv 2005.14165)."""

    lr: float = 6e-4
    """Peak learning rate (GPT-3, table 2.1)."""
    final_lr: float = 0.0
    """Last step's learning rate as a fraction of the peak (llm.c's -q)."""
    warmup_steps: int = 700
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """On matrices only: not on biases and LayerNorms (GPT-3, appendix B)."""
    beta1: float = 0.9
    """Decay of the first moment (GPT-3, appendix B)."""
    beta2: float = 0.95
    """Decay of the second moment (GPT-3, appendix B)."""
    eps: float = 1e-8
    """Added to the root of the second moment (GPT-3, appendix B)."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is (GPT-3, appendix B)."""

    def __post_init__(self) -> None:
        for key in ("lr", "final_lr", "warmup_steps", "weight_decay", "eps", "clip"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} {getattr(self, key)} is negative or no number")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 {self.beta1} and beta2 {self.beta2} lie in [0, 1)")


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine towards final_lr * lr, which step = steps would have.

    step counts the finished updates, from 0.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices (embeddings included) only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cuda", "cpu")
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
