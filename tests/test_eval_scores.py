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
from eval.sample import prompt_tokens, stream_text
from launch.errors import BadInput, Failed
from launch.world import World
from model.gpt2 import GPT, GPTConfig

ALONE = World(0, 1, torch.device("cpu"))
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=32)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG).double()


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
        def sum(self, *values):
            partial.append(values)
            return [1.0, 1.0]

    for rank in range(ranks):
        validation_loss(model, stream, sequences, micro_batch,
                        Deaf(rank, ranks, torch.device("cpu")))
    total, count = (sum(column) for column in zip(*partial, strict=True))
    assert count == sequences * 32
    assert total / count == pytest.approx(one_by_one(model, stream, sequences), rel=1e-12)


ROWS = [
    {"ctx": "A man is sitting on a roof. He", "label": 3, "endings": [
        "is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
        "is holding a rubik's cube.", "starts pulling up roofing on a roof."]},
    {"ctx": "A lady walks to a barbell. She", "label": "1", "endings": [
        "swings.", "bends down and grabs the pole.", "é ü lifts.", "stands and lifts it."]},
    {"ctx": "Two women in a child are shown in a canoe while a man pulls the canoe while standing "
            "in the water, with other individuals visible in the background. The child", "label": 0,
     "endings": ["and a different man sit in a canoe.", "are then shown paddling down.",
                 "are driving the canoe.", "walking go down the rapids, while the man sinks."]},
]


@pytest.fixture
def questions_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def plain_loop(model: GPT) -> list[list[float]]:
    """build-nanogpt's way: one ending at a time, the whole logits, the loss of the ending."""
    sums = []
    for row in ROWS:
        for ending in row["endings"]:
            context, end = encode(row["ctx"]), encode(" " + ending)
            tokens = torch.tensor((context + end)[-33:])
            losses = F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")
            sums.append(losses[-len(end) :].sum().item())
    return [sums[i : i + 4] for i in range(0, len(sums), 4)]


def test_hellaswag_scores_are_those_of_the_plain_loop(model, questions_file):
    questions = hellaswag.read_questions(questions_file)
    sums = hellaswag.ending_losses(model, questions, torch.device("cpu"))
    expected = torch.tensor(plain_loop(model), dtype=torch.float64)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    score = hellaswag.evaluate(model, questions, ALONE)
    lengths = torch.tensor([[len(encode(" " + e)) for e in row["endings"]] for row in ROWS])
    sizes = torch.tensor([[len(e.encode()) for e in row["endings"]] for row in ROWS])
    labels = torch.tensor([int(row["label"]) for row in ROWS])
    for got, losses in ((score.acc, expected), (score.acc_norm, expected / lengths),
                        (score.acc_bytes, expected / sizes)):
        assert got == (losses.argmin(1) == labels).double().mean().item()
    assert score.n == 3
    assert score.acc_stderr == math.sqrt(score.acc * (1 - score.acc) / 2)


def test_hellaswag_is_the_same_on_any_number_of_ranks(model, questions_file):
    questions = hellaswag.read_questions(questions_file) * 5
    whole = hellaswag.evaluate(model, questions, ALONE)
    counts = []

    class Deaf(World):
        def sum(self, *values):
            counts.append(values)
            return list(values)

    for rank in range(4):
        hellaswag.evaluate(model, questions, Deaf(rank, 4, torch.device("cpu")))
    acc, acc_norm, acc_bytes = (sum(column) / 15 for column in zip(*counts, strict=True))
    assert (acc, acc_norm, acc_bytes) == (whole.acc, whole.acc_norm, whole.acc_bytes)


def test_a_model_that_knows_the_answers_gets_them_right(questions_file, model, monkeypatch):
    questions = hellaswag.read_questions(questions_file)

    def cheat(_, batch, __):
        return torch.tensor([[float(i != q.label) for i in range(4)] for q in batch])

    monkeypatch.setattr(hellaswag, "ending_losses", cheat)
    score = hellaswag.evaluate(model, questions, ALONE)
    assert score.acc == score.acc_norm == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [("{}", "no HellaSwag row"), ("nonsense", "no HellaSwag row"),
     (json.dumps(ROWS[0] | {"label": 4}), "label 4"),
     (json.dumps(ROWS[0] | {"endings": ["a"]}), "1 endings"),
     (json.dumps({"ctx": "a", "label": 0}), "endings")],
)
def test_a_wrong_row_is_named(tmp_path, row, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + row + "\n")
    with pytest.raises(BadInput, match=f"line 2.*{words}"):
        hellaswag.read_questions(path)


def test_no_rows_and_no_file_are_refused(tmp_path):
    with pytest.raises(BadInput, match="can't read"):
        hellaswag.read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BadInput, match="no HellaSwag row"):
        hellaswag.read_questions(tmp_path / "empty.jsonl")


def test_real_rows(model, real_data):
    questions = hellaswag.read_questions(real_data / "hellaswag_val_first1000.jsonl.xz", limit=20)
    score = hellaswag.evaluate(model, questions, ALONE)
    assert score.n == 20
    assert 0 <= score.acc_norm <= 1


def test_a_run_without_the_questions_says_so_and_goes_on(monkeypatch, capsys):
    from eval.exam import open_questions

    def unreachable(*_):
        raise Failed("could not download it: ConnectionError")

    monkeypatch.setattr(hellaswag, "fetch", unreachable)
    gpu = replace(ALONE, device=torch.device("cuda"))
    assert open_questions("auto", gpu) == []
    assert "no HellaSwag in this run: could not download" in capsys.readouterr().out
    assert open_questions("auto", ALONE) == []
    assert open_questions("off", gpu) == []


def test_streamed_text_waits_for_whole_characters():
    ids = encode("snow ☃ man 👩‍👩‍👧")
    pieces = list(stream_text(ids))
    assert "".join(pieces) == "snow ☃ man 👩‍👩‍👧"
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_empty_prompt_begins_a_document_and_a_long_one_is_refused():
    assert prompt_tokens("", 8) == [50256]
    with pytest.raises(BadInput, match="9 tokens, and the model's context 8"):
        prompt_tokens(" a" * 9, 8)


def test_the_picture_is_drawn_from_the_rows(tmp_path):
    rows = [{"step": s, "tokens": 10 * s, "train_loss": 5 - s} for s in range(3)]
    rows.append({"step": 2, "tokens": 20, "val_loss": 3.5, "val_set": "x, 10 tokens"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = report.plot_losses(tmp_path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(BadInput, match="is no run"):
        report.plot_losses(tmp_path / "report")
