"""Counts what a run asked of the card: from the log of the stand-in to the numbers of a row.

    counts = count(out, ("step",), Path("cuobjdump"))

The log (record.c) has a line for each call. Those that are counted:

    gemm 768 65536 3072                 a matrix product of cuBLAS
    triton attention_forward grid ...   a kernel of ours; Inductor's begin with triton_
    aten _ZN2at6native... grid ...      a kernel compiled into torch
    copy d2h 4                          a copy, its direction and bytes; memset 4096
    wait stream                         the host waits: for a stream, an event, the device, a copy
    mark collective all_reduce 4096     of all ranks, written by collectives.py, with its bytes
    graph                               a graph of captured launches is replayed; those are in the
                                        log where they were captured, with "captured " before them
    call cublasDtrsm_v2                 a function that does nothing, not even be counted
"""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from tests.nullgpu.rows import PARTS, Part

# Functions without work for the card.
HARMLESS = re.compile(
    r"cublas(Lt)?\w*(Set|Get|Destroy|Create)\w*|cuda(GetLast|PeekAtLast)Error"
    r"|cudaEvent(Record\w*|Query|Destroy)|cudaStream(WaitEvent|Query)|cu(Func|Ctx|Module)\w+"
    r"|cudaThreadExchangeStreamCaptureMode"
    r"|cuda(Func|Kernel)SetAttribute\w*|cuTensorMapEncode\w+")
# Kernels that change a tensor's number format and do nothing else: Inductor's by their names,
# torch's by theirs, mangled.
CASTS = (
    re.compile(r"triton_poi_fused__to_copy(_(t|transpose|view|permute|expand))*_\d+"),
    re.compile(r".*(bfloat16|float16|half)\w*_copy_kernel_cuda.*"),
    re.compile(r".*direct_copy_kernel_cuda.*LoadWithCast.*"),
    re.compile(r".*CopyFunctorI(N3c108BFloat16Ef|fN3c108BFloat16E)L.*"),
)


class Missing(Exception):
    """A log without the lines that a part begins and ends with."""


def count(out: Path, parts: tuple[str, ...], cuobjdump: Path) -> dict[str, Any]:
    """The numbers of a row: of a run that has left log, kernels and found.json in `out`."""
    found = json.loads((out / "found.json").read_text())
    lines = (out / "log").read_text().splitlines()
    counts: dict[str, Any] = {
        "graph breaks": found["graph_breaks"],
        "recompiles": found["recompiles"],
        "spills": spills(sorted((out / "cubins").glob("*.cubin")), cuobjdump),
    }
    for name in parts:
        part = cut(lines, PARTS[name])
        if name == "graph":  # what is launched at each replay
            part = [line.removeprefix("captured ") for line in part]
        counts[name] = count_part(part)
        counts[name]["peak MiB"] = round(found["peaks"].get(name, found["peak"]))
    return counts


def cut(lines: list[str], part: Part) -> list[str]:
    """The lines of a part. Raises Missing."""
    def place(wanted: str, nth: int) -> int:
        places = [i for i, line in enumerate(lines) if line == wanted]
        if len(places) < nth:
            raise Missing(f"the log has {len(places)} times {wanted!r}, expected {nth}")
        return places[nth - 1]

    return lines[place(part.begin, part.nth) : place(part.end, part.nth_end)]


def count_part(lines: list[str]) -> dict[str, Any]:
    """Launches by kind, launches that only cast, waits by kind, collective operations and their
    bytes, and calls of functions that nobody knows here."""
    launches: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    collectives: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    casts = 0
    for line in lines:
        kind, *words = line.split()
        launches[kind_of_launch(kind, words)] += 1
        if kind in ("triton", "aten"):
            casts += is_cast(words[0])
        elif kind == "wait":
            waits[words[0]] += 1
        elif kind == "mark" and words[0] == "collective":
            collectives[words[1]] += 1
            collectives[f"{words[1]} bytes"] += int(words[2])
        elif kind == "call" and not HARMLESS.fullmatch(words[0]):
            unknown[words[0]] += 1
    del launches[""]
    counts = {
        "launches": {"all": launches.total(), **dict(sorted(launches.items()))},
        "casts": casts,
        "waits": dict(sorted(waits.items())),
        "collectives": dict(sorted(collectives.items())),
    }
    if unknown:
        counts["unknown calls"] = dict(sorted(unknown.items()))
    return counts


def kind_of_launch(kind: str, words: list[str]) -> str:
    """What a line launches; "" for nothing."""
    if kind == "triton":
        return "Inductor" if words[0].startswith("triton_") else "ours"
    kinds = {"gemm": "GEMM", "aten": "ATen", "copy": "copies", "memset": "copies",
             "graph": "graphs"}
    return kinds.get(kind, "")


def is_cast(kernel: str) -> bool:
    """Whether a kernel only changes a number format."""
    return any(pattern.fullmatch(kernel) for pattern in CASTS)


def spills(cubins: list[Path], cuobjdump: Path) -> dict[str, int]:
    """Of each kernel that keeps something in a thread's local memory, where registers spill to:
    the bytes of it."""
    found = {}
    for cubin in cubins:
        usage = subprocess.run([str(cuobjdump), "-res-usage", str(cubin)], check=True,
                               capture_output=True, text=True).stdout
        for name, stack, local in re.findall(
                r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage):
            if int(stack) + int(local):
                found[name] = int(stack) + int(local)
    return dict(sorted(found.items()))
