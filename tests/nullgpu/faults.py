"""What cuda-check is there to find, planted one at a time into a run of rows.py's SMALL.

    python -m tests.nullgpu.inside small INPUTS OUT item
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

import model.gpt2
from model.parallel import ParallelModel


def in_each_step(plant: Callable[[torch.Tensor], object]) -> None:
    """Calls plant(weights that the optimizer changes) at each update."""
    real = ParallelModel.optimizer_step

    def planted(self, *args) -> None:
        plant(self.shards[0].optim_param.detach())
        real(self, *args)

    ParallelModel.optimizer_step = planted


def item() -> None:
    """A number is read from the card: the host waits for it."""
    in_each_step(lambda weights: weights.view(-1)[0].item())


def launch() -> None:
    """A launch that isn't needed."""
    in_each_step(lambda weights: torch.zeros(1, device=weights.device))


def spill() -> None:
    """A kernel of 64 numbers a thread, which gets 32 registers."""
    in_each_step(lambda weights: too_much[(1,)](weights, num_warps=1, maxnreg=32))


def graph_break() -> None:
    """torch.compile sees a block as two graphs."""
    forward = model.gpt2.Block.forward

    def broken(self, *args):
        torch._dynamo.graph_break()
        return forward(self, *args)

    model.gpt2.Block.forward = broken


@triton.jit
def too_much(pointer):
    places = pointer + tl.arange(0, 2048)
    x = tl.load(places)
    tl.store(places, x - tl.max(x))  # all are kept until the largest is known
