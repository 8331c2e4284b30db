"""What --reduce_dtype bf16 makes of a gradient, on real ranks: demo's network in fp32.

    torchrun --standalone --nproc_per_node=4 -m tests.reduced          # the embedded corpus
    torchrun --standalone --nproc_per_node=4 -m tests.reduced TEXT

Rank 0 prints a line of JSON for each mode, held to the mean, in fp64, of what the ranks have alone:

    error        of the whole gradient, Frobenius, relative to it
    of_bound     the largest of an element, as a share of model/reduction.py's bound
    same_bits    whether all ranks have the same
    rounded      whether every number of it is one of bf16
    bytes        of gradients that a rank gives to collectives, and of the same in fp32

PRETEND_LOCAL_WORLD_SIZE=N: the ranks are told that a node has N of them.
"""

import json
import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data.config import DataConfig
from data.dataset import open_data
from data.loader import Loader
from data.stream import Stream
from launch.errors import run_command
from launch.world import World, init_distributed
from model.network import new_network
from model.parallel import ParallelModel
from train_gpt2 import PRESETS

SHAPE = replace(PRESETS["demo"].model, n_ctx=32)
MICRO_STEPS = 3
ROUNDOFF = 2.0**-8  # u there: bf16 has 8 significant bits
SENDS = ("c10d.allreduce_", "c10d._reduce_scatter_base_", "c10d.reduce_scatter_single_")
FP32 = 2.0**-20  # bound of the sums and quotients that are made in fp32, relative to sum |g_r| / n


class Sent(TorchDispatchMode):
    """Counts the bytes that collectives take."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function.overloadpacket)
        if name in SENDS:
            given = args[1] if "scatter" in name else args[0][0]
            self.size += given.nbytes
        return function(*args, **(kwargs or {}))


def gradients(
    model: ParallelModel, world: World, text: Stream
) -> tuple[dict[str, Tensor], int]:
    """Of this rank's micro-steps: averaged, whole, by name; and the bytes that were sent for it."""
    T = SHAPE.n_ctx
    loader = Loader(text, T=T, batch_tokens=T * MICRO_STEPS * world.size, micro_batch=1, seed=0,
                    rank=world.rank, ranks=world.size)
    model.zero_grad()
    with Sent() as sent:
        for i, tokens in enumerate(loader.get_batch(0)):
            inputs, targets = loader.inputs_and_targets(tokens)
            with model.gradient_sync(i == MICRO_STEPS - 1):
                model(inputs, targets).backward()
    loader.close()
    found = {}
    for shard in model.shards:
        gradient = shard.param.grad
        if model.mode == "fsdp":
            gradient = gradient.full_tensor()
        found[shard.name] = gradient.clone()
    return found, sent.size


def new_model(world: World, mode: str, reduce_dtype: str = "fp32") -> ParallelModel:
    torch.manual_seed(0)
    return ParallelModel(new_network(SHAPE), mode, world, "fp32", reduce_dtype)


def measure(world: World, text: Stream, mode: str, alone: dict[str, list[Tensor]]) -> dict:
    """What the file's head names. alone: every rank's own gradients, by name."""
    _, whole = gradients(new_model(world, mode), world, text)
    found, half = gradients(new_model(world, mode, "bf16"), world, text)
    roundings = world.size
    if mode == "fsdp" and world.size & (world.size - 1):  # no power of two
        roundings += 2
    bound = (1 + ROUNDOFF) ** roundings - 1 + FP32
    error = norm = of_bound = 0.0
    for name, own in alone.items():
        every = torch.stack(own).double()  # (ranks, ...)
        off = found[name].double() - every.mean(0)
        error += off.square().sum().item()
        norm += every.mean(0).square().sum().item()
        limit = bound * every.abs().mean(0)
        of_bound = max(of_bound, (off.abs() / limit).nan_to_num().max().item())  # 0 / 0: padding
    together = torch.cat([gradient.flatten() for gradient in found.values()])
    first = together.clone()
    dist.broadcast(first, src=0)
    same = world.all_gather(torch.equal(first, together))
    rounded = torch.equal(together, together.bfloat16().float())
    return {"mode": mode, "ranks": world.size, "error": (error / norm) ** 0.5,
            "of_bound": of_bound, "same_bits": all(same), "rounded": rounded,
            "bytes": [half, whole]}


def main() -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = os.environ.get(
        "PRETEND_LOCAL_WORLD_SIZE", os.environ["LOCAL_WORLD_SIZE"])
    with init_distributed() as world:
        text = open_data(DataConfig(dir="", text="".join(sys.argv[1:]))).train
        own, _ = gradients(new_model(World(0, 1, world.device), "ddp"), world, text)
        alone = {name: world.all_gather(gradient) for name, gradient in own.items()}
        for mode in ("ddp", "zero1", "fsdp"):
            world.print0(json.dumps(measure(world, text, mode, alone)))


if __name__ == "__main__":
    run_command(main)  # a rank whose interpreter is taken down may be aborted there
