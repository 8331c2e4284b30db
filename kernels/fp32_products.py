"""Which library multiplies fp32 matrices while a CPU trains: MKL, which PyTorch asks, or oneDNN.

    if is_faster() and is_right(width=768):
        use(ONEDNN)                          # in this process, from now on

MKL leaves AMD's AVX-512 alone, and where that is of full width (Zen 5) half the speed with it: of
GPT-2 124M's c_fc and 1,024 rows two cores make 206 GFLOP/s by MKL and 457 by oneDNN. Two of Zen 4,
with halves of that width, make 152 and 178, and stay with MKL. It goes by the CPU and not by a
clock, so that a run has the same bits each time it is started.

PyTorch gives oneDNN fp32 products only where it may round what it multiplies to bf16. oneDNN makes
use of that on CPUs with AMX, which AMD's have not; all the same the products of a block are held
against fp64 first, where inputs rounded to bf16 can't hide. While oneDNN is asked, PyTorch's older
switch can't be read: torch.get_float32_matmul_precision() raises.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

MKL, ONEDNN = "mkl", "onednn"
ZEN_5 = 26  # AMD's family of it, 0x1A; what comes later has a higher number
ROWS = 64  # that are checked
# The norm of the error over that of the result: sqrt(K) 2^-24 for sums of K fp32 products (1e-5 for
# K = 28,000), and 2^-9 or so of inputs that were rounded to bf16.
WORST = 1e-5


def use(name: str) -> None:
    """Has this process multiply fp32 matrices by this library."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    matmul.fp32_precision = "bf16" if name == ONEDNN else "none"


def is_faster(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether both libraries are here, and oneDNN is the faster of them on this CPU."""
    both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    if not both or not cpuinfo.exists():
        return False
    text = cpuinfo.read_text(errors="replace")
    family = re.search(r"^cpu family\s*: (\d+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:.*$", text, re.MULTILINE)
    if "AuthenticAMD" not in text or not family or not flags:
        return False
    features = flags.group().split()
    has_amx = any(feature.startswith("amx") for feature in features)
    return int(family.group(1)) >= ZEN_5 and "avx512f" in features and not has_amx


def is_right(width: int) -> bool:
    """Whether oneDNN's products in a block of width C are fp32's: forward and both gradients, of
    the matrices (3C, C), (C, C), (4C, C) and (C, 4C)."""
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    try:
        use(ONEDNN)
        return all(_error(*shape) <= WORST for shape in shapes)
    finally:
        use(MKL)


def _error(outputs: int, inputs: int) -> float:
    """The largest of the three products of a matrix (O, I); NaN where one is."""
    numbers = torch.Generator().manual_seed(0)
    shapes = (ROWS, inputs), (outputs, inputs), (ROWS, outputs)
    x, W, dy = (torch.randn(shape, generator=numbers) for shape in shapes)
    exact = _products(x.double(), W.double(), dy.double())
    pairs = zip(_products(x, W, dy), exact, strict=True)
    errors = torch.stack([(got - right).norm() / right.norm() for got, right in pairs])
    return errors.max().item()


def _products(x: Tensor, W: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y (rows, O), dx (rows, I), dW (O, I)."""
    return F.linear(x, W), dy @ W, dy.t() @ x
