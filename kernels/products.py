"""Whose fp32 matrix products a CPU computes with: MKL's, which PyTorch takes, or oneDNN's.

    library, line = products.fastest(rows=1024, C=768)     # measured, in a tenth of a second
    products.use(library)                                  # for this process, until it's changed

On AMD's CPUs with AVX-512 MKL stays at half of what the machine can do, and oneDNN doesn't: 215 and
457 GFLOP/s on two cores of Zen 5 for (1024, 768) x (768, 3072). PyTorch hands fp32 products to
oneDNN only where it is told that bf16 is good enough, and whether oneDNN then takes bf16 depends on
the CPU: so both are timed, and checked against fp64, before a run takes one.
"""

import time
from typing import Literal

import torch
from torch import Tensor

Library = Literal["mkl", "onednn"]

FASTER = 1.3  # times: less is not worth another rounding; where oneDNN gains it is 1.8 to 2.2
# Relative error (Frobenius) of right products: 2e-7 to 6e-7 were measured, for sums of 768 to 3072
# in fp32, whose unit roundoff is 6e-8. In bf16, roundoff 2^-9, it is 2e-3.
LARGEST_ERROR = 2e-6
ROWS = 256  # that are timed, at most
TURNS = 5  # of each; the best counts


def use(library: Library) -> None:
    """Whose fp32 products this process takes from now on."""
    precision = {"mkl": "none", "onednn": "bf16"}[library]
    torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]


def fastest(rows: int, C: int) -> tuple[Library, str]:
    """The library for products of (rows, C) with (C, 4C) and back, and a line on why, or "".

    It is MKL, unless oneDNN is as right and FASTER times as fast. Leaves MKL in use.
    """
    rows = min(rows, ROWS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, C, generator=generator)
    up, down = (torch.randn(shape, generator=generator) for shape in ((4 * C, C), (C, 4 * C)))
    seconds: dict[Library, float] = {"mkl": float("inf"), "onednn": float("inf")}
    error = 0.0
    try:
        for _ in range(TURNS):
            for library in seconds:
                use(library)
                began = time.perf_counter()
                hidden = torch.nn.functional.linear(x, up)  # (rows, 4C)
                back = torch.nn.functional.linear(hidden, down)  # (rows, C)
                seconds[library] = min(seconds[library], time.perf_counter() - began)
                if library == "onednn":
                    error = max(relative_error(hidden, x, up), relative_error(back, hidden, down))
    finally:
        use("mkl")
    gain = seconds["mkl"] / seconds["onednn"]
    if gain < FASTER or not error <= LARGEST_ERROR:
        return "mkl", ""
    return "onednn", (f"fp32 products: oneDNN's, {gain:.1f} times as fast here as MKL's (errors up "
                      f"to {error:.0e})")


def relative_error(y: Tensor, x: Tensor, w: Tensor) -> float:
    """Of y against x w^T in fp64, on the first rows: (N, K) x (M, K) -> (N, M)."""
    exact = x[:16].double() @ w.double().T
    return float((y[:16] - exact).norm() / exact.norm())
