"""The process group of ranks of which only this one is there: it writes down every collective
operation, and answers as if all ranks were like this one.

What lies on the device is left alone, for the device computes nothing; what lies on the host (the
objects that ranks exchange while a run starts) is copied.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future

BACKEND = "counted"


def size_of(tensors: Any) -> int:
    """Bytes of a tensor, or of a list of them, or of lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(size_of(tensor) for tensor in tensors)


def finished(tensors: Any) -> Any:
    """The work of an operation that is done."""
    future: Any = torch.futures.Future()
    future.set_result(tensors)
    return _create_work_from_future(future)


class CountedGroup(dist.ProcessGroup):
    """All ranks, as the one that is there sees them. Bytes are those of a rank's whole result, or
    of what it brings where that is more."""

    def __init__(self, rank: int, ranks: int, mark: Callable[[str], None]) -> None:
        super().__init__(rank, ranks)
        self.ranks, self.mark = ranks, mark

    def note(self, operation: str, tensors: Any) -> None:
        self.mark(f"collective {operation} {size_of(tensors)}")

    def allreduce(self, tensors, options=None):
        self.note("all_reduce", tensors)
        return finished(tensors)

    def broadcast(self, tensors, options=None):
        self.note("broadcast", tensors)
        return finished(tensors)

    def allgather(self, outputs, inputs, options=None):
        self.note("all_gather", outputs)
        for output, given in zip(outputs, inputs, strict=True):
            for place in output:
                place.copy_(given)
        return finished(outputs)

    def all_gather_single(self, output, given, options=None):
        self.note("all_gather", output)
        return finished([output])

    def reduce_scatter_single(self, output, given, options=None):
        self.note("reduce_scatter", given)
        return finished([output])

    def barrier(self, options=None):
        self.mark("collective barrier 0")
        return finished([])

    _allgather_base = all_gather_single  # the names before torch 2.14
    _reduce_scatter_base = reduce_scatter_single

    def getBackendName(self):
        return BACKEND

    @property
    def pg_name(self):
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self):
        return self.pg_name


def use_counted_group(mark: Callable[[str], None]) -> None:
    """Lets init_process_group make such a group, whatever backend it is asked for."""
    def create(store, rank, ranks, timeout):
        return CountedGroup(rank, ranks, mark)

    dist.Backend.register_backend(BACKEND, create, devices=["cpu", "cuda"])
    initialise = dist.init_process_group

    def init_process_group(*backend: str, timeout=None, device_id=None) -> None:
        initialise(BACKEND, rank=int(os.environ["RANK"]),
                   world_size=int(os.environ["WORLD_SIZE"]), store=dist.HashStore())

    dist.init_process_group = init_process_group
