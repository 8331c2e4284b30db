"""What flows through the network in a training step: --diagnose_every N records a step in N.

    watch = Diagnostics(state, every=50, step=0)
    ...                                  # a training step
    row = watch.take(step)               # {"activation_std": [...], "weights": {...}, ...} or None

For each block, over all tokens of the step: mean and standard deviation of the residual stream
behind it, the share of its hidden units that GELU switches off, and the standard deviation of the
loss's gradient in that stream. For each matrix: the standard deviation of its gradient as the
optimizer gets it (clipped), that over the weights' own, and log10 of the update over the weights.

It reads and changes nothing, so a run trains bit for bit as without it; in a step that isn't
recorded it does nothing. All ranks take part, and the figures are those of one rank, whatever the
number of ranks and micro-steps. Sums are fp64. While the weights are updated a recorded step holds
this rank's matrices twice.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.parallel import ParamShard, ends_a_group
from model.train_state import TrainState

GELU_OFF = -3.0  # below it GELU passes under 0.005 of its input, and its slope is under 0.012


# Of one tensor or of many: how many numbers, their sum, the sum of their squares.
Moments = list[float]


class Diagnostics:
    """Records the first step of a run and every `every`-th; 0: none. All ranks hold one."""

    def __init__(self, state: TrainState, every: int, step: int = 0) -> None:
        """step: finished ones."""
        self.model, optimizer, self.scaler = state
        self.optimizer: Any = optimizer  # AdamW: check()
        self.module, self.world = self.model.module, self.model.world
        self.every = every
        self.recorded = False  # a whole step, with its update
        self.listening = False
        self.matrices = [shard for shard in self.model.shards if shard.param.dim() == 2]
        self._forget()
        self._listen(self._is_due(step + 1))

    def take(self, step: int) -> dict[str, Any] | None:
        """What was recorded in the step that has just ended, None if it wasn't its turn.

        step: finished ones, the last among them. A step whose turn it was and which was not applied
        (a spike, an overflow) is made up for by the next.
        """
        if not self.every:
            return None
        row = self._row() if self.recorded else None
        missed = self.listening and not self.recorded
        self.recorded = False
        self._listen(missed or self._is_due(step + 1))
        return row

    def go_back(self, step: int) -> None:
        """The run returns to `step`, of finished ones, as if it had begun there."""
        self.recorded = False
        self._listen(self._is_due(step + 1))

    def _is_due(self, step: int) -> bool:
        return bool(self.every) and (step == 1 or step % self.every == 0)

    def _listen(self, wanted: bool) -> None:
        """Hooks itself into the blocks and the optimizer, or out of them."""
        if wanted == self.listening:
            return
        self.listening = wanted
        self.module.watch = self._after_block if wanted else None
        if wanted:
            self.optimizer.step = self._update  # in place of its class's
        else:
            del self.optimizer.step

    def _forget(self) -> None:
        self.step_seen, layers = self.model.steps_begun, len(self.module.h)
        self.streams = [[0.0] * 3 for _ in range(layers)]
        self.gradients = [[0.0] * 3 for _ in range(layers)]
        self.hidden = [[0.0] * 2 for _ in range(layers)]  # hidden units: those switched off, all

    def _after_block(self, layer: int, x: Tensor, branch: Tensor) -> None:
        """Called by the model behind each block, which leaves x + branch: each (B, T, C)."""
        if not torch.is_grad_enabled():  # an evaluation
            return
        if self.model.steps_begun != self.step_seen:  # the one before may have been broken off
            self._forget()
        with torch.no_grad():
            _add(self.streams[layer], _moments(x + branch))
            units = self._hidden_units(layer, x)
            _add(self.hidden[layer], [(units < GELU_OFF).sum().item(), units.numel()])
        # branch is used in this sum alone, so its gradient is that of x + branch.
        branch.register_hook(partial(self._after_gradient, layer, float(self.scaler.scale)))

    def _hidden_units(self, layer: int, x: Tensor) -> Tensor:
        """What the block's GELU gets, computed once more: x is the stream that its MLP has read."""
        block: Any = self.module.h[layer]
        sharded = self.model.mode == "fsdp"
        if sharded:
            block.unshard()
        _, normed = block.ln_2.fused_add(x, None)
        units = block.mlp.c_fc(normed)  # (B, T, 4C)
        if sharded and ends_a_group(layer, len(self.module.h)):  # else the next block needs them
            block.reshard()
        return units

    def _after_gradient(self, layer: int, scale: float, gradient: Tensor) -> None:
        """gradient: of this rank's mean loss times fp16's scale; the loss is the ranks' mean."""
        count, total, squares = _moments(gradient)
        factor = 1 / (scale * self.world.size)
        _add(self.gradients[layer], [count, total * factor, squares * factor**2])

    @torch.no_grad()
    def _update(self) -> None:
        """The optimizer's step: notes the gradients and updates of the rows that this rank has."""
        all_before = [self._own_rows(shard, shard.optim_param).clone() for shard in self.matrices]
        type(self.optimizer).step(self.optimizer)
        self.updates = []
        for shard, before in zip(self.matrices, all_before, strict=True):
            gradient, now = shard.optim_param.grad, self._own_rows(shard, shard.optim_param)
            assert gradient is not None  # the optimizer has just used it
            self.updates.append([*_moments(self._own_rows(shard, gradient)), *_moments(before),
                                 *_moments(now - before)])
        self.recorded = True

    def _own_rows(self, shard: ParamShard, rows: Tensor) -> Tensor:
        """This rank's rows without the padding of the vocabulary, which is always 0."""
        if shard.name != "wte.weight":
            return rows
        return rows[: max(0, self.module.config.n_vocab - shard.optim_start)]

    def _row(self) -> dict[str, Any]:
        """All sums over all ranks, as figures. Where ranks hold copies, all are counted alike."""
        streams = self._over_ranks(self.streams)
        gradients, hidden = self._over_ranks(self.gradients), self._over_ranks(self.hidden)
        weights = {}
        for shard, sums in zip(self.matrices, self._over_ranks(self.updates), strict=True):
            gradient, data, update = _std(sums[:3]), _std(sums[3:6]), _std(sums[6:])
            weights[shard.name] = {
                "gradient_std": _figure(gradient),
                "gradient_to_data": _figure(_ratio(gradient, data)),
                "log10_update_to_data": _figure(_log10(_ratio(update, data))),
            }
        return {
            "activation_mean": [_figure(_ratio(total, count)) for count, total, _ in streams],
            "activation_std": [_figure(_std(moments)) for moments in streams],
            "gelu_off": [_figure(_ratio(off, count)) for off, count in hidden],
            "gradient_std": [_figure(_std(moments)) for moments in gradients],
            "weights": weights,
        }

    def _over_ranks(self, rows: list[Moments]) -> list[Moments]:
        width = len(rows[0])
        flat = self.world.all_reduce_sum(*[value for row in rows for value in row])
        return [flat[i : i + width] for i in range(0, len(flat), width)]


def _moments(x: Tensor) -> Moments:
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS knows no fp64
    norm = torch.linalg.vector_norm(x, dtype=wide)
    return [float(x.numel()), x.sum(dtype=wide).item(), norm.item() ** 2]


def _add(sums: Moments, more: Moments) -> None:
    for i, value in enumerate(more):
        sums[i] += value


def _std(moments: Moments) -> float:
    count, total, squares = moments
    mean = _ratio(total, count)
    return math.sqrt(max(0.0, _ratio(squares, count) - mean**2))


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _log10(x: float) -> float:
    return math.log10(x) if x > 0 else math.nan


def _figure(x: float) -> float | None:
    """To six digits; None for what JSON has no number for."""
    return float(f"{x:.6g}") if math.isfinite(x) else None
