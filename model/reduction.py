"""Gradients that travel between ranks in bf16, half the bytes (--reduce_dtype bf16).

A rank adds up its micro-steps as ever. Then its gradient g_r, divided by the number of ranks n, is
rounded to bf16; the sums are made in bf16, so each rounds again, whoever makes it (rings of gloo
and NCCL, github.com/NVIDIA/nccl/issues/1026); and the mean is fp32 once more. An element of g_r
meets one rounding of its own and n - 1 of sums at most, each by u = 2^-8 of a number at most (bf16
has 8 significant bits), so

    |mean in bf16 - mean| <= ((1 + u)^n - 1) sum_r |g_r| / n

Of n that are no power of two fsdp divides in bf16 too: (1 + u)^(n + 2). What is rounded is sent to
all, so the ranks still have the same bits. docs/training.md says what was measured.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_in_bf16(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the mean over the group of a bucket of gradients, in its place.

    PyTorch's bf16_compress_hook refuses to run without NCCL, and rounds before and after dividing.
    """
    gradients = bucket.buffer()  # (numbers,) in the weights' dtype
    sent = torch.empty_like(gradients, dtype=torch.bfloat16)
    torch.div(gradients, dist.get_world_size(group), out=sent)  # one launch, one rounding

    def put_back(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        return gradients.copy_(done.value()[0])

    return dist.all_reduce(sent, group=group, async_op=True).get_future().then(put_back)


def reduce_scatter_in_bf16(model: Any) -> None:
    """Lets a model under FSDP2 average its gradients in bf16, also between nodes.

    MixedPrecisionPolicy's reduce_dtype would add up micro-steps in bf16 as well.
    """
    from torch.distributed.fsdp import FSDPModule  # model/parallel.py, _shard(), says why here
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

    class ReduceScatterInBf16(DefaultReduceScatter):
        """FSDP2 copies gradients into what this allocates, and what arrives out of it."""

        def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            return torch.empty(size, dtype=torch.bfloat16, device=device)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(ReduceScatterInBf16())
