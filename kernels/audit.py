"""What every kernel takes of every GPU, read off the machine code: no GPU needed.

    python -m kernels.audit                    # all architectures: some 200 s of CPU time
    python -m kernels.audit --arch sm_90 gfx942 --json
    python -m kernels.audit --candidates       # the tiles too that do not ship

Compiles each kernel with its tile of kernels/tiles.py for each architecture, as training calls it
(bf16 activations, fp32 residual stream and weights), disassembles it, and prints a line for each:
registers, spills, shared memory, matrix instructions, CTAs per SM, the inner loop and how long it
keeps each pipe busy. Then, at GPT-2 124M with 64 x 1,024 tokens, the bytes and FLOP of each kernel
and the time below which it cannot come. Exits with 1 where a tile that ships breaks a limit of
`faults()`. Results are kept in ~/.cache (XDG_CACHE_HOME) until a source or Triton changes.

The cycles assume that every pipe overlaps with every other: they rank tiles and catch mistakes,
and predict no time. Nothing here was measured on a GPU.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from kernels import sass, tiles
from kernels.cards import CARDS, Card
from kernels.launches import Case, cases, launch
from kernels.roofline import GPT2, floor, loop_floor, work

# The card that stands for an architecture.
CARD = dict(sm_80="a100", sm_86="3090", sm_89="4090", sm_90="h100", sm_100="b200", sm_120="5090",
            gfx942="mi300x")

ATTENTION = ("attention_forward", "attention_dq", "attention_dkdv")
IDENTITY = ("kernel", "arch", "size", "default")  # of a row of the table; one of these ships

# Per SM and clock, from "Arithmetic Instructions" in the CUDA C++ Programming Guide: exponentials
# and their like on every architecture; fp32 lanes are on the card; four schedulers issue one each.
MUFU_LANES, ISSUES = 16, 4

# Kernels whose inner loop also reads one or two fp32 statistics a row (log-sum-exp and delta, mean
# and rstd), and the only loads there that may be of 32 bits: as many instructions a pass.
# attention_dkdv's 32 or 64 rows are 128 or 256 bytes, fewer than its threads could take 128 bits
# each of; layer_norm_backward's are one number for all threads, qk_norm_rotary_backward's for 4
# or 8 of them. Through a tensor descriptor dkdv's pass is longer: 350 instructions for 321 on
# sm_90, 363 for 356 on sm_100.
STATISTICS = {"attention_dkdv": 2, "layer_norm_backward": 2, "layer_norm_backward_bias": 2,
              "qk_norm_rotary_backward": 1}

# Kernels that add up columns: each thread for itself, and with others once, behind the loop. With a
# sum across threads in it an H200 took 15 times as long for column_sums.
SUMS = ("gelu_backward", "column_sums")


def compile_offline(case: Case):
    """Triton's compiled kernel. Pointers, widths and count are multiples of 16, as in training."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # A seventh of the time, and the machine code is the same without.
    triton.knobs.compilation.disable_line_info = True
    fn, types, constants = launch(case)
    signature = {name: types.get(name, "constexpr") for name in fn.arg_names}
    aligned = [
        i
        for i, name in enumerate(fn.arg_names)
        if signature[name][0] == "*" or name in ("C", "W", "W1", "W2", "width", "count",
                                          "stride")
    ]
    source = ASTSource(
        fn=fn,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    amd = case.arch.startswith("gfx")
    target = GPUTarget("hip", case.arch, 64) if amd else GPUTarget("cuda", int(case.arch[3:]), 32)
    options = dict(num_warps=case.tile.warps, num_stages=case.tile.stages)
    if case.kernel == "judge_step":
        options["enable_fp_fusion"] = False
    return triton.compile(source, target=target, options=options)


def ctas_per_sm(card: Card, warps: int, registers: int, shared: int, tmem: int) -> tuple[int, str]:
    """How many CTAs an SM holds at once, and what limits them.

    Registers are handed to a warp in units of 256; every CTA costs 1 KiB of shared memory beside
    its own (CUDA C++ Programming Guide); sm_100 has 512 columns of tensor memory, in powers of two.
    """
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    limits = {
        "warps": card.warps_per_sm // warps,
        "ctas": card.ctas_per_sm,
        "registers": card.registers_per_sm // per_warp // warps,
        "shared": card.shared_per_sm // (shared + 1024),
    }
    if tmem:
        limits["tmem"] = 512 // max(32, 1 << (tmem - 1).bit_length())
    limit = min(limits, key=limits.__getitem__)
    return limits[limit], limit


def tile_flops(case: Case) -> int:
    """What the matrix products of one pass of the inner loop come to."""
    products = dict(attention_forward=2, attention_dq=3, attention_dkdv=4).get(case.kernel, 0)
    return products * 2 * case.tile.m * case.tile.n * case.size


def loop_row(case: Case, card: Card, loop: sass.Code) -> dict:
    """Instructions of one pass of a loop, and the cycles for which it keeps each pipe of an SM."""
    warps = case.tile.warps
    flops = loop.mma_flops(warps) or (tile_flops(case) if loop.mma else 0)
    lanes = card.fp32_flops / card.sms / card.clock_hz / 2
    fp32 = sum(loop.opcodes[op] for op in sass.FP32)
    cycles = dict(
        tensor=flops / (card.bf16_flops / card.sms / card.clock_hz),
        issue=loop.count * warps / ISSUES,
        mufu=loop.opcodes["MUFU"] * warps * 32 / MUFU_LANES,
        fp32=fp32 * warps * 32 / lanes,
    )
    return dict(
        instructions=loop.count,
        mma=sum(loop.mma.values()),
        mma_waits=loop.mma_waits,
        load_widths=loop.load_widths,
        narrow_loads=loop.narrow_loads,
        barriers=loop.opcodes["BAR"],
        mma_waste=loop.mma_flops(warps) / tile_flops(case) if loop.mma_flops(warps) else None,
        cycles={pipe: round(value) for pipe, value in cycles.items()},
    )


def audit(case: Case) -> dict:
    """One row of the table."""
    compiled, card = compile_offline(case), CARDS[CARD[case.arch]]
    row = dict(
        kernel=case.kernel,
        arch=case.arch,
        size=case.size,
        tile=str(case.tile),
        default=case.default,
        shared_bytes=compiled.metadata.shared,
    )
    if case.arch.startswith("gfx"):
        return row | _amd(compiled.asm["amdgcn"])
    code = sass.disassemble(compiled.asm["cubin"])
    tmem = getattr(compiled.metadata, "tmem_size", 0) or 0
    warps = case.tile.warps
    ctas, limit = ctas_per_sm(card, warps, code.registers, compiled.metadata.shared, tmem)
    loops = code.loops
    if any(loop.mma for loop in loops):
        loops = [loop for loop in loops if loop.mma]
    return row | dict(
        registers=code.registers,
        stack=code.stack,
        spills=code.spills,
        tmem_columns=tmem,
        mma=" ".join(code.mma),
        async_copies=code.asynchronous,
        ctas_per_sm=ctas,
        limited_by=limit,
        load_widths=sorted({w for part in loops or [code] for w in part.load_widths}),
        loops=[loop_row(case, card, loop) for loop in loops],
    )


def _amd(assembly: str) -> dict:
    """What the metadata of a gfx942 kernel says; its loops are not read."""

    def field(name: str) -> int:
        (value,) = re.findall(rf"\.{name}:\s*(\d+)", assembly)
        return int(value)

    return dict(
        registers=field("vgpr_count"),
        stack=field("private_segment_fixed_size"),
        spills=field("vgpr_spill_count") + field("sgpr_spill_count"),
        tmem_columns=0,
        mma="MFMA" if "v_mfma" in assembly else "",
        async_copies="",
        ctas_per_sm=None,
        limited_by="",
        load_widths=[],
        loops=[],
    )


def faults(row: dict) -> list[str]:
    """The limits that a tile breaks; none may, of those that ship. One sentence for each."""
    found = []
    kernel, arch, card = row["kernel"], row["arch"], CARDS[CARD[row["arch"]]]
    if row["spills"] or row["stack"]:
        found.append(f"spills: {row['spills']} instructions, {row['stack']} bytes of stack")
    if row["shared_bytes"] > card.shared_per_cta:
        found.append(f"{row['shared_bytes']} bytes of shared memory, of {card.shared_per_cta}")
    mma = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}.get(arch, "HMMA")
    if kernel in ATTENTION and row["mma"] != mma:
        found.append(f"matrix instructions {row['mma'] or 'none'}, not {mma}")
    if arch.startswith("gfx"):
        return found
    if kernel == "attention_forward" and arch == "sm_90":
        most = 190 if tiles.triton_version() < (3, 8) else 200  # 194 there, and still two CTAs
        if row["registers"] > most or row["ctas_per_sm"] < 2:
            found.append(f"{row['registers']} registers ({most}), {row['ctas_per_sm']} CTAs/SM (2)")
    if kernel in ("attention_dq", "attention_dkdv"):
        if row["registers"] > 190 and row["ctas_per_sm"] < 2:
            found.append(f"{row['registers']} registers (190) at {row['ctas_per_sm']} CTA/SM (2)")
    allowed = {32, 128} if kernel in STATISTICS else {128}
    if kernel == "judge_step":  # 128 numbers, once a step
        allowed = {32, 64}
    if kernel.startswith("embedding"):  # tokens and their places, each for a whole row
        allowed = {32, 64, 128}
    narrow = set(row["load_widths"]) - allowed
    if narrow and not kernel.endswith("_fp32"):
        found.append(f"loads of {sorted(narrow)} bits in the inner loop")
    if kernel in STATISTICS:
        count, most = max((i["narrow_loads"] for i in row["loops"]), default=0), STATISTICS[kernel]
        if count > most and tiles.triton_version() >= (3, 7):  # 3.6 reads them singly: 4 to 64
            found.append(f"{count} loads of less than 128 bits in the inner loop, of {most}")
    if kernel in SUMS and any(loop["barriers"] for loop in row["loops"]):
        found.append("threads wait for each other in the inner loop")
    if kernel.startswith("layer_norm_backward") and row["tile"][-1] != "1":  # 1x1024 w4 s3
        if "cp.async" not in row["async_copies"]:
            found.append("rows are not on their way ahead of their turn")
    if any((loop["mma_waste"] or 1) > 1 for loop in row["loops"]):
        found.append("warps repeat each other's matrix products")
    if "delayed" in row["tile"] and any(loop["mma_waits"] > 1 for loop in row["loops"]):
        found.append("it waits for p v too before it goes on")
    return found


