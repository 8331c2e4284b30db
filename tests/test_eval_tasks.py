"""LAMBADA, PIQA, ARC, Winogrande and bits per byte, by hand: a model that is a bigram table."""

import json
import math

import pytest
import torch

from data.tokenizer import encode
from eval import choice, tasks
from launch.errors import BadInput, Failed
from launch.world import World
from model.formats.hf import to_hf
from model.gpt2 import GPT, GPTConfig

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def bigram() -> GPT:
    """A GPT-2 whose blocks and positions add nothing: the next token depends on the last alone."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=16)).double()
    for weight in (model.wpe.weight, model.h[0].attn.c_proj.weight, model.h[0].mlp.c_proj.weight):
        torch.nn.init.zeros_(weight)
    torch.nn.init.normal_(model.wte.weight[:50257])  # opinions: losses from 1 to 40 nats
    return model


@pytest.fixture(scope="module")
def table(bigram):
    """table(a, b): the loss, in nats, of token b after token a, from the embeddings alone."""
    E = bigram.wte.weight[:50257].detach()

    def loss(a: int, b: int) -> float:
        x = (E[a] - E[a].mean()) / torch.sqrt(E[a].var(correction=0) + 1e-5)
        return (torch.logsumexp(E @ x, 0) - E[b] @ x).item()

    return loss


def text_loss(table, context: str, ending: str) -> float:
    tokens = encode(context) + encode(ending)
    start = len(encode(context))
    return sum(table(tokens[i - 1], tokens[i]) for i in range(start, len(tokens)))


def write(tmp_path, rows) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lambada(bigram, table, tmp_path):
    passages = ["She opened the old door and saw her mother",
                "They sailed for a year until they found antidisestablishmentarianism"]
    rows = [{"text": passages[0]},
            {"context": passages[1].rpartition(" ")[0], "continuation": passages[1].split()[-1]}]
    # A third passage whose last word is what the table says after " the".
    the = encode(" the")[-1]
    docs = tasks.read_docs("lambada", write(tmp_path, rows), 0)
    likeliest = int(bigram(torch.tensor([[the]]))[0, -1].argmax())
    docs.append(tasks.Request(encode("This is the"), [[likeliest]]))
    got = tasks.evaluate("lambada", bigram, docs, ALONE)
    losses = [text_loss(table, p.rpartition(" ")[0], " " + p.split()[-1]) for p in passages]
    losses.append(table(the, likeliest))
    assert (got.n, got.acc) == (3, pytest.approx(1 / 3))
    assert got.acc_stderr == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))
    assert got.ppl == pytest.approx(math.exp(sum(losses) / 3), rel=1e-9)


@pytest.mark.parametrize("task", ["piqa", "arc_easy"])
def test_choices_after_a_query(bigram, table, tmp_path, task):
    choices = [["a bucket of sand", "water", "the moon, of course"], ["é", "no"]]
    rows = [{"query": "What puts out a fire?", "choices": choices[0], "gold": 1},
            {"query": "Question: Is it so?\nAnswer:", "choices": choices[1], "gold": "0"}]
    contexts = ["Question: What puts out a fire?\nAnswer:", "Question: Is it so?\nAnswer:"]
    got = tasks.evaluate(task, bigram, tasks.read_docs(task, write(tmp_path, rows), 0), ALONE)
    right = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    for row, context, options in zip(rows, contexts, choices, strict=True):
        losses = [text_loss(table, context, " " + option) for option in options]
        for way, units in (("acc", [1] * 3), ("acc_norm", [len(o) for o in options]),
                           ("acc_bytes", [len(o.encode()) for o in options])):
            values = [loss / unit for loss, unit in zip(losses, units, strict=False)]
            right[way] += values.index(min(values)) == int(row["gold"])
    assert {way: getattr(got, way) * 2 for way in right} == right
    assert got.n == 2


def test_winogrande_compares_the_same_ending_after_two_contexts(bigram, table, tmp_path):
    contexts = [f"The trophy doesn't fit because the {thing}" for thing in ("trophy", "bag")]
    ending = "is too large."
    losses = [text_loss(table, context, " " + ending) for context in contexts]
    best = losses.index(min(losses))
    rows = [{"context_options": contexts, "continuation": ending, "gold": gold}
            for gold in (best, 1 - best, best)]
    docs = tasks.read_docs("winogrande", write(tmp_path, rows), 0)
    got = tasks.evaluate("winogrande", bigram, docs, ALONE)
    assert got.acc == got.acc_norm == got.acc_bytes == pytest.approx(2 / 3)


def test_bits_per_byte_of_any_text(bigram, table, tmp_path):
    """Longer than the context of 16 tokens, and the last window is a short one."""
    text = "In the beginning God created the heavens and the earth. é☃ " * 4
    path = tmp_path / "any.txt"
    path.write_text(text)
    got = tasks.evaluate("bits_per_byte", bigram, tasks.read_docs("bits_per_byte", path, 0), ALONE)
    tokens = [50256, *encode(text)]
    nats = sum(table(a, b) for a, b in zip(tokens, tokens[1:], strict=False))
    assert (got.tokens, got.bytes) == (len(tokens) - 1, len(text.encode()))
    assert got.tokens % 16 != 0
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / got.bytes, rel=1e-9)


def test_the_command_ends_with_its_json(bigram, tmp_path, capsys):
    to_hf(bigram, tmp_path / "hf")
    path = write(tmp_path, [{"query": "One?", "choices": ["a", "b"], "gold": 0}] * 3)
    tasks.main("piqa", f"hf:{tmp_path / 'hf'}", path, limit=2, dtype="fp32")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(last) == ["n", "acc", "acc_norm", "acc_stderr", "acc_bytes"]
    assert last["n"] == 2


@pytest.mark.parametrize("task", ["lambada", "piqa", "winogrande", "bits_per_byte"])
def test_losses_that_are_no_numbers_get_no_figure(tmp_path, task):
    broken = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=16))
    torch.nn.init.constant_(broken.ln_f.weight, math.nan)
    rows = {"lambada": {"text": "a passage"},
            "piqa": {"query": "a", "choices": ["b", "c"], "gold": 0},
            "winogrande": {"context_options": ["a", "b"], "continuation": "c", "gold": 0}}
    path = write(tmp_path, [rows.get(task, {})])
    docs = tasks.read_docs(task, path, 0)
    with pytest.raises(Failed, match="the model's losses are no numbers"):
        tasks.evaluate(task, broken, docs, ALONE)


def test_a_perplexity_beyond_floats_is_null(bigram, monkeypatch):
    """exp(709) is about the largest float; 100 tokens of an untrained model are 1,000 nats."""
    monkeypatch.setattr(tasks, "negative_loglikelihoods", lambda *_: ([1000.0], [0.0]))
    result = tasks.evaluate("lambada", bigram, [tasks.Request([1], [[2] * 100])], ALONE)
    assert json.loads(choice.as_json(result)) == {"n": 1, "acc": 0, "acc_stderr": 0, "ppl": None}


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfabc")
    assert tasks.read_docs("bits_per_byte", tmp_path / "x", 0) == "abc"


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [("lambada", {"text": "word"}, "a single word"),
     ("lambada", {"context": "a b"}, "no 'continuation'"),
     ("lambada", {"txt": "a b"}, "no 'context', only txt"),
     ("piqa", {"query": "a", "choices": ["b"], "gold": 0}, "1 choices"),
     ("arc_easy", {"query": "a", "choices": ["b", "c"], "gold": 2}, "label 2: expected 0 to 1"),
     ("winogrande", {"context_options": ["a", "b"], "gold": 1}, "no 'continuation'"),
     ("winogrande", {"context_options": "ab", "continuation": "c", "gold": 1}, "no list of texts")],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_wrong_row_is_named(tmp_path, task, row, words):
    with pytest.raises(BadInput, match=f"line 1: .*{words}"):
        tasks.read_docs(task, write(tmp_path, [row]), 0)


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b"\xff\xfe", "can't read")])
def test_a_text_that_is_none(tmp_path, content, words):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(BadInput, match=words):
        tasks.read_docs("bits_per_byte", tmp_path / "x", 0)
