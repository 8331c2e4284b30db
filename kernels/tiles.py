"""Which tile each kernel runs with on each architecture: a table, not an autotuner.

The first tile of a row is the one that ships; the others are what `python -m kernels.bench --tune`
tries against it on a GPU, printing rows for this table. `python -m kernels.audit` compiles what
ships (with `--candidates` the others too) and fails where it spills, or outgrows the card. What
decided between them is that audit (instructions, registers, CTAs per SM) and the clock of one card,
an H200 (torch 2.11, Triton 3.6; docs/decisions.md): sm_90's rows of attention and of the loss are
in its order but for what is equally fast, and GELU, sums of columns, embeddings and LayerNorm's
backward pass go by it on every architecture, for want of another. A run in bf16 or fp16 times
attention's tiles at its own shape before it begins, unless it was told --kernels triton, and keeps
the fastest in its config.json (model/contest.py); nothing else is searched at run time.
"""

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator
from typing import NamedTuple

import torch

from kernels import cards

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

PROGRAMS_PER_SM = 4  # layer_norm_backward: enough warps to hide loads, and 3 MB of partial sums


Key = tuple[str, str, int]  # of a row of the table: kernel, architecture, size


class Tile(NamedTuple):
    """M rows by N columns, the warps that share it, and the depth of the load pipeline."""

    m: int  # queries (attention), tokens (qk_norm_rotary), rows (layer_norm, cross_entropy)
    n: int  # keys (attention), columns taken at once
    warps: int
    stages: int = 1
    tma: bool = False  # through tensor descriptors: one instruction a tile, sm_90 and later
    delayed: bool = False  # attention_forward, M = N: p v during the next keys' softmax

    def __str__(self) -> str:
        name = f"{self.m}x{self.n} w{self.warps} s{self.stages}"
        return name + " tma" * self.tma + " delayed" * self.delayed


ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
EVERY = " ".join(ARCHS)

# (kernel, architectures, head width) -> tiles.
_ATTENTION = {
    ("attention_forward", "sm_80", 64): (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
    ("attention_forward", "sm_80", 128): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
    ("attention_forward", "sm_86 sm_89", 64): (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
    ("attention_forward", "sm_86 sm_89", 128): (Tile(64, 32, 4, 2), Tile(128, 64, 8, 2)),
    ("attention_forward", "sm_90", 64): (
        Tile(64, 64, 4, 2, True),
        Tile(64, 64, 4, 3, True),
        Tile(128, 64, 4, 3, True),
        Tile(64, 64, 4, 2, True, True),
    ),
    ("attention_forward", "sm_90", 128): (
        Tile(64, 32, 4, 3, True),
        Tile(64, 64, 4, 3, True),
        Tile(64, 64, 4, 2, True, True),
        Tile(128, 128, 8, 2, True),
    ),
    ("attention_forward", "sm_100", 64): (Tile(128, 64, 4, 2, True), Tile(128, 64, 8, 2, True)),
    ("attention_forward", "sm_100", 128): (Tile(128, 64, 8, 2, True), Tile(64, 64, 4, 2, True)),
    ("attention_forward", "sm_120", 64): (Tile(64, 64, 4, 2, True), Tile(64, 64, 4, 2)),
    ("attention_forward", "sm_120", 128): (Tile(64, 32, 4, 2), Tile(128, 64, 8, 2)),
    ("attention_forward", "gfx942", 64): (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1)),
    ("attention_forward", "gfx942", 128): (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1)),
    ("attention_dq", "sm_80", 64): (Tile(64, 32, 4, 2), Tile(128, 64, 8, 2)),
    ("attention_dq", "sm_80", 128): (Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)),
    ("attention_dq", "sm_86 sm_89", 64): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
    ("attention_dq", "sm_86 sm_89", 128): (Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)),
    ("attention_dq", "sm_90", 64): (Tile(64, 32, 4, 3, True), Tile(64, 64, 4, 2, True)),
    ("attention_dq", "sm_90", 128): (Tile(64, 32, 4, 2, True), Tile(64, 64, 4, 2, True)),
    ("attention_dq", "sm_100", 64): (Tile(128, 64, 4, 2, True), Tile(128, 64, 8, 2, True)),
    ("attention_dq", "sm_100", 128): (Tile(128, 32, 8, 2, True), Tile(64, 32, 4, 2, True)),
    ("attention_dq", "sm_120", 64): (Tile(64, 32, 4, 2, True), Tile(64, 64, 4, 2)),
    ("attention_dq", "sm_120", 128): (Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)),
    ("attention_dq", "gfx942", 64): (Tile(64, 64, 4, 1), Tile(128, 64, 4, 1)),
    ("attention_dq", "gfx942", 128): (Tile(64, 32, 4, 1), Tile(64, 64, 4, 1)),
    ("attention_dkdv", "sm_80", 64): (Tile(32, 64, 4, 2), Tile(32, 128, 8, 2)),
    ("attention_dkdv", "sm_80", 128): (Tile(32, 32, 4, 2), Tile(32, 64, 4, 2)),
    ("attention_dkdv", "sm_86 sm_89", 64): (Tile(32, 64, 4, 2), Tile(32, 128, 8, 2)),
    ("attention_dkdv", "sm_86 sm_89", 128): (Tile(32, 32, 4, 2), Tile(64, 64, 8, 2)),
    ("attention_dkdv", "sm_90", 64): (
        Tile(32, 128, 4, 3, True),
        Tile(32, 64, 4, 3, True),
        Tile(64, 64, 4, 2, True),
    ),
    ("attention_dkdv", "sm_90", 128): (Tile(64, 64, 4, 2, True), Tile(32, 64, 4, 3, True)),
    # The second: 111 us of loops for 140 (audit's floor, GPT-2 124M), but one CTA of 210 registers.
    ("attention_dkdv", "sm_100", 64): (Tile(64, 64, 4, 2, True), Tile(64, 128, 4, 2, True)),
    ("attention_dkdv", "sm_100", 128): (Tile(32, 64, 4, 2, True), Tile(64, 64, 4, 2, True)),
    # Without TMA: 255 registers and 14 spills, since tiles go through the heads in groups.
    ("attention_dkdv", "sm_120", 64): (Tile(32, 64, 4, 2, True), Tile(32, 128, 8, 2)),
    ("attention_dkdv", "sm_120", 128): (Tile(32, 32, 4, 2), Tile(64, 64, 8, 2)),
    ("attention_dkdv", "gfx942", 64): (Tile(32, 64, 4, 1), Tile(64, 64, 4, 1)),
    ("attention_dkdv", "gfx942", 128): (Tile(32, 64, 4, 1), Tile(32, 32, 4, 1)),
}