def cache_file() -> Path:
    """Where the rows of these very sources and this Triton are kept."""
    import triton

    here = Path(__file__).parent
    kernels = ("attention columns column_sums cross_entropy decode_attention draw embedding gelu "
               "judge_step layernorm qk_norm_rotary relu_squared verdict")
    names = f"{kernels} tiles cards sass launches audit".split()
    sources = b"".join((here / f"{name}.py").read_bytes() for name in names)
    key = hashlib.sha256(sources + triton.__version__.encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "gpt2-kernels" / f"audit-{key}.json"


def audit_all(wanted: list[Case]) -> list[dict]:
    """Rows of all cases, from the cache or compiled, one process to a core."""
    file = cache_file()
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missing = [case for case in wanted if case.id not in known]
    if missing:
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            rows = pool.map(audit, missing, chunksize=1)
            for done, (case, row) in enumerate(zip(missing, rows, strict=True), 1):
                known[case.id] = row
                if sys.stderr.isatty():
                    print(f"\r{done}/{len(missing)} compiled", end="", file=sys.stderr)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(known), encoding="utf-8")
        partial.replace(file)
    return [known[case.id] | {"default": case.default} for case in wanted]


def loop_text(loop: dict) -> str:
    """n=499 (mufu 544: tensor 0.94): instructions, the busiest pipe, the tensor cores' share."""
    cycles = loop["cycles"]
    busiest = max(cycles, key=cycles.__getitem__)
    share = f": tensor {cycles['tensor'] / cycles[busiest]:.2f}" if cycles["tensor"] else ""
    return f"n={loop['instructions']} ({busiest} {cycles[busiest]}{share})"


