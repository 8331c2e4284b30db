"""What holds the kernels to their limits: the cards' figures, the tiles, the audit and its gate.

pytest tests/test_kernels_audit.py
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from kernels import audit, bench, sass, tiles
from kernels.cards import CARDS, by_name
from kernels.roofline import GPT2, Work, floor, loop_floor, work


def test_a_card_is_found_by_its_whole_name():
    assert by_name("NVIDIA H100 80GB HBM3") is CARDS["h100"]
    assert by_name("NVIDIA A100-SXM4-80GB") is CARDS["a100"]
    assert by_name("NVIDIA GeForce RTX 4090") is CARDS["4090"]
    assert by_name("AMD Instinct MI300X") is CARDS["mi300x"]
    assert by_name("Tesla T4") is CARDS["t4"]
    assert by_name("NVIDIA GH200 480GB") is CARDS["gh200"]
    assert by_name("NVIDIA RTX PRO 6000 Blackwell Workstation Edition") is CARDS["rtx-pro-6000"]
    for other in (
        "NVIDIA H100 PCIe",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100",
        "NVIDIA RTX A6000 Laptop GPU",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    ):
        assert by_name(other) is None


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_cards_rates_agree_with_its_clock(card):
    """A tensor core does a power of two of FLOP per SM and clock: a wrong digit would show."""
    per_clock = card.bf16_flops / card.sms / card.clock_hz
    nearest = min((512, 1024, 2048, 4096, 8192), key=lambda power: abs(power - per_clock))
    assert per_clock == pytest.approx(nearest, rel=0.02)
    assert CARDS[card.key] is card
    if card.has_bf16:
        assert card.bf16_flops == card.fp16_flops == pytest.approx(2 * card.tf32_flops, rel=0.02)
        assert card.arch in tiles.ARCHS
    else:
        assert card.arch not in tiles.ARCHS and card.tf32_flops == 0
    assert card.shared_per_cta <= card.shared_per_sm
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.sms = 1


def test_tiles_cover_the_sequence_without_a_gap():
    """A kernel's unmasked loop ends where its diagonal begins: one side has to divide the other."""
    for (kernel, _, size), row in tiles.TABLE.items():
        for tile in row:
            if kernel.startswith("attention"):
                long, short = (tile.n, tile.m) if "dkdv" in kernel else (tile.m, tile.n)
                assert long % short == 0, (kernel, tile)
                if tile.delayed:
                    assert kernel == "attention_forward" and tile.m == tile.n, tile
            elif kernel.startswith("layer_norm"):
                assert tile.n == size
    for kernel in {kernel for kernel, _, _ in tiles.TABLE}:
        archs = {arch for name, arch, _ in tiles.TABLE if name == kernel}
        assert archs == set(tiles.ARCHS)


def test_rows_between_the_tables_sizes_take_the_next_longer_ones_tile():
    assert tiles.pick("layer_norm_forward", "sm_90", 64).warps == 4
    assert tiles.pick("cross_entropy", "sm_80", 128).n == 4096
    assert tiles.pick("layer_norm_backward", "sm_100", 8192).warps == 8


SASS = """
.L_x_0:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0040*/                   MUFU.EX2 R9, R9 ;
        /*0048*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   STL [R1], R9 ;
""" + "        /*0060*/                   FFMA R1, R2, R3, R4 ;\n" * 16 + """
        /*0160*/               @P1 BRA `(.L_x_1) ;
        /*0170*/               @P2 BRA `(.L_x_0) ;
        /*0178*/               @UP0 UTMASTG.3D [UR4], [UR8] ;
        /*0180*/                   EXIT ;
"""