# fp32 is for checking, not for speed: products on CUDA cores, one small tile everywhere.
_FP32 = {
    (f"attention_{part}_fp32", EVERY, D): (Tile(16, 16, warps),)
    for part in ("forward", "dq", "dkdv")
    for D, warps in ((64, 4), (128, 8))
}

# (kernel, architectures, size) -> tiles. The size is the power of two that holds a row, the head
# width of qk_norm_rotary, and 1 where values have nothing to do with each other.
_ROWS = {
    ("layer_norm_forward", EVERY, 1024): (Tile(1, 1024, 4), Tile(1, 1024, 2), Tile(1, 1024, 8)),
    ("layer_norm_forward", EVERY, 2048): (Tile(1, 2048, 8), Tile(1, 2048, 4)),
    ("layer_norm_forward", EVERY, 4096): (Tile(1, 4096, 8), Tile(1, 4096, 16)),
    ("layer_norm_forward", EVERY, 8192): (Tile(1, 8192, 16), Tile(1, 8192, 8)),
    ("layer_norm_backward", EVERY, 1024): (Tile(1, 1024, 4), Tile(1, 1024, 8)),
    ("layer_norm_backward", EVERY, 2048): (Tile(1, 2048, 8), Tile(1, 2048, 4)),
    ("layer_norm_backward", EVERY, 4096): (Tile(1, 4096, 16), Tile(1, 4096, 8)),
    ("layer_norm_backward", EVERY.replace("sm_100 ", ""), 8192): (Tile(1, 8192, 16),),
    ("layer_norm_backward", "sm_100", 8192): (Tile(1, 8192, 8),),  # 16 warps spill there
    # With the bias of the branch, and its gradient: three sums of a row's length.
    ("layer_norm_forward_bias", EVERY, 1024): (Tile(1, 1024, 4), Tile(1, 1024, 2)),
    ("layer_norm_forward_bias", EVERY, 2048): (Tile(1, 2048, 8), Tile(1, 2048, 4)),
    ("layer_norm_backward_bias", EVERY, 1024): (Tile(1, 1024, 4), Tile(1, 1024, 8)),
    ("layer_norm_backward_bias", EVERY, 2048): (Tile(1, 2048, 8), Tile(1, 2048, 16)),
    ("cross_entropy", EVERY, 65536): (Tile(1, 4096, 8), Tile(1, 8192, 8), Tile(1, 8192, 16)),
    ("cross_entropy_softcap", EVERY, 65536): (Tile(1, 4096, 8), Tile(1, 4096, 16)),
    # Tokens and head width: 8 values of each half of a head in each thread.
    ("qk_norm_rotary_forward", EVERY, 64): (Tile(32, 64, 4), Tile(64, 64, 8)),
    ("qk_norm_rotary_forward", EVERY, 128): (Tile(16, 128, 4), Tile(32, 128, 8)),
    ("qk_norm_rotary_backward", EVERY, 64): (Tile(32, 64, 4), Tile(64, 64, 8)),
    ("qk_norm_rotary_backward", EVERY, 128): (Tile(16, 128, 4), Tile(32, 128, 8)),
    ("relu_squared_forward", EVERY, 1): (Tile(1, 1024, 4), Tile(1, 2048, 4)),
    ("relu_squared_backward", EVERY, 1): (Tile(1, 1024, 4), Tile(1, 2048, 4)),
    # Rows and columns: 8 values of a row in each thread.
    ("gelu_forward", EVERY, 1): (Tile(2, 512, 2), Tile(1, 1024, 4)),
    ("gelu_backward", EVERY, 1): (Tile(8, 128, 2), Tile(4, 512, 4)),
    ("column_sums", EVERY, 1): (Tile(8, 128, 2), Tile(8, 256, 4)),
    ("embedding_forward", EVERY, 1024): (Tile(1, 1024, 4), Tile(1, 1024, 8)),
    ("embedding_forward", EVERY, 8192): (Tile(1, 8192, 16), Tile(1, 8192, 8)),
    ("embedding_backward", EVERY, 1): (Tile(4, 256, 4), Tile(8, 256, 4)),
    ("embedding_join", EVERY, 1): (Tile(4, 256, 4),),  # as embedding_backward, whose tile it takes
    # Of a cache: positions of one head, 8 values of each in a thread.
    ("decode_attention", EVERY, 64): (Tile(1, 128, 8), Tile(1, 64, 4), Tile(1, 256, 8)),
    ("decode_attention", EVERY, 128): (Tile(1, 64, 8), Tile(1, 32, 4), Tile(1, 128, 8)),
    ("decode_attention_fp32", EVERY, 64): (Tile(1, 64, 8),),
    ("decode_attention_fp32", EVERY, 128): (Tile(1, 32, 8),),
    ("draw", EVERY, 65536): (Tile(1, 4096, 16), Tile(1, 2048, 8)),
    ("judge_step", EVERY, 1): (Tile(1, 128, 1),),  # a window of 128 numbers
}

