"""The kernels as training launches them: types and constants, for kernels/audit.py to compile.

    for case in cases(["sm_90"]):           # each row of kernels/tiles.py
        kernel, types, constants = launch(case)
"""

from typing import Any, NamedTuple

from kernels import tiles
from kernels.roofline import GPT2
from kernels.verdict import Limits

VOCAB = 50257  # of GPT-2, padded to GPT2.V
SOFTCAP = 15.0  # the speedrun's
LIMITS = Limits(z=7.0, narrowest=0.01, early_steps=10, early_times=10.0, outliers=True, halts=True)


class Case(NamedTuple):
    """One kernel, compiled for one architecture with one tile."""

    kernel: str
    arch: str
    size: int  # head width, or the power of two that holds a row; 1: value by value
    tile: tiles.Tile
    default: bool

    @property
    def id(self) -> str:
        return f"{self.kernel} {self.arch} {self.size} {self.tile}"


def cases(archs: list[str]) -> list[Case]:
    return [
        Case(kernel, arch, size, tile, place == 0)
        for (kernel, arch, size), row in tiles.TABLE.items()
        if arch in archs
        for place, tile in enumerate(row)
    ]


def launch(case: Case) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, its arguments' types and its constants, as training launches it."""
    from kernels import (  # fmt: skip
        attention,
        column_sums,
        cross_entropy,
        decode_attention,
        draw,
        embedding,
        gelu,
        judge_step,
        layernorm,
        qk_norm_rotary,
        relu_squared,
    )

    kernel, _, size, tile, _ = case
    bf16, fp32, i32, i64 = "*bf16", "*fp32", "i32", "i64"
    constants: dict[str, Any]
    if kernel.startswith("attention"):
        kind = "fp32" if kernel.endswith("_fp32") else "bf16"

        def tiled(rows: int) -> str:
            return f"tensordesc<{kind}[1, {rows}, {size}]>" if tile.tma else f"*{kind}"

        x = f"*{kind}"
        q, k = tiled(tile.m), tiled(tile.n)
        types = dict(queries=q, keys=k, out=x, dout=x, lse=fp32, delta=fp32, dqkv=q)
        types |= dict(T=i32, H=i32, group=i32)
        if "forward" in kernel:
            types["out"] = q
        if "dkdv" in kernel:
            types |= dict(dout=q, dqkv=k)
        fn = getattr(attention, kernel.removesuffix("_fp32"))
        tmem = tiles.tensor_memory_rows(case.arch, tile)
        constants = dict(D=size, BLOCK_M=tile.m, BLOCK_N=tile.n, TMEM=tmem, DELAYED=tile.delayed)
    elif kernel.startswith("cross_entropy"):
        fn = cross_entropy.cross_entropy
        types = dict(logits=bf16, targets=f"*{i64}", losses=fp32)
        cap = SOFTCAP if kernel.endswith("_softcap") else 0.0
        constants = dict(V=VOCAB, Vp=GPT2.V, SOFTCAP=cap, BLOCK=tile.n, GRADIENT=True)
    elif kernel.startswith("qk_norm_rotary"):
        fn = getattr(qk_norm_rotary, kernel)
        types = dict.fromkeys(("qkv", "out", "dout", "dqkv"), bf16)
        types |= dict.fromkeys(("cos", "sin", "rstd"), fp32)
        types |= dict(N=i32, P=i32, H=i32, gain="fp32", eps="fp32")
        constants = dict(D=size, BLOCK=tile.m)
    elif kernel.startswith("relu_squared"):
        fn = getattr(relu_squared, kernel)
        types = dict.fromkeys(("x", "y", "dx", "dy"), bf16) | dict(count=i32)
        constants = dict(BLOCK=tile.n)
    elif kernel.startswith("gelu"):
        fn = getattr(gelu, kernel)
        types = dict.fromkeys(("x", "y", "dx", "dy"), bf16) | dict(bias=fp32, partial=fp32)
        types |= dict(width=i32, N=i32, W=i32)
        constants = dict(BLOCK_M=tile.m, BLOCK_N=tile.n)
    elif kernel.startswith("decode_attention"):
        fn = decode_attention.decode_attention_forward
        x = fp32 if kernel.endswith("_fp32") else bf16
        types = dict(qkv=x, kv=x, out=x, position=f"*{i64}", H=i32, L=i32)
        constants = dict(D=size, BLOCK_N=tile.n)
    elif kernel == "draw":  # with all that it can do; rows of the logits lie GPT2.V apart
        fn = draw.draw_tokens
        types = dict(logits=bf16, u="*fp64", out=f"*{i64}", stride=i32, V=i32)
        types |= dict(per_temperature="fp32", top_k=i32, top_p="fp32")
        constants = dict(GREEDY=False, TOP_K=True, TOP_P=True, SPARE=16, BLOCK=tile.n)
    elif kernel == "column_sums":
        fn = column_sums.column_sums
        types = dict(first=bf16, second=bf16, partial=fp32, width=i32, N=i32, W1=i32, W2=i32)
        constants = dict(BLOCK_M=tile.m, BLOCK_N=tile.n)
    elif kernel.startswith("embedding"):
        fn = getattr(embedding, kernel)
        types = dict.fromkeys(("wte", "wpe", "x", "dx", "dwte", "dwpe", "parts"), fp32)
        types |= dict(tokens=f"*{i64}", order=f"*{i32}", stride=i32, N=i32, T=i32, C=i32)
        constants = dict(BLOCK=size, POSITIONS=True, PIECE=embedding.PIECE, BLOCK_M=tile.m,
                         BLOCK_N=tile.n)
    elif kernel == "judge_step":
        fn = judge_step.judge
        fp64, limits = "*fp64", LIMITS
        types = dict.fromkeys(("state", "flags", "new_state", "report"), fp64)
        types |= dict.fromkeys(("loss", "norm", "skip", "divisor"), fp32) | dict(clip="fp32")
        constants = dict(Z=limits.z, NARROWEST=limits.narrowest, EARLY_STEPS=limits.early_steps,
                         EARLY_TIMES=limits.early_times, OUTLIERS=True, HALTS=True, HAS_FLAGS=True,
                         WINDOW=tile.n, HALVINGS=tile.n.bit_length() - 1)
    else:
        fn = getattr(layernorm, kernel.removesuffix("_bias"))
        wide = ("x", "total", "weight", "bias", "branch_bias", "mean", "rstd", "dtotal", "dx",
                "partial")
        types = dict.fromkeys(wide, fp32) | dict.fromkeys(("branch", "y", "dy", "dbranch"), bf16)
        types |= dict(C=i32, N=i32, width=i32, eps="fp32")
        constants = dict(BLOCK=size, BRANCH=True, DTOTAL=True, DBRANCH=True)
        constants |= dict(BRANCH_BIAS=kernel.endswith("_bias"), STAGES=tile.stages)
    names = fn.arg_names
    return (
        fn,
        {name: types[name] for name in names if name in types},
        {name: constants[name] for name in names if name in constants},
    )
