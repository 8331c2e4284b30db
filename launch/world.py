"""Which processes, device and number format a run has; the few things ranks say to one another.

Started by torchrun there are WORLD_SIZE ranks; started plainly there is one, and nothing here
touches torch.distributed.

    with world.fail_together():               # what fails on one rank fails on all
        data = open_data(config)
    source = world.broadcast_from_rank0(find, path)     # rank 0 runs find(path), every rank gets
                                                        # its result, or its error
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels import cards
from launch.config import ReadDtype
from launch.errors import BadInput, Failed
from launch.orphan import exit_when_orphaned
from launch.ranks import read_ranks

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
# How long a rank waits for another before it gives up; rank 0 may be hashing and saving 19 GB.
TIMEOUT = timedelta(minutes=30)
# Process groups that this process has left, kept from being destroyed: DDP's reducer drops the
# last reference with Python's lock held, gloo's destructor joins threads, and a thread that is just
# then releasing a tensor waits for this lock for ever (pytorch#56297; 2 of 91 exits, measured).
GROUPS_LEFT: list[Any] = []

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers. Leaving it as a context leaves the process group."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        """Rank 0 prints, logs and writes: nanoGPT's master_process."""
        return self.rank == 0

    def print0(self, *words: object) -> None:
        """Prints on rank 0."""
        if self.is_rank0:
            print(*words, flush=True)

    def seed_step(self, seed: int, step: int) -> None:
        """Has PyTorch's random numbers of a step, which dropout draws, follow from the seed, the
        step and the rank: the same after a restart or a rollback, whatever was drawn before."""
        drawn = int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)[0])
        # torch.manual_seed() also asks for devices that aren't there, 0.3 ms a step.
        torch.default_generator.manual_seed(drawn)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(drawn)
        elif self.device.type == "mps":
            torch.mps.manual_seed(drawn)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Each value added up over all ranks, in fp64: the same numbers on every rank."""
        if self.size == 1:
            return list(values)
        # NCCL moves tensors of its own GPU only; MPS knows no fp64, and has one rank.
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def add_over_ranks(self, values: Tensor) -> None:
        """Adds up a tensor of this device over all ranks, in place. On GPUs nobody waits for it."""
        if self.size > 1:
            dist.all_reduce(values)

    def all_reduce_max(self, value: float) -> float:
        """The largest value of any rank."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.item()

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """Around work that may find bad input: if it does on any rank, all ranks raise.

        All ranks have to enter. The error that rank 0 raises names the rank that found it. A disk
        or file that fails (OSError) becomes a Failed.
        """
        error = None
        try:
            yield
        except BadInput as found:
            error = found
        except OSError as found:
            error = Failed(str(found))
        self.raise_on_all_ranks(error)

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank. Any value that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def require_same(self, settings: dict[str, Any]) -> None:
        """Raises BadInput on all ranks, naming the odd ones, where they don't agree on a setting.

        Ranks that were started with other flags, or chose for themselves (by their own card, their
        own view of a disk), would wait for each other, or go on with different runs unnoticed.
        """
        of_ranks = self.all_gather(settings)
        for name in settings:
            values = [of_rank.get(name) for of_rank in of_ranks]
            usual = max(values, key=values.count)  # rank 0's where several are as frequent
            odd = [f"rank {rank} has {v}" for rank, v in enumerate(values) if v != usual]
            if odd:
                raise BadInput(f"the ranks don't agree on {name}: {', '.join(odd)}, and the others "
                               f"have {usual}")

    def raise_on_all_ranks(self, error: BadInput | None) -> None:
        """Raises on every rank what any rank found; the message names the rank. None: nothing."""
        for rank, found in enumerate(self.all_gather(error)):
            if found is None:
                continue
            if rank > 0:
                found = type(found)(f"rank {rank}: {found}")
            raise found

    def broadcast_from_rank0(self, function: Callable[..., T], *arguments: Any) -> T:
        """function(*arguments) on rank 0 alone; every rank gets its result, or its bad input."""
        result = None
        with self.fail_together():
            if self.is_rank0:
                result = function(*arguments)
        if self.size > 1:
            box = [result]
            dist.broadcast_object_list(box, src=0)
            result = box[0]
        return result  # type: ignore[return-value]

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the process group where all ranks leave together.

        After an error of this rank alone, or of one whose peer has died, the group is left as it
        is: destroying it could wait for ranks that will never answer.
        """
        if kind is None or issubclass(kind, BadInput | SystemExit):
            self.destroy()

    def destroy(self) -> None:
        """Leaves the process group; harmless where there is none."""
        if self.size > 1 and dist.is_initialized():
            GROUPS_LEFT.append(dist.group.WORLD)
            dist.destroy_process_group()


def choose_device() -> torch.device:
    """CUDA (or ROCm, which torch calls cuda) where there is one, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if ranks > gpus:  # every rank sees it, so all stop, and rank 0 speaks
            raise BadInput(f"{ranks} ranks on this machine and {gpus} GPUs, one for each: start "
                           f"torchrun with --nproc_per_node={gpus}")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def init_distributed(deterministic: bool = False) -> World:
    """Joins the ranks that torchrun started, or stands alone.

    deterministic: the same sums in the same order every time, where PyTorch has such a way; an
    operator that has none raises. cuBLAS needs its workspace fixed before the first use.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # It would also fill every new tensor with NaN, which shows who reads what nobody has
        # written (the kernels' tests look for it): 454 launches and 16 GB in a step of 124M.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    rank, size = read_ranks()
    device = choose_device()
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # A thread for each device's backward pass, of which there is one here: a core fewer warm.
        torch.autograd.set_multithreading_enabled(False)
    if size > 1:
        exit_when_orphaned()
        cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=device if cuda else None
        )
    return World(rank, size, device)


def keep_freed_memory() -> None:
    """Tells glibc to keep big buffers for the next step and not to hand them back to the kernel.

    A step frees and allocates the same hundreds of MiB; without this every step pays for the page
    faults again (measured: a step of the demo takes 1.9 times as long). No effect elsewhere.
    """
    if sys.platform != "linux":
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h; mallopt(3)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        # glibc before 2.35 refuses a threshold above 32 MiB (and answers 0): no mmap at all then.
        if libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1) or libc.mallopt(M_MMAP_MAX, 0):
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def choose_dtype(asked: ReadDtype, device: torch.device) -> str:
    """The number format of the matrix products: bf16, fp16, fp32 or fp64.

    auto: bf16 where the hardware multiplies it (CUDA from compute capability 8.0 on, CPUs with
    avx512_bf16 or AMX), fp16 on older GPUs, fp32 elsewhere. int8, which is of weights alone: the
    same as auto, on CPUs. Raises BadInput for what the device doesn't have.
    """
    if asked == "int8" and device.type != "cpu":
        raise BadInput("--dtype int8 is for CPUs: on a GPU use --dtype bf16, or leave it out")
    if asked not in ("auto", "int8"):
        if asked == "fp64" and device.type == "mps":
            raise BadInput("Apple's MPS has no fp64: use --dtype fp32")
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu" and has_fast_bf16():
        return "bf16"
    return "fp32"


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Matrix products in bf16 or fp16 inside this context; fp32 and fp64 models run as they are."""
    if dtype in ("fp32", "fp64"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[dtype])


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (x86 with avx512_bf16 or AMX)."""
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("amx_tile"))


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple MPS"
    return f"CPU ({torch.get_num_threads()} threads)"


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """FLOP/s the device could do at best in this format, for the MFU; None where it's unknown."""
    card = cards.by_name(device_name(device)) if device.type == "cuda" else None
    if card is None or dtype == "fp64":
        return None
    return card.fp32_flops if dtype == "fp32" else card.bf16_flops


def peak_memory_mib(device: torch.device) -> float | None:
    """The most memory that tensors have taken on a GPU so far, in MiB."""
    if device.type != "cuda":
        return None
    # torch.cuda.max_memory_allocated() makes and sorts a flat table of all statistics for it.
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    return round(stats["allocated_bytes"]["all"]["peak"] / 2**20, 1)