def table(rows: list[dict]) -> str:
    head = (
        f"{'kernel':22} {'arch':6} {'size':>5} {'tile (* ships)':20} {'reg':>3} {'spill':>5} "
        f"{'shared':>6} {'CTAs/SM':12} {'mma':7} {'copies':22} {'load bits':9} inner loops"
    )
    lines = [head]
    for r in rows:
        name = r["tile"] + (" *" if r["default"] else "")
        ctas = f"{r['ctas_per_sm']} {r['limited_by']}" if r["ctas_per_sm"] else "-"
        widths = " ".join(map(str, r["load_widths"])) or "-"
        lines.append(
            f"{r['kernel']:22} {r['arch']:6} {r['size']:5} {name:20} {r['registers']:3} "
            f"{r['spills']:5} {r['shared_bytes']:6} {ctas:12} {r['mma'] or '-':7} "
            f"{r['async_copies'] or '-':22} {widths:9} {'; '.join(map(loop_text, r['loops']))}"
        )
    return "\n".join(lines)


def floors(rows: list[dict]) -> list[dict]:
    """Bytes, FLOP and least times of each kernel at GPT-2 124M with 64 x 1,024 tokens."""
    found = []
    norms = ("layer_norm_forward", "layer_norm_backward")
    speedrun = [
        f"{kernel}_{direction}"
        for kernel in ("qk_norm_rotary", "relu_squared")
        for direction in ("forward", "backward")
    ]
    for kernel in (*ATTENTION, *norms, "cross_entropy", "lm_head", *speedrun):
        need = work(kernel, GPT2)
        row: dict[str, Any] = dict(
            kernel=kernel, megabytes=need.bytes / 1e6, gigaflop=need.flops / 1e9
        )
        for arch in ("sm_80", "sm_90", "sm_100"):
            card = CARDS[CARD[arch]]
            seconds, by = floor(need, card)
            row[card.key] = dict(microseconds=seconds * 1e6, by=by)
            if kernel.startswith("attention"):
                ships = (kernel, arch, 64, True)
                (r,) = (r for r in rows if tuple(r[key] for key in IDENTITY) == ships)
                m, n = map(int, r["tile"].split()[0].split("x"))  # 128x64 w4 s2
                cycles = [float(max(loop["cycles"].values())) for loop in r["loops"]]
                loop = loop_floor(kernel, GPT2, m, n, cycles, card)
                row[card.key]["loop_microseconds"] = loop * 1e6
        found.append(row)
    return found


