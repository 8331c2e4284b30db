"""Muon: momentum, orthogonalised (Keller Jordan, 2024; arXiv 2502.16982), on the blocks' matrices.

    G       the gradient of a matrix, M its running mean, U = G + momentum * (M - G) (Nesterov)
    O       U with all its singular values moved near to 1, by five Newton-Schulz iterations
    W       W (1 - lr * weight_decay) - lr * sqrt(max(1, rows / columns)) * O

Everything else (embeddings, head, vectors) is AdamW's. With many ranks each orthogonalises its own
share of the matrices, whoever holds their rows, and one exchange hands the results round: repeated
on every rank the iterations would take 3 % of a step on 8 GPUs. Equal shapes are one batch.
"""

import math
from typing import Any

import torch
from torch import Tensor

from launch.world import DTYPES
from model.parallel import ParallelModel, ParamShard, buckets

A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic: steepest at 0, for five steps (Jordan, 2024)
STEPS = 5
EPS = 1e-7  # a matrix of zeros stays one


def orthogonalise(U: Tensor) -> Tensor:
    """Near U V^T of each matrix's singular value decomposition. (n, rows, columns), same out.

    Computed in U's dtype: bf16 is enough, since the result needs singular values of .7 to 1.2.
    """
    tall = U.shape[1] > U.shape[2]
    X = U.mT if tall else U  # (n, r, c), r <= c: the smaller product
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = X @ X.mT  # (n, r, r)
        polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)  # B gram + C gram^2
        X = torch.baddbmm(X, polynomial, X, beta=A)  # A X + B (X X^T) X + C (X X^T)^2 X
    return X.mT if tall else X


def matrices_of(name: str, rows: Tensor) -> list[Tensor]:
    """The matrices that a parameter holds: c_attn three (C, C), of queries, keys and values."""
    return list(rows.chunk(3)) if name.endswith("c_attn.weight") else [rows]


def is_matrix(name: str, param: Tensor) -> bool:
    """Whether Muon trains it: a block's matrix."""
    return name.startswith("h.") and param.dim() == 2


class Muon:
    """On the shards of a model's matrices; all ranks call step() together.

    Keeps of each parameter its rows of `momentum_buffer`, and the number of steps.
    """

    def __init__(
        self, model: ParallelModel, shards: list[ParamShard], lr: float, weight_decay: float,
        momentum: float, momentum_warmup: int,
    ) -> None:
        self.model, self.shards = model, shards
        self.momentum, self.momentum_warmup = momentum, momentum_warmup
        # A matrix of few rows has none on the last ranks.
        params = [shard.optim_param for shard in shards if len(shard.optim_param)]
        self.param_groups: list[dict[str, Any]] = [
            {"params": params, "lr": lr, "weight_decay": weight_decay, "lr_ratio": 1.0}]
        self.state = {p: {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
                      for p in params}
        # The compute dtype's products, as everywhere else; fp16 would overflow.
        self.dtype = DTYPES["bf16" if model.dtype == "fp16" else model.dtype]

    @torch.no_grad()
    def step(self) -> None:
        """One update of this rank's rows."""
        [group] = self.param_groups
        for shards in buckets(self.shards):
            full = self.model.gather_rows(shards, [self._momentum(shard) for shard in shards])
            for shard, direction in zip(shards, self._orthogonalise(shards, full), strict=True):
                first, p = shard.optim_start, shard.optim_param
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction[first : first + len(p)], alpha=-group["lr"])

    def _momentum(self, shard: ParamShard) -> Tensor:
        """U of this rank's rows, in the dtype of the iterations."""
        p = shard.optim_param
        if len(p) == 0:
            return torch.empty_like(p, dtype=self.dtype)
        assert p.grad is not None
        state = self.state[p]
        # From .85 on: early gradients are large and soon out of date (modded-nanogpt, record 9).
        warm = min(1.0, state["step"].item() / max(1, self.momentum_warmup))
        momentum = (1 - warm) * 0.85 + warm * self.momentum
        state["step"] += 1
        state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum_buffer"], momentum).to(self.dtype)

    def _orthogonalise(self, shards: list[ParamShard], full: list[Tensor]) -> list[Tensor]:
        """O of each parameter, all its rows, scaled for its shape."""
        parts = [matrices_of(shard.name, U) for shard, U in zip(shards, full, strict=True)]
        flat = [matrix for matrices in parts for matrix in matrices]
        found: dict[int, Tensor] = {}
        for shape in dict.fromkeys(matrix.shape for matrix in flat):
            places = [i for i, matrix in enumerate(flat) if matrix.shape == shape]
            scale = math.sqrt(max(1.0, shape[0] / shape[1]))  # wide or tall: the same effect
            batch = torch.stack([flat[i] for i in places])  # (n, rows, columns)
            done = self.model.share_out(orthogonalise, batch)
            found |= {place: done[n] * scale for n, place in enumerate(places)}
        numbers = iter(range(len(flat)))
        return [torch.cat([found[next(numbers)] for _ in matrices]) for matrices in parts]
