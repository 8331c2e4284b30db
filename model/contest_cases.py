"""What a run's implementations are compared on: a block and the loss, at the run's own shape.

    case = LossCase(shape, 64, torch.bfloat16, device)
    runs = case.runs({"compiled": compiled_loss})     # each computes it, with its gradients
    case.fault(runs["compiled"]())                    # "" or "dh is off by 3.1e-01"

For kernels/race.py; kernels/candidates.py has attention's.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import operators
from kernels.constants import IGNORE
from kernels.operators import Operators
from kernels.passes import Passes
from kernels.race import Run
from model.config import GPTConfig
from model.fused_block import (
    LIMITS,
    FusedBlock,
    copy_weights,
    outputs_and_gradients,
    random_block,
)
from model.gpt2 import Block
from model.speedrun import SOFTCAP

BY_HAND, COMPILED = "by hand", "compiled"


class BlockCase:
    """A block at a run's own shape, by hand and compiled: for kernels/race.py.

    The gradients of its outputs are 0 but for the first and the last sequence, so that all others
    add nothing to those of weights, and fp64 can say of these two alone what is right.
    """

    def __init__(
        self, config: GPTConfig, ops: Operators, passes: Passes, B: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.ops, self.passes, self.B = config, ops, passes, B
        self.dtype, self.device = dtype, device
        self.ends = sorted({0, B - 1})

    @functools.cached_property
    def inputs(self) -> Tensor:
        """x, branch and the gradients of both outputs, (4, B, T, C)."""
        generator = torch.Generator(self.device).manual_seed(0)
        inputs = torch.randn(4, self.B, self.config.n_ctx, self.config.n_embd,
                             generator=generator, device=self.device)
        inputs[1] = inputs[1].to(self.dtype)  # as a run has it, and fp64 the same
        inputs[2:, 1 : self.B - 1] = 0
        return inputs

    @functools.cached_property
    def exact(self) -> dict[str, Tensor]:
        """The ends' outputs and gradients, and the weights' gradients, in fp64."""
        block = random_block(self.config, operators.TORCH).to(self.device).double()
        return outputs_and_gradients(block, self.inputs[:, self.ends].double(), None)

    def runs(self, names: list[str]) -> dict[str, Run]:
        """Forward and backward, by each of these."""
        make = {BY_HAND: self._by_hand, COMPILED: self._compiled}

        def run(block: Callable[[], Block]) -> tuple[Tensor, ...]:
            return tuple(outputs_and_gradients(block(), self.inputs, self.dtype).values())

        return {name: functools.partial(run, functools.cache(make[name])) for name in names}

    def _by_hand(self) -> Block:
        block = random_block(self.config, self.ops).to(self.device)
        block.fused = FusedBlock(block, self.passes)
        with torch.autocast(self.device.type, self.dtype):
            copy_weights([block.fused])
        return block

    def _compiled(self) -> Block:
        """Raises RuntimeError where the activations of a whole model of these would leave less than
        half of the card for all else: by hand fewer are kept, and --micro_batch may rely on it."""
        block = random_block(self.config, self.ops).to(self.device)
        block.compile()
        if self.device.type == "cuda":
            x = self.inputs[0].clone().requires_grad_()
            branch = self.inputs[1].to(self.dtype).requires_grad_()  # else it compiles once more
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", self.dtype):
                outputs = block(x, branch)
            kept = self.config.n_layer * (torch.cuda.memory_allocated() - before)
            del outputs
            require_room(kept, torch.cuda.get_device_properties(self.device).total_memory)
        return block

    def fault(self, got: tuple[Tensor, ...]) -> str:
        """What is wrong with a run's tensors, "" for nothing."""
        for (what, right), tensor in zip(self.exact.items(), got, strict=True):
            if what in ("dx", "dbranch", "stream", "branch"):
                tensor = tensor[self.ends]
            if found := _too_far_off(what, tensor, right, LIMITS[self.dtype]):
                return found
        return ""