def test_machine_code_is_read():
    code = sass.parse(SASS)
    (loop,) = code.loops  # the outer one holds another
    assert loop.opcodes["FFMA"] == 16 and loop.count == 22
    assert loop.load_widths == [128] and code.load_widths == [16, 128]
    assert loop.narrow_loads == 0 and code.narrow_loads == 1
    assert loop.spills == 1 and loop.asynchronous == "cp.async"
    assert code.asynchronous == "cp.async tma-store"
    assert loop.mma == {"HGMMA": 1} and loop.mma_waits == 1
    assert loop.mma_flops(warps=4) == 2 * 64 * 64 * 16
    assert sass.Instruction("HMMA", "HMMA.16816.F32.BF16", None).mma_flops == 2 * 16 * 8 * 16


def test_occupancy_by_hand():
    """188 registers: 6,144 a warp, of 65,536: ten warps, two CTAs of four."""
    h100 = CARDS["h100"]
    assert audit.ctas_per_sm(h100, 4, 188, 49184, 0) == (2, "registers")
    assert audit.ctas_per_sm(h100, 4, 32, 0, 0) == (16, "warps")
    assert audit.ctas_per_sm(h100, 4, 64, 100 * 1024, 0) == (2, "shared")
    assert audit.ctas_per_sm(CARDS["b200"], 4, 64, 1024, 256) == (2, "tmem")


GOOD = dict(
    kernel="attention_forward", arch="sm_90", size=64, tile="128x64 w4 s2 tma", default=True,
    registers=188, stack=0, spills=0, shared_bytes=49184, tmem_columns=0, mma="HGMMA",
    async_copies="tma", ctas_per_sm=2, limited_by="registers", load_widths=[],
    loops=[dict(mma_waste=1.0, narrow_loads=0)],
)


@pytest.mark.parametrize(
    "broken, word",
    [
        (dict(spills=2), "spills"),
        (dict(stack=8), "spills"),
        (dict(shared_bytes=227 * 1024 + 1), "shared memory"),
        (dict(registers=191), "191 registers"),
        (dict(ctas_per_sm=1), "1 CTAs/SM"),
        (dict(mma="HMMA"), "not HGMMA"),
        (dict(arch="sm_100"), "not UTCHMMA"),
        (dict(kernel="attention_dkdv", registers=191, ctas_per_sm=1), "1 CTA/SM"),
        (dict(load_widths=[16, 128]), "loads of [16] bits"),
        (dict(kernel="layer_norm_forward", load_widths=[32, 128]), "loads of [32] bits"),
        (
            dict(kernel="attention_dkdv", loops=[dict(mma_waste=1.0, narrow_loads=3)]),
            "3 loads of less than 128 bits",
        ),
        (dict(loops=[dict(mma_waste=2.0, narrow_loads=0)]), "repeat each other"),
        (
            dict(kernel="column_sums",
                 loops=[dict(mma_waste=None, narrow_loads=0, barriers=n) for n in (0, 3)]),
            "threads wait for each other",
        ),
        (dict(kernel="layer_norm_backward", tile="1x1024 w4 s3"), "on their way"),
        (
            dict(
                tile="128x128 w8 s2 tma delayed",
                loops=[dict(mma_waste=1.0, narrow_loads=0, mma_waits=2)],
            ),
            "waits for p v",
        ),
    ],
)
def test_the_gate_shuts(broken, word):
    assert audit.faults(GOOD) == []
    assert any(word in fault for fault in audit.faults(GOOD | broken))


def test_the_gate_lets_two_row_statistics_through():
    two = [dict(mma_waste=1.0, narrow_loads=2)]
    row = GOOD | dict(kernel="attention_dkdv", load_widths=[32, 128], loops=two)
    assert audit.faults(row) == []