# In place of rows above. Three of layer_norm_backward's rows on their way at once: an H200 took 0.7
# of the time of one at a time (C = 768 and 1,600), and more with more programs. They lie in shared
# memory, 25 KB a program, 50 of 2,048 values, and four programs are to fit: two rows where an SM
# has 100 KB, and one of the longer.
_OF_SOME = {
    ("cross_entropy", "sm_90", 65536): (Tile(1, 16384, 16), Tile(1, 8192, 8)),
    **{(f"layer_norm_backward{bias}", archs, size): tuple(
        Tile(1, size, warps, stages) for warps in of_warps)
       for bias in ("", "_bias")
       for archs, size, stages, of_warps in (("sm_80 sm_90 sm_100", 1024, 3, (4, 8)),
                                             ("sm_86 sm_89 sm_120", 1024, 2, (4, 8)),
                                             ("sm_90 sm_100", 2048, 3, (8, 4)))},
}

# What ships above spills with another Triton's compiler: its version -> rows in place of those.
_OTHER_TRITON: dict[tuple[int, int], dict[Key, tuple[Tile, ...]]] = {
    (3, 6): {  # comes with torch 2.11; on sm_120 whatever is loaded by TMA spills
        ("attention_forward", "sm_100", 128): (Tile(128, 64, 4, 2, True), Tile(64, 64, 4, 2, True)),
        ("attention_forward", "sm_120", 64): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
        ("attention_dq", "sm_86 sm_89", 128): (Tile(64, 32, 4, 1), Tile(32, 32, 4, 2)),
        ("attention_dq", "sm_120", 64): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
        ("attention_dkdv", "sm_120", 64): (Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)),
        ("attention_forward_fp32", "sm_100", 128): (Tile(16, 16, 4),),
    },
    (3, 8): {  # comes with torch 2.14
        ("attention_forward", "sm_80", 128): (Tile(64, 32, 4, 1), Tile(128, 32, 8, 2)),
        ("layer_norm_backward", "sm_86 sm_89", 2048): (Tile(1, 2048, 4),),
        ("draw", "sm_80", 65536): (Tile(1, 8192, 16), Tile(1, 1024, 4)),
        ("draw", "sm_90", 65536): (Tile(1, 2048, 8),),
    },
}


