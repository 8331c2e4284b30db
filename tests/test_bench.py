"""The bench pairs, sums up and prints what was timed; and times the same work both ways.

    pytest tests/test_bench.py
"""

import json
import os
import time
from functools import partial

import pytest
import torch

from model.config import GPTConfig
from tests.bench import __main__ as bench
from tests.bench import growth, hellaswag, plain, sampling, saving, training
from tests.bench.pairs import (
    Done,
    Row,
    Turn,
    keep,
    measure,
    rate,
    summarise,
    table,
    timed,
)

QUICK = training.QUICK


def row(**changes) -> Row:
    return Row(**{"name": "training", "unit": "tokens", "plain": counting, "ours": counting}
               | changes)


def counting():
    """A way whose value is how many turns it had."""
    turns = iter(range(100))
    return lambda: Done(10, next(turns), seconds=2.0)


def failing():
    return lambda: 1 / 0


# ---- pairs ----

def test_a_turn_is_set_against_the_turn_beside_it():
    """The machine is half as fast in the second pair: both are, and the ratio stays."""
    slow = [Turn(100, 0, 1.0, 1.0), Turn(100, 0, 2.0, 1.0), Turn(100, 0, 1.0, 1.0)]
    fast = [Turn(100, 0, 0.25, 0.5), Turn(100, 0, 0.5, 0.5), Turn(100, 0, 0.2, 0.5)]
    limit = [Turn(100, 0, 0.125, 0.1), Turn(100, 0, 0.25, 0.1), Turn(100, 0, 0.2, 0.1)]
    found = summarise(row(), slow, fast, limit)
    assert found.ratios == [4, 4, 5] and found.cpu_ratios == [2, 2, 2]
    assert (found.plain, found.ours, found.share_of_limit) == (100, 400, 0.5)


def test_work_counts_where_the_ways_do_different_amounts_of_it():
    found = summarise(row(), [Turn(10, 0, 1, 1)], [Turn(80, 0, 2, 2)], [])
    assert found.ratios == found.cpu_ratios == [4] and found.share_of_limit is None


def test_ways_that_come_to_different_values_are_an_error():
    a, b = [Turn(1, 10.0, 1, 1)], [Turn(1, 10.02, 1, 1)]
    assert summarise(row(tolerance=0.03), a, b, []).difference == pytest.approx(0.02)
    with pytest.raises(ValueError, match="training: ours and the plain way differ by 0.02"):
        summarise(row(tolerance=0.01), a, b, [])
    with pytest.raises(ValueError, match="differ by nan"):
        summarise(row(tolerance=0.01), a, [Turn(1, float("nan"), 1, 1)], [])


def test_a_row_is_measured_in_processes_that_take_turns():
    found = measure(row(tolerance=0, limit=counting), pairs=3)
    assert found.difference == 0  # each has had as many turns as the other
    assert found.plain == found.ours == 5 and found.ratios == [1, 1, 1]
    assert found.share_of_limit == 1


def test_a_way_that_fails_ends_the_row(capfd):
    with pytest.raises(RuntimeError, match="its error is above"):
        measure(row(ours=failing), pairs=1)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_cpu_time_counts_children_and_not_waiting():
    assert timed(lambda: Done(float(time.sleep(0.05) is None))).cpu < 0.05
    child = timed(lambda: Done(os.system("python3 -c 'sum(range(5_000_000))'") + 1.0))
    assert child.cpu > 0.01


# ---- what is printed and kept ----

def test_the_table_has_a_line_for_each_row():
    found = summarise(row(), [Turn(1000, 0, 4, 4)] * 3,
                      [Turn(1000, 0, s, s) for s in (1.0, 1.25, 0.8)], [Turn(1000, 0, 0.5, 1)] * 3)
    lines = table([found]).splitlines()
    assert len(lines) == 2 and lines[0].split() == [
        "plain", "ours", "ratio", "(spread)", "in", "CPU", "time", "of", "the", "limit"]
    assert lines[1].split("  ") == ["training", "250 tokens/s", "1,000 tokens/s",
                                    "4.00 (3.20 to 5.00)", "4.00 (3.20 to 5.00)", "50%"]


