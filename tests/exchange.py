"""What zero1 does after the optimizer's step, counted on real ranks, and what each rank has then.

    torchrun --standalone --nproc_per_node=2 -m tests.exchange

Rank 0 prints one line of JSON: of each model the operators that compute, copy or send something,
and whether all rows are on every rank, bit for bit, as the rank that updated them has them.
"""

import json

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch.errors import run_command
from launch.world import World, init_distributed
from model import parallel
from model.gpt2 import GPT, GPTConfig
from model.optim import OptimConfig, configure_optimizers

# 15 and 1 rows can't be shared out evenly; of 1 row the last rank has none.
MODELS = {
    "even": GPTConfig(n_layer=12, n_head=2, n_embd=32, n_ctx=16),
    "uneven": GPTConfig(n_layer=2, n_head=3, n_embd=15, n_ctx=17),
    "one row": GPTConfig(n_layer=1, n_head=1, n_embd=1, n_ctx=1),
}


class Counted(TorchDispatchMode):
    """Keeps the names of the operators that do more than look at a tensor or allocate one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function.overloadpacket)
        if name.startswith(("aten", "c10d")) and not function.is_view and "empty" not in name:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def step(config: GPTConfig, world: World) -> dict:
    """One step of the optimizer on gradients of ones."""
    torch.manual_seed(0)
    model = parallel.ParallelModel(GPT(config), "zero1", world, "fp32")
    optimizer = configure_optimizers(model, OptimConfig())
    for shard in model.shards:
        shard.param.grad = torch.ones_like(shard.param)
    before = [shard.param.detach().clone() for shard in model.shards]
    counted = Counted()
    optimizer.step = lambda: (type(optimizer).step(optimizer), counted.names.clear())
    with counted:
        model.optimizer_step(optimizer)
    updated = world.all_gather([shard.optim_param.detach().clone() for shard in model.shards])
    whole = [torch.cat(rows) for rows in zip(*updated, strict=True)]
    params = [shard.param.detach() for shard in model.shards]
    every = list(zip(params, whole, before, strict=True))
    equal = [torch.equal(param, rows) for param, rows, _ in every]
    moved = [bool((param != old).all()) for param, _, old in every]
    return {
        "operators": counted.names,
        "equal": all(all(equal) for equal in world.all_gather(equal)),
        "moved": all(moved),
    }


def main() -> None:
    torch.set_num_threads(1)
    with init_distributed() as world:
        found = {name: step(config, world) for name, config in MODELS.items()}
        parallel.BUCKET = 1000
        found["small buckets"] = step(MODELS["uneven"], world)
        world.print0(json.dumps(found))


if __name__ == "__main__":
    run_command(main)  # a rank whose interpreter is taken down may be aborted there
