"""What preflight measures: each probe looks at one thing and says what to do where it's wrong.

    lines = data_folder(Path("fineweb10B")) + run_folder(Path("runs"), 1_500_000_000, keep=3)

A probe that meets a full disk or a missing tool reports that; it doesn't raise.
"""

import itertools
import os
import re
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from kernels import cards, selfcheck
from launch.files import free_bytes, human_size

Status = Literal["ok", "warn", "fail"]
GIB, MIB = 2**30, 2**20
ROOT = Path(__file__).parent.parent

READ_BYTES, WRITE_BYTES = 256 * MIB, 64 * MIB  # seconds on a disk, and past its first cache
# A node of eight H100s trains 124M on some 2 million tokens a second, 2 bytes each: 4 MB/s. Ten
# times that leaves room for the first read of a shard and for other jobs.
READ_WANTED = 40e6
SAVE_SECONDS = 120.0  # what launch/torchrun.sh gives the last save before it kills the ranks
OPEN_FILES = 1024  # 103 shards of FineWeb 10BT, sockets to every rank of a node, libraries
SLOW = 0.7  # of the median: what is called slow
# nvidia-smi's bits for clocks that the hardware holds down: slowdown, heat (two), power brake.
HELD_DOWN = {0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat", 0x80: "power brake"}


@dataclass(frozen=True)
class Line:
    """One finding. advice: what to do about it, empty where all is well."""

    check: str
    status: Status
    found: str
    advice: str = ""


def clock() -> float:
    """Seconds; tests make it jump."""
    return time.perf_counter()


def gpu(device: torch.device) -> list[Line]:
    """Model, memory, driver, other processes and clocks of this rank's GPU."""
    if device.type != "cuda":
        return [Line("device", "ok", f"no GPU: {cpu_cores()} CPU cores, {memory_in_words()}")]
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return [card_line(device), memory_line(device), *driver(uuid, own=os.getpid())]


def cpu_cores() -> int:
    """Cores that this process may run on, where the system tells (macOS doesn't); or all of them.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_in_words() -> str:
    """The machine's memory, if the system knows it by POSIX's names."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except ValueError:
        return "memory unknown"
    return f"{size / GIB:.0f} GiB of memory"


def card_line(device: torch.device) -> Line:
    """What the GPU is, and whether its limits are known."""
    name = torch.cuda.get_device_name(device)
    total = torch.cuda.mem_get_info(device)[1]
    found = f"{name}, {total / GIB:.0f} GiB"
    if cards.by_name(name):
        return Line("device", "ok", found)
    return Line("device", "warn", found,
                "not in kernels/cards.py, so nothing to compare its speed with")


def memory_line(device: torch.device) -> Line:
    """Whether something else lies in the GPU's memory."""
    free, total = torch.cuda.mem_get_info(device)
    used = (total - free) / GIB
    found = f"{used:.1f} GiB in use"
    if used > 2:  # CUDA's own context takes up to one
        return Line("GPU memory", "warn", found, "end what else runs there, or lower --micro_batch")
    return Line("GPU memory", "ok", found)


def driver(uuid: str, own: int) -> list[Line]:
    """What nvidia-smi knows of one GPU: driver, clocks held down, other processes."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return [Line("driver", "warn", "no nvidia-smi", "clocks and other processes go unchecked")]
    fields = "driver_version,clocks.sm,clocks.max.sm,temperature.gpu,clocks_throttle_reasons.active"

    def ask(query: str) -> str:
        command = [smi, "-i", uuid, query, "--format=csv,noheader,nounits"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        version, now, most, heat, reasons = ask(f"--query-gpu={fields}").split(", ")
        held = {text for bit, text in HELD_DOWN.items() if int(reasons, 16) & bit}
        apps = ask("--query-compute-apps=pid").split()
    except (ValueError, OSError, subprocess.TimeoutExpired) as error:
        return [Line("driver", "warn", f"nvidia-smi can't be read: {error}", "try it by hand")]
    clocks = Line("clocks", "ok", f"{now} of {most} MHz at {heat} C")
    if held:
        clocks = Line("clocks", "fail", f"{clocks.found}, held down by {', '.join(sorted(held))}",
                      "cool or power this node properly, or leave it out")
    processes = Line("GPU processes", "ok", "none but this")
    strangers = [pid for pid in apps if pid != str(own)]
    if strangers:
        processes = Line("GPU processes", "warn", f"others: {', '.join(strangers)}",
                         "end them, or take another GPU")
    return [Line("driver", "ok", version), clocks, processes]


def kernel_check(device: torch.device, head_width: int) -> list[Line]:
    """Our kernels against plain PyTorch on this very card."""
    if device.type != "cuda":
        return [Line("kernels", "ok", "plain PyTorch without a GPU, nothing to compare")]
    try:
        _, line = selfcheck.checked("triton", device, head_width)
    except (RuntimeError, ValueError) as error:
        return [Line("kernels", "fail", str(error), "train with --kernels torch")]
    return [Line("kernels", "ok", line)]


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a matrix product here, best of five: bf16 on GPUs, fp32 on CPUs."""
    cuda = device.type == "cuda"
    n, dtype = 1024, torch.float32
    if cuda:
        n, dtype = 8192, torch.bfloat16
    a = torch.ones(n, n, device=device, dtype=dtype)  # (n, n)
    best = float("inf")
    for _ in range(6):  # the first one warms up
        start = clock()
        a @ a
        if device.type != "cpu":  # Apple's MPS too
            torch.accelerator.synchronize(device)
        best = min(best, clock() - start)
    return 2 * n**3 / best


def data_folder(folder: Path | None) -> list[Line]:
    """How fast the data's largest file can be read."""
    if folder is None:
        return []
    try:
        files = [folder]
        if not folder.is_file():
            files = [path for path in folder.iterdir() if path.is_file()]
        if not files:
            return [Line("data", "fail", f"{folder} is empty", "python -m data.fineweb fills it")]
        largest = max(files, key=lambda path: path.stat().st_size)
        rate, size = read_rate(largest)
    except OSError as error:
        return [Line("data", "fail", f"{folder}: {error.strerror}", "name the folder of shards")]
    found = f"{human_size(rate)}/s from {largest}"
    if rate < READ_WANTED and size > MIB:  # less says nothing of the disk
        return [Line("data", "warn", found, "copy the shards to a local disk: training wants "
                     f"{human_size(READ_WANTED)}/s a node")]
    return [Line("data", "ok", found)]


def read_rate(path: Path) -> tuple[float, int]:
    """(bytes/s, bytes read); from the disk, as far as the kernel lets go of what it remembers."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        start, size = clock(), 0
        while size < READ_BYTES:
            chunk = os.read(handle, 4 * MIB)
            if not chunk:
                break
            size += len(chunk)
        return size / max(clock() - start, 1e-9), size
    finally:
        os.close(handle)


def run_folder(folder: Path, checkpoint_bytes: int, keep: int) -> list[Line]:
    """Room for the checkpoints that will be kept and the one in the making, and time to save it."""
    lines = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines.append(space_line(folder, needed=checkpoint_bytes * (keep + 1)))
        lines.append(writing_line(folder, checkpoint_bytes))
    except OSError as error:
        why = error.strerror or str(error)
        lines.append(Line("writing", "fail", f"{folder}: {why}", "choose another --out_dir"))
    return lines


def space_line(folder: Path, needed: int) -> Line:
    """Whether so many bytes find room."""
    free = free_bytes(folder)
    found = f"{human_size(free)} free in {folder}, {human_size(needed)} will be written"
    if free < needed:
        return Line("space", "fail", found, "free some, lower --keep, or choose another --out_dir")
    return Line("space", "ok", found)


def writing_line(folder: Path, checkpoint_bytes: int) -> Line:
    """How long a checkpoint takes to be written. Raises OSError where there is no room."""
    rate = write_rate(folder)
    seconds = checkpoint_bytes / rate
    found = f"{human_size(rate)}/s to {folder}"
    if seconds >= 1:
        found += f", {seconds:.0f} s a save"
    if seconds > SAVE_SECONDS:
        return Line("writing", "warn", found, f"the last save before a stop has {SAVE_SECONDS:.0f} "
                    "s: choose a faster disk")
    return Line("writing", "ok", found)


def write_rate(folder: Path) -> float:
    """bytes/s to the disk itself. Raises OSError where there is no room."""
    path = folder / f".preflight-{os.uname().nodename}-{os.getpid()}"
    block = os.urandom(MIB)  # a disk that compresses is not to win
    try:
        start = clock()
        with path.open("wb") as file:
            for _ in range(WRITE_BYTES // MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return WRITE_BYTES / max(clock() - start, 1e-9)
    finally:
        path.unlink(missing_ok=True)


def open_files() -> list[Line]:
    """The limit on open files of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return [Line("open files", "ok", f"at most {soft:,}")]
    return [Line("open files", "warn", f"at most {soft:,}", f"ulimit -n {min(hard, 65536)}")]


def versions(constraints: Path = ROOT / "constraints.txt") -> list[Line]:
    """Installed packages against the pinned ones; local tags such as +cu130 don't count."""
    try:
        text = constraints.read_text(encoding="utf-8")
        pins = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", text, re.MULTILINE))
    except OSError as error:
        return [Line("versions", "warn", f"{constraints}: {error.strerror}", "bring it here")]
    others, same = [], 0
    for name, pinned in pins.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that this run may not need
        if installed.split("+")[0] == pinned:
            same += 1
        else:
            others.append(f"{name} {installed} (tested with {pinned})")
    if others:
        return [Line("versions", "warn", ", ".join(others), "pip install -c constraints.txt -e .")]
    return [Line("versions", "ok", f"{same} packages are those of constraints.txt")]


def wandb_login(mode: str) -> list[Line]:
    """Whether a run that reports to Weights & Biases online can."""
    if mode != "online":
        return []
    import netrc

    try:
        known = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        known = False
    if known:
        return [Line("wandb", "ok", "a key is there")]
    return [Line("wandb", "fail", "no key", "wandb login, or set WANDB_API_KEY")]


def slow_ones(links: Iterable[tuple[str, str, float]]) -> list[str]:
    """Who is slow on every link it has, among (one end, other end, bytes/s).

    A sound machine beside a slow one has another link that is fast. Two machines with one link
    between them can't be told apart, and none is named.
    """
    rates: dict[str, list[float]] = {}
    for one, other, rate in links:
        rates.setdefault(one, []).append(rate)
        rates.setdefault(other, []).append(rate)
    if len(rates) < 3:
        return []
    usual = statistics.median(itertools.chain(*rates.values()))
    return [name for name, own in rates.items() if max(own) < SLOW * usual]
