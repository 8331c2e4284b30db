"""Where weights, gradients and AdamW's moments live when there are many ranks.

    --parallel ddp     every rank has everything; gradients are averaged (the default)
    --parallel zero1   the same, but a rank keeps the moments of its own rows only, and updates
                       only those; then all ranks exchange their rows (ZeRO-1, arXiv 1910.02054)
    --parallel fsdp    a rank keeps its own rows of weights, gradients and moments; a block's
                       weights are put together while it is computed (PyTorch's FSDP2)

On one rank all three are plain training. A parameter's rows (its first dimension) are cut as
torch.chunk cuts them, so who owns which row follows from the number of ranks alone.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from launch.world import DTYPES, World
from model.gpt2 import GPT

Mode = Literal["ddp", "zero1", "fsdp"]


@dataclass(frozen=True)
class Part:
    """What this rank holds of one parameter, what of that it updates, and what it saves."""

    name: str
    parameter: nn.Parameter  # as the model has it; a DTensor under fsdp
    held: Tensor  # the values here: all rows, or under fsdp this rank's
    held_from: int  # the parameter's row that held[0] is
    mine: nn.Parameter  # rows that the optimizer updates; shares held's memory
    mine_from: int  # the parameter's row that mine[0] is
    saved: range  # rows that this rank writes into a checkpoint


class Parallel:
    """A model on all ranks: what the training step calls, whatever the mode."""

    def __init__(self, model: GPT, mode: Mode, world: World, dtype: str) -> None:
        self.model, self.world = model, world
        self.mode = mode if world.size > 1 else "ddp"
        self.forward: nn.Module = model
        self.mesh: DeviceMesh | None = None
        if self.mode == "fsdp":
            self.mesh = _mesh(world)
            _shard(model, self.mesh, dtype)
        elif world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            # Gradients live inside the communication buckets: no copy, no second set of them.
            self.forward = DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True
            )
        self.parts = [self._part(name, p) for name, p in model.named_parameters()]

    def __call__(self, idx: Tensor, targets: Tensor) -> Tensor:
        """(B, T) tokens and targets -> this rank's mean loss."""
        return self.forward(idx, targets)

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around forward and backward: ranks average their gradients only in the `last` one.

        It has to be open during the forward pass too, for that's where DDP looks (build-nanogpt
        set its switch after it and trained on wrong gradients: validation loss 4.88, not 4.15).
        """
        if self.mode == "fsdp":
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        wait = isinstance(self.forward, DistributedDataParallel) and not last
        with self.forward.no_sync() if wait else nullcontext():  # type: ignore[operator]
            yield

    @torch.no_grad()
    def gradient_norm(self, scale: float) -> Tensor:
        """Takes a loss scale out of the gradient and returns its norm, the same on every rank.

        It hands `mine` its gradients, too.
        """
        here = []
        for part in self.parts:
            gradient = part.parameter.grad
            assert gradient is not None  # every parameter takes part in every loss
            if self.mode == "fsdp":
                gradient = part.mine.grad = gradient.to_local()  # type: ignore[attr-defined]
            elif self.mode == "zero1":
                part.mine.grad = gradient[part.mine_from :][: len(part.mine)]
            here.append(gradient)
        if scale != 1:
            torch._foreach_mul_(here, 1 / scale)
        norm = get_total_norm(here)
        if self.mesh is None:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=self.mesh.get_group("shard"))
        return square.sqrt()

    @torch.no_grad()
    def scale_gradients(self, factor: Tensor) -> None:
        """Multiplies the gradients that the optimizer will read."""
        torch._foreach_mul_([p.mine.grad for p in self.parts if p.mine.grad is not None], factor)

    @torch.no_grad()
    def exchange(self) -> None:
        """After an update: under zero1 every rank gets the rows that the others have updated."""
        if self.mode != "zero1":
            return
        ranks = self.world.size
        for part in self.parts:
            rows, chunk = len(part.held), -(-len(part.held) // ranks)
            given = part.held.new_zeros(chunk, *part.held.shape[1:])
            given[: len(part.mine)] = part.mine
            everyones = given.new_empty(ranks * chunk, *part.held.shape[1:])
            dist.all_gather_into_tensor(everyones, given)
            part.held.copy_(everyones[:rows])

    def forget_gradients(self) -> None:
        """Frees them until the next backward pass."""
        for part in self.parts:
            part.parameter.grad = part.mine.grad = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """For judging the model: under fsdp every rank has all weights meanwhile.

        Nothing is exchanged inside, so ranks may call the model as often as they like, and any
        method of it. Takes the memory of the whole model in the compute dtype.
        """
        modules = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self.model, recurse=False)

    def _part(self, name: str, parameter: nn.Parameter) -> Part:
        """Who holds, updates and saves which rows."""
        if self.mesh is not None:
            local = parameter.detach().to_local()  # type: ignore[attr-defined]
            rank, ranks = self.mesh.get_local_rank("shard"), self.mesh["shard"].size()
            rows = rows_of(len(parameter), rank, ranks)
            copies = "replicate" in (self.mesh.mesh_dim_names or ())
            saves = not copies or self.mesh.get_local_rank("replicate") == 0
            saved = rows if saves else range(0)
            return Part(
                name, parameter, local, rows.start, nn.Parameter(local), rows.start, saved
            )
        rows = rows_of(len(parameter), self.world.rank, self.world.size)
        held = parameter.detach()
        if self.mode == "zero1":
            mine = nn.Parameter(held[rows.start : rows.stop])
            return Part(name, parameter, held, 0, mine, rows.start, rows)
        return Part(name, parameter, held, 0, parameter, 0, rows)


def rows_of(count: int, rank: int, ranks: int) -> range:
    """The rows out of `count` that a rank owns: ceil(count / ranks) each, the last ranks fewer."""
    chunk = -(-count // ranks)
    return range(min(rank * chunk, count), min((rank + 1) * chunk, count))


def _mesh(world: World) -> DeviceMesh:
    """All ranks as one group, or on several nodes: rows inside a node, copies across nodes.

    Weights are put together for every block, and links inside a node are many times as fast.
    """
    kind, local = world.device.type, int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if 1 < local < world.size and world.size % local == 0:
        names = ("replicate", "shard")
        return init_device_mesh(kind, (world.size // local, local), mesh_dim_names=names)
    return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))


def _shard(model: GPT, mesh: DeviceMesh, dtype: str) -> None:
    """FSDP2, block by block: blocks travel in the compute dtype, gradients are added up in fp32.

    Embeddings, head and last LayerNorm travel in fp32, so that the residual stream is fp32 as it
    is without sharding.
    """
    half = dtype in ("bf16", "fp16")
    blocks = MixedPrecisionPolicy(
        param_dtype=DTYPES[dtype] if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    # It warns of changing a block's output in place, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=blocks)
    fully_shard(
        model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
        reshard_after_forward=False,  # they are needed again at once, by the backward pass
    )
