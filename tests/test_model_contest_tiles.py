"""Which of its tiles each kernel of our attention runs with, with a made-up clock.

pytest tests/test_model_contest_tiles.py
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import pytest

from kernels import candidates, tiles
from model import contest
from tests.test_launch_agreement import peers
from tests.test_model_contest import OURS, clock, of  # noqa: F401  a fixture

SHIPS, FAST, WRONG = tiles.Tile(64, 64, 4), tiles.Tile(64, 32, 4), tiles.Tile(32, 32, 4)
FORWARD_ROW = ("attention_forward", "sm_80", 64)


@pytest.fixture
def tiled(clock, monkeypatch):  # noqa: F811  the fixture
    """The forward kernel has three tiles: one ships, one is faster, and one is fast and wrong."""
    monkeypatch.setitem(tiles.TABLE, FORWARD_ROW, (SHIPS, FAST, WRONG))
    right = clock.forward("triton", 0.0)

    def forward(qkv, n_head):
        tile = tiles.TABLE[FORWARD_ROW][0]
        clock.now += {SHIPS: 0.31, FAST: 0.25, WRONG: 0.01}[tile]
        out, lse = right(qkv, n_head)
        return out * (2 if tile == WRONG else 1), lse

    monkeypatch.setitem(candidates.FORWARD, "triton", forward)
    return clock


def test_the_fastest_tile_that_is_right_ships_and_takes_part(tiled, capsys):
    chosen, _ = contest.choose_attention(of(tiled), OURS)
    assert chosen["tile of attention_forward"] == "64x32 w4 s1"
    assert tiles.TABLE[FORWARD_ROW] == (FAST, SHIPS, WRONG)
    first, second = capsys.readouterr().out.splitlines()
    assert first == ("tiles: attention_forward 64x32 w4 s1 0.25 ms, 64x64 w4 s1 0.31, "
                     "32x32 w4 s1 out is off by 1.0e+00")
    assert second.startswith("attention: forward triton 0.25 ms, cudnn 0.33")


def test_a_run_that_goes_on_keeps_its_tile(tiled, capsys):
    kept = {"tile of attention_forward": str(SHIPS), "attention_forward": "triton"}
    chosen, _ = contest.choose_attention(of(tiled, **kept), OURS)
    assert chosen["tile of attention_forward"] == str(SHIPS)
    assert tiles.TABLE[FORWARD_ROW][0] == SHIPS
    (line, _) = capsys.readouterr().out.splitlines()
    assert line == "tiles: attention_forward 64x64 w4 s1 0.31 ms as before"


def test_a_run_from_before_tiles_were_raced_keeps_the_one_that_shipped(tiled, monkeypatch):
    monkeypatch.setattr(tiles, "table", lambda triton: {FORWARD_ROW: (SHIPS, FAST, WRONG)})
    tiles.prefer(FORWARD_ROW, FAST)  # another run's, in this process
    chosen, _ = contest.choose_attention(of(tiled, attention_forward="triton"), OURS)
    assert chosen["tile of attention_forward"] == str(SHIPS)


def test_a_kept_tile_that_is_wrong_here_is_replaced(tiled, capsys):
    kept = {"tile of attention_forward": str(WRONG)}
    chosen, _ = contest.choose_attention(of(tiled, **kept), OURS)
    assert chosen["tile of attention_forward"] == str(FAST)
    assert "as before" not in capsys.readouterr().out


def test_ranks_on_other_kinds_of_cards_race_no_tiles(tiled):
    of_another = ["128x64 w4 s3 tma", "64x64 w4 s2 tma"]
    tile_names = contest.choose_tiles(of(tiled, peers(of_another)))
    assert tile_names == {} and tiles.TABLE[FORWARD_ROW] == (SHIPS, FAST, WRONG)
