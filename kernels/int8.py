"""Products by a matrix of 8-bit whole numbers on a CPU: half of bf16's bytes to read.

    product = compiled()                        # of int8.c, by the machine's C compiler: 0.3 s
    y = product(x, whole, scale, bias)          # what reference.int8_linear computes

Each output has a scale of its own: its row of the matrix is scale * whole numbers from -127 to 127.

Shapes: N rows, C inputs, O outputs.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import reference

SOURCE = Path(__file__).with_name("int8.c")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
Product = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@functools.lru_cache
def compiled() -> Product:
    """The product of few rows, compiled once in each process.

    Raises RuntimeError, one line, where there is no C compiler (cc, or what CC names) with OpenMP,
    or what it made is wrong.
    """
    function = load(compiler())
    pointer, number = ctypes.c_void_p, ctypes.c_long
    function.argtypes = [pointer] * 5 + [number] * 3 + [ctypes.c_int]
    function.restype = None

    def product(x: Tensor, whole: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        """As reference.int8_linear. whole has to be dense, and scale and bias dense in fp32."""
        outputs, C = whole.shape
        rows = x.reshape(-1, C).float().contiguous()  # (N, C)
        y = torch.empty(*x.shape[:-1], outputs)
        function(whole.data_ptr(), scale.data_ptr(), None if bias is None else bias.data_ptr(),
                 rows.data_ptr(), y.data_ptr(), len(rows), C, outputs, torch.get_num_threads())
        return y

    if not is_right(product):
        raise RuntimeError(f"what {compiler()[0]} makes of {SOURCE.name} computes wrong numbers")
    return product


def compiler() -> list[str]:
    """The words that call it. Raises RuntimeError where CC can't be read."""
    named = os.environ.get("CC", "")
    try:
        return shlex.split(named) or ["cc"]
    except ValueError as error:
        raise RuntimeError(f"CC={named} names no compiler: {error}") from None


def load(words: list[str]) -> Any:
    """The function of SOURCE, as this compiler makes it. Raises RuntimeError where it can't."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "int8.so"
            compile_into(library, words)
            return ctypes.CDLL(str(library)).int8_product
    except (OSError, AttributeError) as error:  # no room, files there can't be run, C++'s names
        raise RuntimeError(f"what {words[0]} makes of {SOURCE.name} can't be loaded: {error}"
                           ) from None


def compile_into(library: Path, words: list[str]) -> None:
    """Calls the compiler. Raises RuntimeError with its first error."""
    try:
        # In English, of which a line is chosen.
        subprocess.run([*words, *FLAGS, str(SOURCE), "-o", str(library)], check=True,
                       capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
                       env=os.environ | {"LC_ALL": "C"})
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if "error" in line] or [str(error)]
        raise RuntimeError(f"{words[0]} can't compile it: {said[0].strip()}") from None
    except OSError as error:
        raise RuntimeError(f"no C compiler {words[0]!r} here ({error.strerror}): CC names "
                           "another") from None


def is_right(product: Product) -> bool:
    """Whether it agrees with fp64, up to what rounding explains, on rows of any length."""
    generator = torch.Generator().manual_seed(0)
    for N, C, outputs in ((1, 64, 5), (3, 777, 130)):
        whole = torch.randint(-127, 128, (outputs, C), generator=generator).to(torch.int8)
        x, scale, bias = (torch.randn(*shape, generator=generator)
                          for shape in ((N, C), (outputs,), (outputs,)))
        y = product(x, whole, scale, bias)
        exact = reference.int8_linear(x.double(), whole, scale, bias)
        # C products and sums of fp32, the scale and the bias: each rounds by 2^-24 at most.
        size = reference.int8_linear(x.double().abs(), whole.abs(), scale.abs(), bias.abs())
        if not ((y - exact).abs() <= (C + 2) * 2**-24 * size).all():
            return False
    return True
