"""What this machine can do at most, measured in the same run: matrix products, and memory reads."""

import torch

from launch.world import DTYPES
from tests.bench.pairs import Done, Work


def products(M: int, K: int, N: int, dtype: str, flops_per_unit: float) -> Work:
    """Matrix products of a network's own shape, (M, K) x (K, N), counted in units of work that
    need so many FLOPs each."""
    x = torch.randn(M, K).to(DTYPES[dtype])
    w = torch.randn(N, K).to(DTYPES[dtype])
    repeats = 1 + int(2e10 / (2 * M * K * N))  # a few tenths of a second

    def work() -> Done:
        for _ in range(repeats):
            torch.nn.functional.linear(x, w)
        return Done(repeats * 2 * M * K * N / flops_per_unit)

    return work


def reads(bytes_per_unit: float) -> Work:
    """A sum over memory that no cache holds, counted in units of work that read so many bytes."""
    numbers = torch.ones(2**27)  # 512 MiB

    def work() -> Done:
        numbers.sum()
        return Done(numbers.numel() * numbers.element_size() / bytes_per_unit)

    return work
