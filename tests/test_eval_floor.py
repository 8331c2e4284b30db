"""The counted floor: right by a slow twin, and shown for runs whose text is here unchanged."""

import json
import math

import numpy as np
import pytest

from eval.report import floor
from eval.report.page import write_report
from eval.report.record import read_record
from train_gpt2 import train


def slowly(train: list[int], val: list[int], V: int, k: float) -> float:
    """bigram_loss for one k, pair by pair."""
    total = 0.0
    for x, y in zip(val, val[1:], strict=False):
        pairs = sum(a == x and b == y for a, b in zip(train, train[1:], strict=False))
        firsts = train[:-1].count(x)
        unigram = (train.count(y) + 1) / (len(train) + V)
        total -= math.log((pairs + k * unigram) / (firsts + k))
    return total / (len(val) - 1)


def test_counting_agrees_with_its_slow_twin():
    draw = np.random.default_rng(0)
    train = draw.integers(0, 9, 200).astype(np.uint16)
    val = draw.integers(0, 11, 50).astype(np.uint16)  # 9 and 10 were never seen
    right = min(slowly(train.tolist(), val.tolist(), 11, k) for k in floor.PRIORS)
    # Fifty logarithms of doubles: 1e-15 each.
    assert floor.bigram_loss(train, val, 11) == pytest.approx(right, abs=1e-13)


def test_probabilities_over_all_tokens_add_up_to_one():
    train = np.array([0, 1, 2, 1, 0], dtype=np.uint16)
    for x in range(4):  # 3 was never seen
        p = [math.exp(-slowly(train.tolist(), [x, y], 4, 3.0)) for y in range(4)]
        assert sum(p) == pytest.approx(1, abs=1e-12)


@pytest.fixture
def finished(tiny):
    config = tiny(steps=1, eval_every=1)
    assert train(config) == 0
    return config


def test_a_run_on_a_text_shows_its_floor(finished, tmp_path):
    run = tmp_path / "tiny"
    (said,) = floor.counted_floor(read_record(run)).values()
    page, _ = write_report([run])
    assert said in page.read_text()
    # 500 lines of the same words: the next token is nearly certain, and a model of one step is
    # still at ln 50257.
    assert 0 < float(said.split(",")[0]) < 3


@pytest.mark.parametrize("change", ["text", "gone", "shards", "foreign"])
def test_no_floor_where_the_text_is_another_or_not_here(finished, tmp_path, corpus_file, change):
    path = tmp_path / "tiny" / "config.json"
    description = json.loads(path.read_text())
    data = description["config"]["data"]
    if change == "text":
        data["text"] = str(tmp_path / "other.txt")
        (tmp_path / "other.txt").write_text(corpus_file.read_text()[::-1])
    if change == "gone":
        data["text"] = str(tmp_path / "gone.txt")
    if change == "shards":
        data["dir"] = str(tmp_path)
    if change == "foreign":
        description["config"]["model"] = "large"
    path.write_text(json.dumps(description))
    assert floor.counted_floor(read_record(tmp_path / "tiny")) == {}
