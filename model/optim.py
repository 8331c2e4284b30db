"""AdamW as GPT-2's reproductions use it, the learning rate of each step, fp16's loss scale."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from launch import cli
from launch.errors import Failed
from model.parallel import ParamShard

# What the optimizer keeps of each parameter. Checkpoints save and load what stands here and know
# of no optimizer. ROW_STATE: tensors with the parameter's rows; SCALAR_STATE: one number each.
ROW_STATE = ("exp_avg", "exp_avg_sq")
SCALAR_STATE = ("step",)
MAX_OVERFLOWS = 12  # in a row: a scale 4,096 times too large, where some two are usual


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


def get_lr(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine towards final_lr * lr, which step = steps would have.

    step counts the finished updates, from 0.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def configure_optimizers(shards: list[ParamShard], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW on the rows that are this rank's, with weight decay on matrices (embeddings included).

    Moments are made now, and not in the first step: a GPU that can't hold them says so at once,
    and a checkpoint always has them.
    """
    # A short bias has no row for each rank.
    params = [shard.optim_param for shard in shards if len(shard.optim_param)]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = params[0].device.type in ("cuda", "cpu")
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
    for p in params:
        device = p.device if fused else "cpu"
        for key in SCALAR_STATE:
            adamw.state[p][key] = torch.zeros((), dtype=torch.float32, device=device)
        for key in ROW_STATE:
            adamw.state[p][key] = torch.zeros_like(p)
    return adamw


@dataclass
class LossScaler:
    """Lifts fp16's gradients out of the range where they would be rounded to 0.

    The loss is multiplied by `scale` before the backward pass, and the gradient divided by it.
    torch.amp.GradScaler's rule and constants (arXiv 1710.03740), but judged on the norm of the
    whole gradient, which all ranks know, and not on the tensors that one rank holds. Any other
    dtype keeps a scale of 1.
    """

    enabled: bool = False
    scale: float = 1.0
    good_steps: int = 0  # since the scale last changed
    overflows_in_a_row: int = 0

    @classmethod
    def of(cls, dtype: str) -> "LossScaler":
        """Switched on for fp16 alone."""
        return cls(True, 65536.0) if dtype == "fp16" else cls()

    def update(self, loss: float, norm: float) -> str:
        """Says so where a step has to be left out because its scale was too large; '' if not.

        Halves the scale after an overflow, doubles it after 2,000 good steps. A gradient that isn't
        finite at a scale of 1 either is no overflow of ours. Raises Failed after MAX_OVERFLOWS.
        """
        if not self.enabled:
            return ""
        if math.isfinite(loss) and not math.isfinite(norm) and self.scale > 1:
            self.scale /= 2
            self.good_steps = 0
            self.overflows_in_a_row += 1
            line = f"fp16 overflow, the loss scale falls to {self.scale:g}"
            if self.overflows_in_a_row > MAX_OVERFLOWS:
                raise Failed(f"{line}: {self.overflows_in_a_row} in a row, so the gradients are no "
                             "numbers at any scale; the run ends")
            return line
        self.overflows_in_a_row = 0
        self.good_steps += 1
        if self.good_steps == 2000:
            self.scale *= 2
            self.good_steps = 0
        return ""

    def state_dict(self) -> dict[str, Any]:
        """For state.json."""
        return {"enabled": self.enabled, "value": self.scale, "good_steps": self.good_steps,
                "overflows_in_a_row": self.overflows_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what state_dict() gave, from fp16 to fp16: any other dtype has scale 1."""
        if self.enabled and state["enabled"]:
            self.scale = state["value"]
            self.good_steps = state["good_steps"]
            self.overflows_in_a_row = state.get("overflows_in_a_row", 0)
