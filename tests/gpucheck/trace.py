"""What a torch.profiler trace says of a GPU: how long it stood idle, what was launched, what took
how long.

    events = read(run / "profile" / "trace.json")
    idle_share(events)                  # 0.03: of the time from the first kernel to the last
    launches(events, steps=5)           # {"all": 388.0, "GEMM": 183.0, ...} a step
    milliseconds(events, steps=5)       # {"GEMM": 69.5, "attention_dkdv": 9.1, ...} a step

A trace is Chrome's JSON: {"traceEvents": [{"ph": "X", "cat": "kernel", "name": ..., "ts": ...,
"dur": ...}, ...]}, times in microseconds. Kernels, copies and fills of the GPU are what counts.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from kernels.tiles import TABLE

ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
# Our kernels' functions; three are called otherwise than their rows of tiles.
OURS = {kernel for kernel, _arch, _size in TABLE} | {"decode_attention_forward", "draw_tokens",
                                                     "judge"}
# cuBLAS's own, by the names of its libraries; splitKreduce adds up what a product was split into,
# which tests/nullgpu counts as one.
PRODUCT = re.compile(r"gemm|gemv|nvjet|cutlass|xmma", re.IGNORECASE)
SECOND_HALF = re.compile(r"splitKreduce", re.IGNORECASE)


def read(path: Path) -> list[dict[str, Any]]:
    """What the GPU did. Raises ValueError for a trace without it."""
    content = json.loads(path.read_text())
    events = [event for event in content["traceEvents"]
              if event.get("ph") == "X" and event.get("cat") in ON_GPU]
    if not events:
        raise ValueError("the profiler saw no kernel: it needs CUPTI, and in some containers the "
                         "right to use it")
    return events


def idle_share(events: list[dict[str, Any]]) -> float:
    """The share of the time between the first event's begin and the last one's end in which none
    runs. Events of several streams may overlap."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events)
    begin, busy_until = spans[0]
    idle = 0.0
    for start, end in spans[1:]:
        idle += max(0.0, start - busy_until)
        busy_until = max(busy_until, end)
    return idle / (busy_until - begin) if busy_until > begin else 0.0


def launches(events: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Launches of one of `steps` steps, by the kinds of tests/nullgpu/counted.json, and in all.
    Named apart are NCCL's kernels, which that table doesn't count, and fills of memory: PyTorch's
    are among its copies, but most are cuBLAS's, one or more for a product, and those it has not."""
    counted = Counter(kind_of(event) for event in events)
    del counted[""]
    apart = {kind: times / steps for kind in ("NCCL", "fills") if (times := counted.pop(kind, 0))}
    kinds = {kind: times / steps for kind, times in sorted(counted.items())}
    return {"all": counted.total() / steps, **kinds, **apart}


def milliseconds(events: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """The GPU's time in one of `steps` steps, longest first: by kind, ours by kernel."""
    total: Counter[str] = Counter()
    for event in events:
        kind = kind_of(event) or "GEMM"  # a product's second half
        total[event["name"] if kind == "ours" else kind] += event["dur"] / 1e3 / steps
    return {name: round(ms, 3) for name, ms in total.most_common()}


def kind_of(event: dict[str, Any]) -> str:
    """As tests/nullgpu/counts.py calls what an event is of; "" for what it doesn't count."""
    name = event["name"]
    if event["cat"] != "kernel":
        return "fills" if event["cat"] == "gpu_memset" else "copies"
    if name in OURS:
        return "ours"
    if name.startswith("triton_"):
        return "Inductor"
    if name.startswith("nccl"):
        return "NCCL"
    if SECOND_HALF.search(name):
        return ""
    return "GEMM" if PRODUCT.search(name) else "ATen"
