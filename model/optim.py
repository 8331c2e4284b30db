"""The optimizers, AdamW's and Muon's, the learning rate of each step, fp16's loss scale."""

import math
from typing import Any

import torch
from torch import Tensor

from launch.errors import BadInput, Failed
from model.adamw import AdamW
from model.config import MuonConfig, OptimConfig
from model.muon import Muon, is_matrix
from model.parallel import ParallelModel, ParamShard

# What an optimizer keeps of each parameter, beside tensors with its rows (row_state()): one number.
SCALAR_STATE = ("step",)
FIRST_SCALE = 65536.0  # GradScaler's
MAX_OVERFLOWS = 12  # in a row: a scale 4,096 times too large, where some two are usual


def get_lr(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then as the schedule says, to final_lr * lr, which step = steps would have.

    step counts the finished updates, from 0.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        first = decay_start(steps, config)
        if step <= first:
            return config.lr
        left = (steps - step) / (steps - first)  # 1 at the first step of the decay, 0 at the end
        return config.lr * (config.final_lr + (1 - config.final_lr) * left)
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def decay_start(steps: int, config: OptimConfig) -> int:
    """The last step with the full rate: a run that is given more steps goes on from there.

    wsd: where its decay begins. constant: the last step. cosine: -1, for it falls all the time.
    """
    if config.schedule == "constant":
        return steps
    if config.schedule == "wsd":
        return max(min(config.warmup_steps, steps), steps - round(config.decay_ratio * steps))
    return -1


def configure_optimizers(
    model: ParallelModel, config: OptimConfig
) -> "AdamW | MuonAdamW":
    """The optimizer of the rows that are this rank's. Every group has its lr_ratio: how its rate
    stands to that of get_lr()."""
    if config.optimizer == "muon":
        return MuonAdamW(model, config)
    # A short bias has no row for each rank.
    params = [shard.optim_param for shard in model.shards if len(shard.optim_param)]
    return configure_adamw([  # weight decay on matrices, embeddings included
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay,
         "lr_ratio": 1.0},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0, "lr_ratio": 1.0},
    ], config)


def configure_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> AdamW:
    """AdamW of these groups."""
    return AdamW(groups, config.lr, (config.beta1, config.beta2), config.eps)


class MuonAdamW:
    """Muon on the blocks' matrices and AdamW on the rest, called as one optimizer."""

    def __init__(self, model: ParallelModel, config: OptimConfig) -> None:
        matrices = [shard for shard in model.shards if is_matrix(shard.name, shard.param)]
        if any(min(shard.param.shape) == 1 for shard in matrices):
            raise BadInput("--optim.optimizer muon needs matrices, and this model's have a side of "
                           "1: a larger --model.n_embd, or --optim.optimizer adamw")
        others = [shard for shard in model.shards if shard not in matrices]
        self.muon = Muon(model, matrices, config.lr, config.weight_decay,
                         config.muon.momentum, config.muon.momentum_warmup)
        self.adamw = configure_adamw([
            {"params": [shard.optim_param], "weight_decay": config.muon.adamw_weight_decay,
             "lr_ratio": _adamw_rate(shard.name, config.muon) / config.lr}
            for shard in others if len(shard.optim_param)
        ], config)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Both optimizers' groups."""
        return self.muon.param_groups + self.adamw.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        """What both keep of each parameter."""
        return {**self.muon.state, **self.adamw.state}

    def step(self) -> None:
        """One update of this rank's rows; all ranks call it together."""
        self.muon.step()
        self.adamw.step()


def _adamw_rate(name: str, config: MuonConfig) -> float:
    """The peak rate of a parameter that isn't Muon's."""
    if name == "lm_head.weight":
        return config.head_lr
    if name.startswith(("wte", "wpe", "value_embeddings")):
        return config.embed_lr
    return config.vector_lr


def row_state(optimizer: Any, shard: ParamShard) -> tuple[str, ...]:
    """What the optimizer keeps with a parameter's rows: the same on all ranks, also on those that
    update none of its rows. Checkpoints save and load what stands here and know of no optimizer."""
    if isinstance(optimizer, MuonAdamW) and is_matrix(shard.name, shard.param):
        return ("momentum_buffer",)
    return ("exp_avg", "exp_avg_sq")


class LossScaler:
    """Lifts fp16's gradients out of the range where they would be rounded to 0.

    The loss is multiplied by `scale` before the backward pass, and the gradient divided by it.
    torch.amp.GradScaler's rule and constants (arXiv 1710.03740), but judged on the norm of the
    whole gradient, which all ranks know, and not on the tensors that one rank holds. All of it
    happens on the device. Any other dtype has none: scale is 1, and nothing is computed.
    """

    def __init__(self, enabled: bool = False, device: torch.device | str = "cpu") -> None:
        self.enabled = enabled
        # The scale, good steps since it last changed, overflows in a row; exact in fp32.
        self.state = torch.tensor((FIRST_SCALE, 0.0, 0.0), device=device)

    @classmethod
    def of(cls, dtype: str, device: torch.device | str = "cpu") -> "LossScaler":
        """Switched on for fp16 alone."""
        return cls(dtype == "fp16", device)

    @property
    def scale(self) -> Tensor | float:
        """What the loss is multiplied by."""
        return self.state[0] if self.enabled else 1.0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as the backward pass begins with it."""
        return loss * self.state[0] if self.enabled else loss

    @torch.no_grad()
    def update(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step has to be left out because its scale was too large: a scalar.

        Halves the scale after an overflow, doubles it after 2,000 good steps. A gradient that isn't
        finite at a scale of 1 either is no overflow of ours.
        """
        scale, good_steps, in_a_row = self.state
        overflow = loss.isfinite() & ~norm.isfinite() & (scale > 1)
        grows = ~overflow & (good_steps + 1 >= 2000)
        scale = torch.where(overflow, scale / 2, torch.where(grows, scale * 2, scale))
        good_steps = torch.where(overflow | grows, 0.0, good_steps + 1)
        self.state = torch.stack((scale, good_steps, torch.where(overflow, in_a_row + 1, 0.0)))
        return overflow

    def numbers(self) -> Tensor:
        """The state, for the host to read with a step's report; none where there is no scale."""
        return self.state if self.enabled else self.state[:0]

    @staticmethod
    def describe_overflow(scale: float, in_a_row: float) -> str:
        """What became of the scale. Raises Failed after MAX_OVERFLOWS of them."""
        line = f"fp16 overflow, the loss scale falls to {scale:g}"
        if in_a_row > MAX_OVERFLOWS:
            raise Failed(f"{line}: {in_a_row:.0f} in a row, so the gradients are no numbers at any "
                         "scale; the run ends")
        return line

    def state_dict(self) -> dict[str, Any]:
        """For state.json."""
        scale, good_steps, in_a_row = self.state.tolist()
        return {"enabled": self.enabled, "value": scale if self.enabled else 1.0,
                "good_steps": int(good_steps), "overflows_in_a_row": int(in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what state_dict() gave, from fp16 to fp16: any other dtype has scale 1."""
        if self.enabled and state["enabled"]:
            numbers = (state["value"], state["good_steps"], state.get("overflows_in_a_row", 0))
            self.state.copy_(torch.tensor(numbers, dtype=torch.float32))
