"""Evaluation: the same figure on any number of ranks and at any batch size."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.loader import Stream, validation_sequences
from data.shards import Shard
from data.tokenizer import encode
from eval import hellaswag, report
from eval.loss import validation_loss
from eval.sample import crop_note, prompt_tokens, stream_text
from launch.errors import Failed
from launch.world import World
from model.gpt2 import GPT, GPTConfig
from tests.running import ALONE


@pytest.fixture(scope="module")
def stream() -> Stream:
    tokens = np.random.RandomState(0).randint(0, 50257, 1000).astype(np.uint16)
    return Stream([Shard("x", tokens[:300]), Shard("y", tokens[300:])])


def one_by_one(model: GPT, stream: Stream, sequences: int) -> float:
    """The definition: PyTorch's cross-entropy of each sequence, averaged."""
    tokens = torch.from_numpy(stream.read(0, sequences * 32 + 1).astype(np.int64))
    losses = [
        F.cross_entropy(model(tokens[None, i : i + 32])[0], tokens[i + 1 : i + 33]).item()
        for i in range(0, sequences * 32, 32)
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("micro_batch", "ranks"),
    [(1, 1), (7, 1), (31, 1), (64, 1), (4, 2), (3, 3), (2, 40)],  # 31 sequences; 40 ranks > 31
)
def test_validation_loss_does_not_depend_on_batches_or_ranks(model, stream, micro_batch, ranks):
    """fp64 sums in another order: a relative 1e-12 is thousands of roundings."""
    sequences = validation_sequences(stream, 32, 10**6)
    assert sequences == 31
    # Ranks that never speak to each other: their sums are collected here instead.
    partial = []

    class Deaf(World):
        def all_reduce_sum(self, *values):
            partial.append(values)
            return [1.0, 1.0]

    for rank in range(ranks):
        validation_loss(model, stream, sequences, micro_batch,
                        Deaf(rank, ranks, torch.device("cpu")))
    total, count = (sum(column) for column in zip(*partial, strict=True))
    assert count == sequences * 32
    assert total / count == pytest.approx(one_by_one(model, stream, sequences), rel=1e-12)


@pytest.mark.parametrize("size", [math.nan, 1e38], ids=["NaN", "overflow"])
def test_a_validation_loss_that_is_no_number_is_refused(stream, size):
    broken = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, n_ctx=32))
    torch.nn.init.constant_(broken.ln_f.weight, size)
    with pytest.raises(Failed, match="the model's losses are no numbers"):
        validation_loss(broken, stream, 2, 1, ALONE)


def test_a_run_without_the_questions_says_so_and_goes_on(monkeypatch, capsys):
    from eval.evaluator import read_questions

    def unreachable(*_):
        raise Failed("could not download it: ConnectionError")

    monkeypatch.setattr(hellaswag, "fetch", unreachable)
    gpu = replace(ALONE, device=torch.device("cuda"))
    assert read_questions("auto", gpu) == []
    assert "no HellaSwag in this run: could not download" in capsys.readouterr().out
    assert read_questions("auto", ALONE) == []
    assert "no HellaSwag in this run: minutes on a CPU" in capsys.readouterr().out
    assert read_questions("off", gpu) == []
    assert capsys.readouterr().out == ""


def test_streamed_text_waits_for_whole_characters():
    ids = encode("snow ☃ man 👩‍👩‍👧")
    pieces = list(stream_text(ids))
    assert "".join(pieces) == "snow ☃ man 👩‍👩‍👧"
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_empty_prompt_begins_a_document_and_a_long_one_is_cropped():
    assert prompt_tokens("", 8) == [50256]
    assert prompt_tokens(" b" + " a" * 8, 8) == encode(" a" * 8)
    assert "9 tokens, and the model's context 8: the model reads the last 8" in crop_note(9, 8)
    assert crop_note(8, 8) == ""


def test_the_picture_is_drawn_from_the_rows(tmp_path):
    rows = [{"step": s, "tokens": 10 * s, "train_loss": 5 - s} for s in range(3)]
    rows.append({"step": 2, "tokens": 20, "val_loss": 3.5, "val_set": "x, 10 tokens"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = report.plot_losses(tmp_path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_judging_can_be_stopped_between_passes():
    from eval.likelihood import Request, Stopped, negative_loglikelihoods

    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, n_ctx=16))
    asked = []
    with pytest.raises(Stopped):
        negative_loglikelihoods(
            model, [Request([1, 2], [[3], [4]])], ALONE, lambda: asked.append(1) or True)
    assert asked == [1]
