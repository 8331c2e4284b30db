"""Where weights, gradients and AdamW's moments live when there are many ranks.

    --parallel ddp     every rank has everything; gradients are averaged (the default)
    --parallel zero1   the same, but a rank keeps the moments of its own rows only, and updates
                       only those; then all ranks gather the rows (ZeRO-1, arXiv 1910.02054)
    --parallel fsdp    a rank keeps its own rows of weights, gradients and moments; the weights
                       of two blocks are put together while they are computed (PyTorch's FSDP2)

On one rank all three are plain training. A parameter's rows (its first dimension) are cut as
torch.chunk cuts them, so who owns which row follows from the number of ranks alone.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from kernels.constants import FSDP_BLOCKS
from launch.spikes import Verdict
from launch.world import DTYPES, World, autocast
from model.config import Mode
from model.gpt2 import GPT
from model.reduction import all_reduce_in_bf16, reduce_scatter_in_bf16

BUCKET = 1 << 27  # numbers that are gathered at once: 512 MiB in fp32, all of 124M's weights


@dataclass(frozen=True)
class ParamShard:
    """What this rank holds of one parameter, what of that it updates, and what it saves.

    Of an (8, C) parameter on rank 1 of 2: under ddp local is rows 0 to 7 and so is optim_param;
    under zero1 local is rows 0 to 7 and optim_param rows 4 to 7; under fsdp both are rows 4 to 7.
    save_rows are rows 4 to 7 in all three.
    """

    name: str
    param: nn.Parameter  # as the model has it; a DTensor under fsdp
    local: Tensor  # the values on this rank: all rows, or under fsdp this rank's
    local_start: int  # the parameter's row that local[0] is
    optim_param: nn.Parameter  # the rows that the optimizer updates; shares local's memory
    optim_start: int  # the parameter's row that optim_param[0] is
    save_rows: range  # rows that this rank writes into a checkpoint


class ParallelModel:
    """A model on all ranks, as the training step calls it, whatever the mode. All ranks call it.

    module: the GPT itself. shards: this rank's share of each of its parameters. reduce_dtype: in
    which gradients travel, bf16 or the weights' own (model/reduction.py).
    """

    def __init__(
        self, module: GPT, mode: Mode, world: World, dtype: str, reduce_dtype: str = "fp32"
    ) -> None:
        self.module, self.world, self.dtype = module, world, dtype
        self.mode = mode if world.size > 1 else "ddp"
        self.forward: nn.Module = module
        self.mesh: DeviceMesh | None = None
        if self.mode == "fsdp":
            self.mesh = _mesh(world)
            _shard(module, self.mesh, dtype)
            if reduce_dtype == "bf16":
                reduce_scatter_in_bf16(module)
        elif world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            # DDP copies each gradient into its communication buckets, which stay for the whole run
            # (124M: 148 copies, 475 MiB), and leaves the averages there, with gradients as views.
            # Gradients that were kept and zeroed would be added to: as many launches, more bytes.
            self.forward = DistributedDataParallel(
                module, device_ids=ids, gradient_as_bucket_view=True
            )
            if reduce_dtype == "bf16":
                self.forward.register_comm_hook(None, all_reduce_in_bf16)
            _order_buckets(self.forward)
        self.shards = [self._shard_of(name, p) for name, p in module.named_parameters()]
        self.steps_begun = 0  # applied or not
        self.device_decides = False  # whether a step is applied: model/training.py
        self.chosen: dict[str, str] = {}  # who computes what several can: model/contest.py

    def __call__(
        self, idx: Tensor, targets: Tensor, reduction: str = "mean", order: Tensor | None = None
    ) -> Tensor:
        """The loss. (B, T) tokens and targets -> this rank's mean or sum, in nats.

        order: of the tokens, as Loader.token_orders has it.
        """
        with self.autocast():
            return self.forward(idx, targets, reduction, order)

    def autocast(self) -> AbstractContextManager:
        """Matrix products run in the compute dtype inside this context."""
        return autocast(self.world.device, self.dtype)

    @contextmanager
    def gradient_sync(self, enabled: bool) -> Iterator[None]:
        """Around forward and backward of a micro-step: whether ranks average their gradients in it.

        It has to be open during the forward pass too, for that's where DDP looks (build-nanogpt
        set its switch after it and trained on wrong gradients: validation loss 4.88, not 4.15).
        """
        if self.mode == "fsdp":
            self.module.set_requires_gradient_sync(enabled)  # type: ignore[operator]
        no_sync = isinstance(self.forward, DistributedDataParallel) and not enabled
        with self.forward.no_sync() if no_sync else nullcontext():  # type: ignore[operator]
            yield

    @torch.no_grad()
    def unscale_gradients(self, scale: Tensor | float) -> None:
        """Takes a loss scale out of the gradients."""
        if isinstance(scale, Tensor) or scale != 1:
            torch._foreach_mul_(self._local_gradients(), 1 / scale)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, a scalar on the device, the same on every rank."""
        # torch.nn.utils.get_total_norm's, which looks for devices and dtypes first: 0.2 ms a step.
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self._local_gradients())))
        if self.mesh is None:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=self.mesh.get_group("shard"))
        if "replicate" in (self.mesh.mesh_dim_names or ()):
            # Each node has added up its own copy: another order, an ulp apart, and clipped by it
            # the copies would drift from one another. Rank 0's counts.
            dist.broadcast(square, src=0)
        return square.sqrt()

    @torch.no_grad()
    def clip_gradients(self, norm: Tensor, max_norm: float) -> None:
        """Scales the gradients, whose norm this is, down to max_norm; 0 leaves them as they are.

        As torch.nn.utils.clip_grad_norm_ does.
        """
        factor = ((max_norm or math.inf) / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(self._local_gradients(), factor)

    @torch.no_grad()
    def optimizer_step(self, optimizer: Any, verdict: Verdict | None = None) -> None:
        """Updates this rank's rows; under zero1 every rank then gets the rows of the others.

        verdict: of the step, which clips the gradients or leaves the step out. A GPU does both by
        itself where `device_decides`: fused AdamW reads grad_scale and found_inf there.
        """
        if verdict and self.device_decides:
            optimizer.grad_scale, optimizer.found_inf = verdict.divisor, verdict.skip
        elif verdict:
            if verdict.skip.item():  # waits for it
                return
            self.clip_gradients(verdict.norm, verdict.clip)
        if self.mode != "ddp":  # where the optimizer has the parameters themselves
            for shard, gradient in zip(self.shards, self._local_gradients(), strict=True):
                if self.mode == "zero1":
                    first, rows = shard.optim_start, len(shard.optim_param)
                    gradient = gradient[first : first + rows]
                shard.optim_param.grad = gradient
        optimizer.step()
        if self.mode == "zero1":
            self._all_gather_rows()

    def zero_grad(self) -> None:
        """Drops the gradients until the next backward pass, with which a step begins.

        Under ddp and zero1 their memory is that of the buckets, and stays.
        """
        self.steps_begun += 1
        for shard in self.shards:
            shard.param.grad = None
        if self.mode != "ddp":  # where the optimizer has parameters of its own
            for shard in self.shards:
                shard.optim_param.grad = None

    @contextmanager
    def summon_full_params(self) -> Iterator[None]:
        """For evaluating the model: without dropout, and under fsdp every rank has all weights.

        Nothing is gathered inside, so ranks may call the model as often as they like, and any
        method of it. Takes the memory of the whole model in the compute dtype.
        """
        self.module.eval()
        modules: list[Any] = []
        if self.mode == "fsdp":
            from torch.distributed.fsdp import FSDPModule  # see _shard()

            modules = [m for m in self.module.modules() if isinstance(m, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self.module, recurse=False)
            self.module.train()

    def _local_gradients(self) -> list[Tensor]:
        """Each parameter's gradient, of the rows that are in `local`."""
        # Every parameter takes part in every loss.
        gradients: list[Any] = [shard.param.grad for shard in self.shards]
        if self.mode == "fsdp":
            return [gradient.to_local() for gradient in gradients]
        return gradients

    def gather_rows(self, shards: list[ParamShard], rows: list[Tensor]) -> list[Tensor]:
        """All rows of something that each rank has of the rows it updates, in one all-gather.

        rows: of each shard (len(optim_param), ...), of one dtype. Returns (len(param), ...) each.
        """
        if self.mode == "ddp":
            return rows  # all of them are updated here
        full = [rows[0].new_empty(shard.param.shape) for shard in shards]
        self._gather_into(full, rows)
        return full

    def _gather_into(self, full: list[Tensor], rows: list[Tensor]) -> None:
        """Fills each full[i] (all rows, ...) with rows[i] (this rank's rows, ...) of every rank.

        Rows travel packed: two launches and one all-gather, however many tensors there are. Takes
        1 + 1 / ranks times their memory for as long as it lasts.
        """
        group = self.mesh.get_group("shard") if self.mesh is not None else None
        ranks = dist.get_world_size(group)
        # Every rank sends ceil(rows / ranks) rows of each; the last ranks have fewer, and what they
        # send in place of the rest is thrown away.
        share = [-(-len(x) // ranks) for x in full]
        each = [n * math.prod(x.shape[1:]) for n, x in zip(share, full, strict=True)]
        sent = rows[0].new_empty(sum(each))
        parts = zip(sent.split(each), rows, strict=True)
        torch._foreach_copy_([part[: own.numel()].view_as(own) for part, own in parts], rows)
        gathered = sent.new_empty(ranks * len(sent))
        dist.all_gather_into_tensor(gathered, sent, group=group)
        # Rows that the ranks share out evenly arrive in their place, others beside it.
        arrived, uneven = [], []
        for x, n in zip(full, share, strict=True):
            place = x
            if len(x) < ranks * n:
                place = x.new_empty(ranks * n, *x.shape[1:])
                uneven.append((x, place))
            arrived.append(place.view(ranks, -1))  # (ranks, n * columns)
        gathered = gathered.view(ranks, -1)  # (ranks, all of that side by side)
        torch.split_with_sizes_copy(gathered, each, dim=1, out=arrived)
        for x, place in uneven:
            x.copy_(place[: len(x)])

    def share_out(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """function(batch), where it treats the entries of its first dimension alike: each rank
        does its share of them, and gets the results of the others. All ranks have the batch."""
        if self.world.size == 1:
            return function(batch)
        group = self.mesh.get_group("shard") if self.mesh is not None else None
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        share = -(-len(batch) // ranks)
        own = batch[rank * share : (rank + 1) * share]
        sent = batch.new_zeros(share, *batch.shape[1:])
        if len(own):
            sent[: len(own)] = function(own)
        done = batch.new_empty(ranks * share, *batch.shape[1:])
        dist.all_gather_into_tensor(done, sent, group=group)
        return done[: len(batch)]

    def _all_gather_rows(self) -> None:
        """Every rank gets the rows of each parameter that the others have updated."""
        for shards in buckets(self.shards):
            self._gather_into([shard.local for shard in shards],
                              [shard.optim_param.detach() for shard in shards])

    def _shard_of(self, name: str, param: nn.Parameter) -> ParamShard:
        """Who holds, updates and saves which rows."""
        if self.mesh is not None:
            local = param.detach().to_local()  # type: ignore[attr-defined]
            rank, ranks = self.mesh.get_local_rank("shard"), self.mesh["shard"].size()
            rows = rows_of(len(param), rank, ranks)
            replicated = "replicate" in (self.mesh.mesh_dim_names or ())
            saves = not replicated or self.mesh.get_local_rank("replicate") == 0
            return ParamShard(
                name, param, local, rows.start, nn.Parameter(local), rows.start,
                save_rows=rows if saves else range(0),
            )
        rows = rows_of(len(param), self.world.rank, self.world.size)
        local = param.detach()
        if self.mode == "zero1":
            optim_param = nn.Parameter(local[rows.start : rows.stop])
            return ParamShard(name, param, local, 0, optim_param, rows.start, save_rows=rows)
        return ParamShard(name, param, local, 0, param, 0, save_rows=rows)


def buckets(shards: list[ParamShard]) -> Iterator[list[ParamShard]]:
    """The shards in their order, so many at once that their parameters fit into BUCKET numbers."""
    bucket: list[ParamShard] = []
    size = 0
    for shard in shards:
        if bucket and size + shard.param.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(shard)
        size += shard.param.numel()
    if bucket:
        yield bucket


def rows_of(count: int, rank: int, ranks: int) -> range:
    """The rows out of `count` that a rank owns: ceil(count / ranks) each, the last ranks fewer."""
    chunk = -(-count // ranks)
    return range(min(rank * chunk, count), min((rank + 1) * chunk, count))


def _order_buckets(ddp: DistributedDataParallel) -> None:
    """Lets DDP lay out its buckets for good before the first step: by a backward pass that gives 0
    to all parameters, last ones first, about as a real one does.

    After its first backward pass DDP lays them out anew, and where a gradient lies decides in which
    order three ranks and more add it up: a run that goes on would repeat the first step's order
    where the run that never stopped has the other one, and be a rounding off from there on.
    """
    module = ddp.module
    module.forward = lambda zero: sum(p.sum() * zero for p in module.parameters())
    ddp(0.0).backward()  # on a GPU DDP wants an argument
    del module.forward  # the class's again
    module.zero_grad(set_to_none=True)


def ends_a_group(layer: int, n_layer: int) -> bool:
    """Whether this block is the last of those whose weights fsdp puts together at once."""
    return (layer + 1) % FSDP_BLOCKS == 0 or layer + 1 == n_layer


def _mesh(world: World) -> DeviceMesh:
    """All ranks as one group, or on several nodes: rows inside a node, copies across nodes.

    Weights are put together for every few blocks, and links inside a node are many times as fast.
    Nodes of different sizes can't hold copies of one another, and become one group.
    """
    kind, local = world.device.type, int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    sizes = sorted(set(world.all_gather(local)))
    if len(sizes) > 1:
        world.print0(f"nodes of {' and '.join(map(str, sizes))} ranks: fsdp shares weights out "
                     "over all of them, also between nodes, which is slower")
    elif 1 < local < world.size and world.size % local == 0:
        names = ("replicate", "shard")
        return init_device_mesh(kind, (world.size // local, local), mesh_dim_names=names)
    return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))


def _shard(model: GPT, mesh: DeviceMesh, dtype: str) -> None:
    """FSDP2, some blocks at a time: they travel in the compute dtype, gradients are added up in
    fp32.

    Embeddings, head and last LayerNorm travel in fp32, so that the residual stream is fp32 as it
    is without sharding.
    """
    # Here, for it brings DTensor and SymPy: a second, which every sample would wait for.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = dtype in ("bf16", "fp16")
    blocks = MixedPrecisionPolicy(
        param_dtype=DTYPES[dtype] if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    # It warns of changing a block's output in place, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for first in range(0, len(model.h), FSDP_BLOCKS):
        together: list[nn.Module] = [*model.h[first : first + FSDP_BLOCKS]]
        fully_shard(together, mesh=mesh, mp_policy=blocks)
    fully_shard(
        model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
        reshard_after_forward=False,  # they are needed again at once, by the backward pass
    )
