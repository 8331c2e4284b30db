"""Attention's tiles in groups of heads, longest first: the same bits, and SMs that end together.

pytest tests/test_kernels_schedule.py
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

from collections import Counter

import pytest
import torch
import triton
import triton.language as tl

from kernels import operators
from kernels import attention, roofline, schedule, tiles
from kernels.cards import CARDS
from tests.exact import gradients, poison  # noqa: F401

OPS = operators.choose("triton", torch.device("cpu"))
KIB = 2**10


@triton.jit
def places(found, T, group, ROWS: tl.constexpr):
    """found (programs, 2): (tile, head) of each."""
    tile, head = attention._place(T, group, ROWS)
    tl.store(found + 2 * tl.program_id(0), tile)
    tl.store(found + 2 * tl.program_id(0) + 1, head)


# One head and one tile; groups of one, of all, of more than all, and with a smaller one at the end.
@pytest.mark.parametrize("heads, T, group", [
    (1, 1, 1), (5, 200, 1), (6, 200, 3), (7, 200, 3), (5, 64, 2), (4, 130, 4), (3, 129, 128),
])
def test_every_tile_is_visited_once_in_the_models_order(heads, T, group):
    count = triton.cdiv(T, 64)
    found = torch.full((heads * count, 2), -1, dtype=torch.int32)
    places[(heads * count,)](found, T, group, ROWS=64)
    visited = [(tile, head) for tile, head in found.tolist()]
    assert visited == list(schedule.order(heads, count, group))
    assert Counter(visited) == Counter((t, h) for t in range(count) for h in range(heads))


def test_a_group_has_all_its_longest_tiles_first():
    assert list(schedule.order(3, 2, 2)) == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2)]
    assert list(schedule.order(2, 2, 1)) == [(0, 0), (1, 0), (0, 1), (1, 1)]  # head after head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_changes_no_bit(dtype, monkeypatch):
    """3 heads, three tiles each, ragged: one by one, in groups of 2 and 1, and all together."""
    monkeypatch.setattr(tiles, "pick", lambda *_: tiles.Tile(64, 64, 4))
    torch.manual_seed(0)
    T, head_bytes = 150, 2 * 150 * 64 * dtype.itemsize
    qkv, dout = torch.randn(1, T, 3 * 192).to(dtype), torch.randn(1, T, 192).to(dtype)
    found = {}
    for group in (1, 2, 128):
        monkeypatch.setattr(tiles, "l2_bytes", lambda device, group=group: group * head_bytes)
        assert attention._group(qkv, 64) == group
        found[group] = gradients(lambda x: OPS.attention(x, 3), [qkv], [dout])
    for group in (2, 128):
        for one, two in zip(found[1], found[group], strict=True):
            assert one.isfinite().all()
            assert torch.equal(one, two)


def test_groups_are_what_the_l2_cache_holds():
    """Keys and values of a head of 64 are 256 KiB at T = 1,024 in bf16."""
    groups = {"h100": 128, "a100": 128, "b200": 256, "3090": 16}
    for key, group in groups.items():
        assert schedule.heads_in_group(256 * KIB, CARDS[key].l2_bytes) == group
    assert schedule.heads_in_group(256 * KIB, 256 * KIB) == 1
    assert schedule.heads_in_group(257 * KIB, 256 * KIB) == 1  # not even one fits


def test_over_balance_by_hand():
    """Two places. 1, 1, 2 end at 1 and 3, where 2 each would be even; 2, 1, 1 are."""
    assert schedule.over_balance([1, 1, 2], 2) == pytest.approx(0.5)
    assert schedule.over_balance([2, 1, 1], 2) == 0
    assert schedule.over_balance([1], 4) == 3


def test_passes_by_hand():
    """T = 200: 128 queries and steps of 64 keys; 64 keys and steps of 32 queries."""
    assert roofline.passes("attention_forward", 200, 128, 64) == [(0, 2), (2, 2)]
    assert roofline.passes("attention_dkdv", 200, 32, 64) == [(5, 2), (3, 2), (1, 2), (0, 1)]


# Per cent over balance, head after head and longest first: an H100's 132 SMs, an A100's 108.
@pytest.mark.parametrize("card, B, before, after", [
    ("h100", 64, 2.4, 0.2), ("h100", 16, 9.5, 1.3), ("h100", 8, 19.4, 1.3),
    ("a100", 64, 2.0, 0.1), ("a100", 16, 8.1, 0.7), ("a100", 8, 15.5, 2.1),
])
def test_the_forward_pass_in_the_model(card, B, before, after):
    found = [100 * schedule.of_launch("attention_forward", CARDS[card], B, group)
             for group in (1, 128)]
    assert found == pytest.approx([before, after], abs=0.05)


@pytest.mark.parametrize("B, before, after", [(64, 4.4, 0.5), (16, 18.6, 3.1), (8, 37.5, 6.6)])
def test_the_forward_pass_in_the_model_with_128_queries(B, before, after):
    """An H100 by another tile than the one that ships."""
    with tiles.first(("attention_forward", "sm_90", 64), tiles.Tile(128, 64, 4, 3, True)):
        found = [100 * schedule.of_launch("attention_forward", CARDS["h100"], B, group)
                 for group in (1, 128)]
    assert found == pytest.approx([before, after], abs=0.05)


def test_no_kernel_and_no_card_is_slower_by_it():
    for kernel in schedule.KERNELS:
        for card in CARDS.values():
            if not card.has_bf16:
                continue
            group = schedule.heads_in_group(256 * KIB, card.l2_bytes)
            for B in (4, 8, 16, 32, 64):
                before, after = (schedule.of_launch(kernel, card, B, n) for n in (1, group))
                assert after <= before, (kernel, card.key, B)


def test_the_table_names_both_orders():
    lines = schedule.table(["h100"]).splitlines()
    assert len(lines) == 1 + 3 * 3
    assert lines[1].split() == ["attention_forward", "h100", "64", "12,288", "132",
                                "128", "2.4%", "0.2%"]
