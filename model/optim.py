"""AdamW as GPT-2's reproductions use it, the learning rate of each step, fp16's loss scale."""

import math
from dataclasses import dataclass

import torch

from launch import cli
from model.parallel import Part

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of one parameter, beside its step count


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
        cli.within("optim.lr", self.lr, 0, 1e38)  # fp32 ends at 3.4e38
        cli.within("optim.final_lr", self.final_lr, 0, 1)
        cli.within("optim.warmup_steps", self.warmup_steps, 0, cli.MOST_STEPS)
        cli.within("optim.weight_decay", self.weight_decay, 0, 100)
        cli.within("optim.beta1", self.beta1, 0, 0.999999)
        cli.within("optim.beta2", self.beta2, 0, 0.999999)
        # Padding rows have no gradient: their update is 0 / (0 + eps), NaN where fp32 makes eps 0.
        cli.within("optim.eps", self.eps, 1e-37, 1)
        cli.within("optim.clip", self.clip, 0, 1e38)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine towards final_lr * lr, which step = steps would have.

    step counts the finished updates, from 0.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def clip_factor(norm: torch.Tensor, largest: float) -> torch.Tensor:
    """What brings a gradient of this norm down to the largest allowed; 1 where it's below, or for
    largest = 0 always. As in torch.nn.utils.clip_grad_norm_."""
    return ((largest or math.inf) / (norm + 1e-6)).clamp(max=1.0)


def make_optimizer(parts: list[Part], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW on the rows that are this rank's, with weight decay on matrices (embeddings included).

    Moments are made now, and not in the first step: a GPU that can't hold them says so at once,
    and a checkpoint always has them.
    """
    mine = [part.mine for part in parts if len(part.mine)]  # a short bias has no row for each rank
    groups = [
        {"params": [p for p in mine if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in mine if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = mine[0].device.type in ("cuda", "cpu")
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
    for p in mine:
        step = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
        moments = {key: torch.zeros_like(p) for key in MOMENTS}
        adamw.state[p] = {"step": step} | moments
    return adamw


@dataclass
class LossScale:
    """Lifts fp16's gradients out of the range where they would be rounded to 0.

    The loss is multiplied by `value` before the backward pass, and the gradient divided by it.
    torch.amp.GradScaler's rule and constants (arXiv 1710.03740), but judged on the norm of the
    whole gradient, which all ranks know, and not on the tensors that one rank holds.
    """

    enabled: bool = False
    value: float = 1.0
    good_steps: int = 0  # since the value last changed

    @classmethod
    def of(cls, dtype: str) -> "LossScale":
        """Switched on for fp16 alone."""
        return cls(True, 65536.0) if dtype == "fp16" else cls()

    def overflowed(self, loss: float, norm: float) -> bool:
        """Whether a step has to be left out because its scale was too large; adapts the scale.

        Halves it after an overflow, doubles it after 2,000 good steps. A gradient that isn't
        finite at a scale of 1 either is no overflow of ours.
        """
        if not self.enabled:
            return False
        if math.isfinite(loss) and not math.isfinite(norm) and self.value > 1:
            self.value, self.good_steps = self.value / 2, 0
            return True
        self.good_steps += 1
        if self.good_steps == 2000:
            self.value, self.good_steps = self.value * 2, 0
        return False