def floor_table(found: list[dict]) -> str:
    keys = [key for key in found[0] if key in CARDS]
    lines = [f"{'kernel':22} {'MB':>6} {'GFLOP':>6}" + "".join(f"{k:>32}" for k in keys)]
    for row in found:
        line = f"{row['kernel']:22} {row['megabytes']:6.0f} {row['gigaflop']:6.0f}"
        for key in keys:
            at = row[key]
            loop = at.get("loop_microseconds")
            text = f"{at['microseconds']:.0f} us {at['by']}"
            if loop:
                text += f", loops {loop:.0f}"
            line += f"{text:>32}"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=tiles.ARCHS, default=list(tiles.ARCHS))
    parser.add_argument("--json", action="store_true", help="rows instead of tables")
    parser.add_argument("--candidates", action="store_true", help="tiles that do not ship too")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed: pip install triton")
    wanted = [case for case in cases(args.arch) if case.default or args.candidates]
    rows = [row | {"faults": faults(row)} for row in audit_all(wanted)]
    broken = [row for row in rows if row["default"] and row["faults"]]
    if args.json:
        print(json.dumps(rows, indent=1))
        return bool(broken)
    print(table(rows))
    if {"sm_80", "sm_90", "sm_100"} <= set(args.arch):
        print("\nGPT-2 124M, 64 x 1,024 tokens: the least a card needs, nothing of it measured")
        print(floor_table(floors(rows)))
    for row in broken:
        name = f"{row['kernel']} {row['arch']} {row['size']} {row['tile']}"
        print(f"BROKEN: {name}: {'; '.join(row['faults'])}")
    print(f"\n{len(rows)} tiles, {len(broken)} of those that ship break a limit")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