def triton_version() -> tuple[int, int]:
    """(3, 7) of the Triton that is installed, without importing it; the pinned one's where none is
    found: plans are made of its table."""
    for name in ("triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            major, minor, *_ = importlib.metadata.version(name).split(".")
            return int(major), int(minor)
    return 3, 7


def table(triton: tuple[int, int]) -> dict[Key, tuple[Tile, ...]]:
    """{(kernel, architecture, size): tiles} for a version of Triton."""
    rows: dict[Key, tuple[Tile, ...]] = {}
    for part in (_ATTENTION, _FP32, _ROWS, _OF_SOME, _OTHER_TRITON.get(triton, {})):
        for (kernel, archs, size), row in part.items():
            rows |= {(kernel, arch, size): row for arch in archs.split()}
    return rows


TABLE = table(triton_version())


@functools.cache
def arch(device: torch.device) -> str:
    """The row of the table for a device; under the interpreter on a CPU, sm_80's.

    A later member of a family takes the row of the one listed: sm_103 sm_100's, sm_87 sm_86's.
    """
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 0), (8, 9)):
        return f"sm_{major}{minor}"
    return {8: "sm_86", 9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")


def pick(kernel: str, arch: str, size: int) -> Tile:
    """The tile that ships. A row that has none of its own takes the next longer one's warps."""
    if size in _SIZES[kernel]:
        return TABLE[kernel, arch, size][0]
    longer = min(known for known in _SIZES[kernel] if known > size)
    return TABLE[kernel, arch, longer][0]


def prefer(key: Key, tile: Tile) -> None:
    """Lets a tile of a row ship, from now on and in this process alone."""
    TABLE[key] = (tile, *(other for other in TABLE[key] if other != tile))


@contextlib.contextmanager
def first(key: Key, tile: Tile) -> Iterator[None]:
    """The same for a while."""
    row = TABLE[key]
    prefer(key, tile)
    try:
        yield
    finally:
        TABLE[key] = row


_SIZES = {kernel: {size for name, _, size in TABLE if name == kernel} for kernel, _, _ in TABLE}


def tensor_memory_rows(arch: str, tile: Tile) -> bool:
    """Whether products come with a whole row in each thread, as tcgen05's do to four warps."""
    return arch == "sm_100" and tile.warps == 4


@functools.cache
def programs(device: torch.device) -> int:
    """How many programs share the rows of layer_norm_backward."""
    if device.type != "cuda":
        return PROGRAMS_PER_SM  # the interpreter's time goes by programs
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """The size of a GPU's L2 cache; under the interpreter on a CPU, an A100's."""
    if device.type != "cuda":
        return cards.CARDS["a100"].l2_bytes
    card = cards.by_name(torch.cuda.get_device_name(device))
    if card is None:
        return torch.cuda.get_device_properties(device).L2_cache_size
    return card.l2_bytes  # of all dies; the driver of an MI300X names one die's


# Triton has functions of these names, which in 3.8 first look whether a number is a compile-time
# constant: at 150 launches a step that was 7 % of the host's time.
def cdiv(count: int, size: int) -> int:
    """How many tiles of this size `count` rows fill."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The smallest that isn't below `count`, of 1 and more."""
    return 1 << (count - 1).bit_length()


def check_dtype(operator: str, dtype: torch.dtype) -> None:
    """ValueError for a dtype the kernels do not compute in."""
    if dtype not in DTYPES:
        raise ValueError(
            f"{operator} kernel: bf16, fp16 or fp32, not {dtype}; use --kernels torch for fp64"
        )
