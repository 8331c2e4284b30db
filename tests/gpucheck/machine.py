"""The machine that is checked, and how large the checks are.

    machine = find_machine(sys.executable)      # BadInput where there is no GPU
"""

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from launch.errors import BadInput

SECONDS = 120  # for importing torch from a disk that has not read it yet

# Asked in a process that ends: a CUDA context would take memory from what is measured.
ASK = """
import json, os, platform, torch
cuda = bool(torch.version.cuda or torch.version.hip)
found = {"build": cuda, "gpus": torch.cuda.device_count() if cuda else 0}
if found["gpus"]:
    card = torch.cuda.get_device_properties(0)
    try:
        import triton
        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = ""
    found |= {"gpu": card.name, "memory_bytes": card.total_memory,
              "sms": card.multi_processor_count, "torch": torch.__version__,
              "cuda": torch.version.cuda or torch.version.hip,
              "python": platform.python_version(), "cpus": os.cpu_count()}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Machine:
    """What is here; the GPUs are alike."""

    gpu: str  # torch.cuda.get_device_name()
    gpus: int
    memory_bytes: int  # of one
    sms: int
    torch: str
    triton: str  # "" where there is none
    cuda: str  # or ROCm: what torch was built with
    python: str
    cpus: int

    def line(self) -> str:
        """For the head of a report."""
        return (f"{self.gpus} x {self.gpu}, {self.memory_bytes / 1e9:.0f} GB; torch {self.torch}, "
                f"Triton {self.triton or 'none'}, CUDA {self.cuda}, {self.cpus} CPUs")


def find_machine(python: str) -> Machine:
    """Of an interpreter with torch. Raises BadInput where it sees no GPU."""
    try:
        done = subprocess.run([python, "-c", ASK], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise BadInput(f"{python} has not found a GPU in {SECONDS} s") from None
    if done.returncode:
        complaint = done.stderr.strip().splitlines()[-1:]
        raise BadInput(f"gpu-check needs {python} to have a CUDA build of torch: "
                       f"{''.join(complaint)}")
    return machine_of(json.loads(done.stdout.splitlines()[-1]), python)


def machine_of(found: dict[str, Any], python: str) -> Machine:
    """What ASK has printed. Raises BadInput."""
    if not found.pop("build"):
        raise BadInput(f"gpu-check needs a GPU, and {python} has a torch for CPUs; without one: "
                       "make cuda-check")
    if not found["gpus"]:
        raise BadInput("gpu-check needs a GPU, and torch sees none here; without one: "
                       "make cuda-check")
    return Machine(**found)