@pytest.mark.parametrize(("value", "text"), [
    (0.1234, "0.123"), (12.345, "12.3"), (1234.5, "1,234")])
def test_rates_have_three_digits(value, text):
    assert rate(value) == text


def test_json_holds_the_machine_and_every_ratio(tmp_path):
    found = summarise(row(), [Turn(1, 0, 4, 4)], [Turn(1, 0, 1, 2)], [])
    keep([found], tmp_path / "new" / "bench.json", bench.machine())
    content = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert content["rows"][0]["ratios"] == [4] and content["rows"][0]["cpu_ratios"] == [2]


# ---- rows: the plain way does the same work ----

def test_the_plain_network_is_this_one():
    """fp64: the same sums in another order, and no more than 1e-12 of logits below 1."""
    torch.manual_seed(0)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, n_ctx=12, n_vocab=130)
    ours = training.GPT(config).double()
    theirs = plain.PlainGPT(config).double()
    theirs.load_state_dict(ours.state_dict())
    idx = torch.randint(130, (3, 12))
    assert (ours(idx) - theirs(idx)).abs().max() < 1e-12


def test_plain_steps_and_ours_train_the_same_model():
    """Losses of four steps in fp32: 1e-5 where they are near 6, as rounding accumulates."""
    (one,) = training.rows(quick=True)
    theirs, ours = one.plain(), one.ours()
    for _ in range(4):
        a, b = theirs(), ours()
        assert a.work == b.work == 64 and b.value == pytest.approx(a.value, abs=1e-5)
    assert a.value < 6.15  # from ln 500 = 6.21


def test_plain_samples_and_ours_are_the_same_text():
    (one,) = sampling.rows(quick=True)
    assert one.plain()() == one.ours()()


def test_questions_one_at_a_time_and_ours_have_the_same_losses():
    asked = partial(hellaswag.one_at_a_time, QUICK, 3)()()
    packed = partial(hellaswag.packed, QUICK, "fp32", 3)()()
    assert packed.work == asked.work == 3 and packed.value == pytest.approx(asked.value, abs=1e-5)


def test_the_plain_way_saves_what_ours_saves(tmp_path, monkeypatch):
    """Weights, two moments of each and the step: what is timed is the same to write."""
    monkeypatch.setattr(saving, "scratch", lambda: tmp_path)
    (one,) = saving.rows(quick=True)
    assert one.plain()().work == one.ours()().work == 1
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    kept = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    numbers = sum(x.numel() for x in kept["model"].values())
    assert sum(x.numel() for state in kept["optimizer"] for x in state.values()) >= 2 * numbers
    sizes = [(checkpoint / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer")]
    assert sizes[0] <= 4 * numbers + 10_000 and sizes[1] > 1.9 * sizes[0]


# ---- growth ----

def test_a_straight_line_is_told_from_one_that_bends():
    xs = [1, 10, 100, 1000]
    assert growth.judge(xs, [2 * x for x in xs], "") == "straight in log-log with slope 1.00"
    assert growth.judge(xs, [3 * x**0.5 for x in xs], "").endswith("slope 0.50")
    bent = growth.judge(xs, [100 + x for x in xs], "a fixed part comes first")
    assert bent == ("not straight: the slope is 0.04 at the small end and 0.74 at the large one"
                    ". What bends it by nature: a fixed part comes first")


def test_a_curve_is_drawn(tmp_path):
    one = growth.Measured("batch", "sequences", [1, 2, 4], [1.0, 2.0, 4.0], [90.0, 95.0, 105.0],
                          "straight in log-log with slope 1.00", "not straight: ...")
    growth.draw(one, tmp_path / "growth_batch.png")
    assert (tmp_path / "growth_batch.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("make", [growth.against_shards, growth.against_questions,
                                  growth.against_size])
def test_a_point_can_be_measured_again_and_again(make):
    work = make(1)
    assert work().value > 1 and work().value > 1  # MiB