def test_tuning_goes_through_every_row_of_a_gpu(monkeypatch, capsys):
    """Without a GPU: a stopwatch that shows every later candidate to be faster."""
    table, shapes, clock = dict(tiles.TABLE), [], iter(range(1000, 0, -1))

    def contestants(ops, shape):
        shapes.append(shape)
        return [(name, "triton", lambda: None, None) for name in bench.CALLED_BY.values()]

    monkeypatch.setattr(tiles, "arch", lambda device: "sm_90")
    monkeypatch.setattr(bench, "everyone", contestants)
    monkeypatch.setattr(bench, "median", lambda function: float(next(clock)))
    bench.tune(None, GPT2)
    assert tiles.TABLE == table  # as it was
    printed = [line for line in capsys.readouterr().out.splitlines() if line[0] == "("]
    found = eval("{" + "".join(printed) + "}", {"Tile": tiles.Tile})
    assert found == {
        key: row[::-1] for key, row in table.items()
        if key[1] == "sm_90" and "fp32" not in key[0]
        and key[0] not in ("judge_step", "embedding_join")
    }
    assert {s.C // s.H for s in shapes[:6]} == {64, 128}
    assert [s.C for s in shapes[6:10]] == [768, 1600, 4096, 8192]


def test_floors_by_hand():
    a100, h100 = CARDS["a100"], CARDS["h100"]
    flops = 2 * 64 * 12 * 1024**2 * 64  # two products, causal half
    assert work("attention_forward", GPT2).flops == flops
    assert floor(Work(0, flops), a100) == (flops / 312e12, "tensor")
    assert floor(Work(3352e9, flops), h100) == (1.0, "memory")
    # T = 1,024 in tiles of 128 x 64: 0 + 2 + ... + 14 whole steps, and two for each diagonal.
    cycles = 64 * 12 * (56 * 500 + 16 * 600)
    seconds = loop_floor("attention_forward", GPT2, 128, 64, [500, 600], h100)
    assert seconds == pytest.approx(cycles / 132 / 1.83e9)
    # Keys in tiles of 64, and steps of 32 queries: 30 + 28 + ... + 0 whole, two for each diagonal.
    cycles = 64 * 12 * (240 * 300 + 32 * 400)
    seconds = loop_floor("attention_dkdv", GPT2, 32, 64, [300, 400], h100)
    assert seconds == pytest.approx(cycles / 132 / 1.83e9)


def test_the_audit_compiles_and_remembers(tmp_path):
    """Two architectures' cross_entropy and attention, for real, in a process of its own."""
    pytest.importorskip("triton")
    code = """
import json, sys
from kernels import audit
cases = [c for c in audit.cases(["sm_90", "gfx942"]) if c.size in (64, 65536)
         and c.kernel in ("attention_forward", "cross_entropy") and (c.default or c.tile.delayed)]
print(json.dumps(audit.audit_all(cases)))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= dict(XDG_CACHE_HOME=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "triton"))

    def run() -> list[dict]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout)

    rows = run()
    assert {(r["kernel"], r["arch"]) for r in rows} == {
        (kernel, arch)
        for kernel in ("attention_forward", "cross_entropy")
        for arch in ("sm_90", "gfx942")
    }
    (delayed,) = (row for row in rows if "delayed" in row["tile"])
    assert [loop["mma_waits"] for loop in delayed["loops"]] == [1]  # for q k^T, and not for p v
    assert delayed["async_copies"] == "tma tma-store" and not delayed["spills"]
    for row in rows:
        assert audit.faults(row) == [] or row is delayed, row
        assert {"tile", "default", "registers", "spills", "shared_bytes", "mma"} <= set(row)
    (cache,) = (tmp_path / "gpt2-kernels").iterdir()
    remembered = json.loads(cache.read_text())
    remembered["attention_forward sm_90 64 64x64 w4 s2 tma"]["registers"] = 1
    cache.write_text(json.dumps(remembered))
    assert 1 in [row["registers"] for row in run()]  # read, not compiled again


def test_another_triton_has_tiles_of_its_own_where_the_table_says_so():
    pinned = tiles.table((3, 7))
    for triton, rows in tiles._OTHER_TRITON.items():
        theirs = tiles.table(triton)
        assert theirs.keys() == pinned.keys()
        differ = {key for key in pinned if theirs[key] != pinned[key]}
        assert differ == {(k, arch, size) for k, archs, size in rows for arch in archs.split()}
