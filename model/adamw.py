"""AdamW (arXiv 1711.05101) by PyTorch's fused update: one pass over weights and moments.

    m = b1 m + (1 - b1) g                       the gradient's running mean
    v = b2 v + (1 - b2) g^2                     and that of its square
    w = w (1 - lr decay) - lr m' / (sqrt(v') + eps)     m' = m / (1 - b1^t), v' = v / (1 - b2^t)

torch.optim.AdamW gives the same bits by the same update. But it brings all of torch.compile, a
second that a run would wait for which compiles nothing, on one device; and in each step it looks
up, for each parameter, what never changes: 0.6 ms of the host's time, on a stand-in for a GPU
(docs/decisions.md).
"""

from typing import Any

import torch
from torch import Tensor


class AdamW:
    """Keeps of each parameter the two moments, `exp_avg` and `exp_avg_sq`, and of all together the
    number of updates: `step`, one tensor, which every parameter's state shows.

    param_groups: each with `params`, `lr` and `weight_decay`. A GPU leaves an update out where
    `found_inf`, a scalar on it, is 1, and divides the gradients by `grad_scale`.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        self.betas, self.eps = betas, eps
        self.param_groups = [group | {"lr": lr} for group in groups if group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        self.updates = torch.zeros((), device=params[0].device)
        # Moments are made now, and not in the first step: a GPU that can't hold them says so at
        # once, and a checkpoint always has them.
        self.state = {p: {"step": self.updates, "exp_avg": torch.zeros_like(p),
                          "exp_avg_sq": torch.zeros_like(p)} for p in params}
        self.moments = [[[self.state[p][key] for p in group["params"]]
                         for key in ("exp_avg", "exp_avg_sq")] for group in self.param_groups]
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        """One update by the parameters' gradients: of all, each must have one."""
        self.updates += 1
        for group, (means, squares) in zip(self.param_groups, self.moments, strict=True):
            params = group["params"]
            torch._fused_adamw_(
                params, [p.grad for p in params], means, squares, [], [self.updates] * len(params),
                lr=group["lr"], beta1=self.betas[0], beta2=self.betas[1], eps=self.eps,
                weight_decay=group["weight_decay"], amsgrad=False, maximize=False,
                grad_scale=self.grad_scale, found_inf=self.found_inf,
            )
        if self.found_inf is not None:  # 1: it was no update
            self.updates -= self.found_inf
