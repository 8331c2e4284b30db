"""The rows that the plan's sums are made of: tensors in memory, passes over memory."""

from typing import NamedTuple


class Held(NamedTuple):
    """Tensors that are in memory at the same time."""

    what: str
    numbers: int
    itemsize: int  # bytes of one


def total(tensors: list[Held]) -> int:
    """Bytes."""
    return sum(tensor.numbers * tensor.itemsize for tensor in tensors)


class Pass(NamedTuple):
    """An operation that waits for the memory."""

    operation: str
    reads: float  # bytes of each number
    writes: float
    numbers: float  # in a micro-step
    why: str


def total_bytes(passes: list[Pass]) -> float:
    """Bytes that cross the memory bus."""
    return sum((row.reads + row.writes) * row.numbers for row in passes)