def require_room(kept: int, memory: int) -> None:
    """Raises RuntimeError where activations take more than half of a card. Both in bytes."""
    if kept > memory / 2:
        raise RuntimeError(f"all blocks would keep {kept / 2**30:.0f} GiB of the card's "
                           f"{memory / 2**30:.0f}")


class LossCase:
    """The loss at a run's own shape, with the head's products and gradients: for kernels/race.py.

    Only the first and the last tokens have targets. All others are computed like them, and add
    nothing, so that fp64 can say of these alone what is right.
    """

    ENDS = 128  # tokens with targets at each end
    # Of the sum of their losses, three times what rounding the logits to bf16 makes of it (1.6e-5
    # at most, of 40 shapes). Padding that takes probability makes 8.6e-5 of GPT-2's, and a sum that
    # is itself in bf16 up to 2^-9.
    LIMIT = 5e-5

    def __init__(
        self, config: GPTConfig, B: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.B, self.dtype, self.device = config, B, dtype, device
        self.softcap = SOFTCAP if config.arch == "speedrun" else 0.0

    @functools.cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """h (N, C), the head's weight (Vp, C), targets (N,)."""
        config, N = self.config, self.B * self.config.n_ctx
        generator = torch.Generator(self.device).manual_seed(0)
        numbers = functools.partial(torch.randn, generator=generator, device=self.device)
        h = numbers(N, config.n_embd).to(self.dtype).requires_grad_()
        weight = numbers(config.padded_vocab, config.n_embd).mul_(0.05).requires_grad_()
        targets = torch.randint(config.n_vocab, (N,), generator=generator, device=self.device)
        targets[self.ENDS : N - self.ENDS] = IGNORE
        return h, weight, targets

    @functools.cached_property
    def exact(self) -> dict[str, Tensor]:
        """What the tokens with targets have in fp64. Weights as the products see them."""
        h, weight, targets = self.inputs
        seen = targets != IGNORE
        h = h.detach()[seen].double().requires_grad_()
        weight = weight.detach().to(self.dtype).double().requires_grad_()
        loss = operators.TORCH.linear_cross_entropy(
            h, weight, targets[seen], self.config.n_vocab, "sum", self.softcap)
        dh, dweight = torch.autograd.grad(loss, (h, weight))
        return {"loss": loss.detach(), "dh": dh, "dweight": dweight}

    def runs(self, losses: dict[str, Callable]) -> dict[str, Run]:
        """Forward and backward, by what each of these makes."""
        def run(make: Callable) -> tuple[Tensor, ...]:
            h, weight, targets = self.inputs
            with torch.autocast(self.device.type, self.dtype):
                loss = make()(h, weight, targets, self.config.n_vocab, "sum", self.softcap)
            return loss.detach(), *torch.autograd.grad(loss, (h, weight))

        return {name: functools.partial(run, make) for name, make in losses.items()}

    def fault(self, got: tuple[Tensor, ...]) -> str:
        """What is wrong with a run's tensors, "" for nothing."""
        loss, dh, dweight = got
        seen = self.inputs[2] != IGNORE
        limits = (self.LIMIT, LIMITS[self.dtype], LIMITS[self.dtype])
        for (what, right), tensor, limit in zip(
                self.exact.items(), (loss, dh[seen], dweight), limits, strict=True):
            if found := _too_far_off(what, tensor, right, limit):
                return found
        if dh[~seen].any():
            return "tokens without a target have gradients"
        return "padding has gradients" if dweight[self.config.n_vocab :].any() else ""


def _too_far_off(what: str, tensor: Tensor, right: Tensor, limit: float) -> str:
    """Says how far the tensor is off, "" where that is within the limit."""
    right = right.cpu()
    off = ((tensor.cpu().double() - right).norm() / right.norm()).item()
    return "" if off <= limit else f"{what} is off by {off:.1e}"  # NaN too
