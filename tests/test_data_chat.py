"""Conversations: what is learnt of them, on any number of ranks, and a model that then answers."""

import gzip
import io
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data.chat import (
    chat_rows,
    conversation_tokens,
    inputs_and_targets,
    question_text,
    question_tokens,
    read_conversations,
)
from data.dataset import DataConfig, open_data
from data.loader import Loader
from data.tokenizer import EOT, decode, encode
from eval import sample
from eval.dialogue import Dialogue
from kernels.constants import IGNORE
from launch import cli
from launch.errors import BadInput
from launch.tracker import read_rows
from model import checkpoint
from model.checkpoint import load_model
from model.generate import SampleConfig
from model.gpt2 import GPT, GPTConfig
from model.optim import OptimConfig
from tests.running import losses, run_several, weights
from train_gpt2 import PRESETS, TrainConfig, train

KNOWS = {"red": "apple", "green": "leaf", "blue": "sky", "white": "snow"}
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=20)


def conversation(*turns: tuple[str, str]) -> str:
    """A line: (what the user says, what the assistant says), ..."""
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question},
                     {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Every pair of questions, a pair a conversation; answers of one token and of several."""
    pairs = [(a, b) for a in KNOWS.items() for b in KNOWS.items()] * 3
    return write(tmp_path_factory.mktemp("chat") / "chat.jsonl", [
        conversation((a, x * (1 + i % 3)), (b, y)) for i, ((a, x), (b, y)) in enumerate(pairs)])


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus_file) -> str:
    """A run to begin with."""
    from tests.conftest import make_config

    folder = tmp_path_factory.mktemp("base")
    train(make_config(folder, corpus_file, steps=1, model=SHAPE, batch_tokens=240, dtype="fp64"))
    return str(folder / "tiny")


@pytest.fixture
def chat(tiny, file, base):
    """tiny(...), on conversations."""
    return partial(tiny, data=DataConfig(chat=str(file)), init=base, model=SHAPE,
                   batch_tokens=240, prompt="red")


# ---- what a conversation's tokens are ----

def test_the_template_and_what_of_it_is_learnt():
    messages = [("system", "Be brief. "), ("user", "Hi"), ("assistant", "Hello!\n"),
                ("user", "Bye"), ("assistant", "")]
    tokens = conversation_tokens(messages)
    text = "System: Be brief.\nUser: Hi\nAssistant: Hello!"
    assert [token if token >= 0 else ~token for token in tokens] == [
        *encode(text), EOT, *encode("User: Bye\nAssistant:"), *encode(" "), EOT]
    learnt = [token for token in tokens if token >= 0]
    assert learnt == [*encode(" Hello!"), EOT, *encode(" "), EOT]
    assert question_tokens("Hi ") == encode("User: Hi\nAssistant:") == encode(question_text("Hi"))


def test_a_row_is_one_conversation(tmp_path):
    path = write(tmp_path / "a.jsonl", [conversation(("a", "b")), "\n", conversation(("c", "d"))])
    train_rows, val_rows = chat_rows(path, 10)
    (row,) = torch.from_numpy(train_rows).long()
    inputs, targets = inputs_and_targets(row[None])
    assert decode(inputs[0].tolist()) == "User: a\nAssistant: b" + 3 * "<|endoftext|>"
    assert targets[0].tolist() == [IGNORE] * 5 + [*encode(" b"), EOT] + [IGNORE] * 3
    assert decode([~token for token in val_rows[0][:3].tolist()]) == "User: c"


def test_long_ones_are_cut_and_counted(tmp_path, capsys):
    lines = [conversation(("a", "b"))] * 3
    lines.append(conversation(("a", "b " * 20)))  # cut
    lines.append(conversation(("a " * 20, "b")))  # nothing is left of the answer
    train_rows, val_rows = chat_rows(write(tmp_path / "a.jsonl", lines), 12)
    assert "2 of 5 conversations are longer than 13 tokens: cut there, 1 of them left out" in (
        capsys.readouterr().out)
    assert len(train_rows) == 3 and len(val_rows) == 1
    assert (val_rows[0] >= 0).sum() == 13 - 6  # "User: a\nAssistant:" has 6 tokens


def test_every_twentieth_is_held_out(file):
    train_rows, val_rows = chat_rows(file, 20)
    assert (len(train_rows), len(val_rows)) == (46, 2)  # the 11th and the 31st of 48


@pytest.mark.parametrize("line, said", [
    ("{", "no JSON .*: a conversation a line is expected"),
    ("[" * 100_000, "without end|no JSON"),
    ("[]", 'expected {"messages"'),
    ('{"messages": []}', 'expected {"messages"'),
    ('{"text": "a"}', 'expected {"messages"'),
    ('{"messages": ["a"]}', "message 1 is no object"),
    ('{"messages": [{"role": "tool", "content": "a"}]}', "message 1 has the role 'tool': expected"),
    ('{"messages": [{"content": "a"}]}', "message 1 has the role 'None'"),
    ('{"messages": [{"role": "user", "content": ["a"]}]}', "message 1 has no content that is a"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "the assistant says nothing"),
    ('{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}',
     "message 1 has the weight 0: .* leave the field out"),
    ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}',
     "message 1 calls a tool"),
    (r'{"messages": [{"role": "assistant", "content": "a\ud83d b"}]}', "half of a surrogate pair"),
])
def test_a_bad_line_is_named(tmp_path, line, said):
    path = write(tmp_path / "a.jsonl", [conversation(("a", "b")), "\n", line + "\n"])
    with pytest.raises(BadInput, match=f"a.jsonl, line 3: .*({said.replace('{', '[{]')})"):
        read_conversations(path)


@pytest.mark.parametrize("content, said", [
    (b"\xff\n", "no UTF-8"), (b"", "has 0 conversations"),
    (gzip.compress(b"{}", mtime=0), "is compressed: unpack it first"),
    (conversation(("a", "b")).encode(), "has 1 conversations to train on, and one more"),
])
def test_a_file_of_too_little_is_one_line(tmp_path, content, said):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=said):
        chat_rows(tmp_path / "a.jsonl", 10)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(BadInput, match="a.jsonl is a pipe"):
        chat_rows(tmp_path / "a.jsonl", 10)


@pytest.mark.parametrize("flags, line", [
    ([], "--data.chat fine-tunes a trained model: --init hf:gpt2, or a run"),
    (["--init", "runs/x", "--data.text", "b.txt"], "leave out --data.dir, --data.text"),
    (["--init", "runs/x", "--data.vocab", "char"], "leave out --data.dir, --data.text"),
    (["--init", "runs/x"], "can't read the conversations a.jsonl: No such file"),
])
def test_what_is_missing_is_one_line(flags, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as refused:
        train(cli.parse(TrainConfig, PRESETS, ["demo", "--data.chat", "a.jsonl", *flags]))
    assert line in str(refused.value) and "\n" not in str(refused.value)


# ---- what is learnt ----

def test_what_is_only_read_carries_no_gradient(file):
    """Exactly none, at every place whose target is another's word or padding; and the gradient of
    the rest is that of PyTorch's cross-entropy over the assistant's words alone."""
    torch.manual_seed(0)
    model = GPT(SHAPE).double()
    rows = torch.from_numpy(chat_rows(file, 20)[0][:5]).long()
    inputs, targets = inputs_and_targets(rows)
    hidden = model.hidden(inputs).detach().requires_grad_()  # (B, T, C)
    loss = model.ops.linear_cross_entropy(
        hidden.flatten(0, 1), model.wte.weight, targets.flatten(), SHAPE.n_vocab)
    loss.backward()
    learnt = targets != IGNORE
    assert 0 < learnt.sum() < learnt.numel()
    assert (hidden.grad[~learnt] == 0).all()
    assert (hidden.grad[learnt] != 0).any(-1).all()
    own = hidden.detach().requires_grad_()
    expected = F.cross_entropy(model.logits(own[learnt]), targets[learnt])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert (own.grad - hidden.grad).abs().max() < 1e-12


def test_the_first_loss_is_the_mean_over_the_answers_of_the_whole_step(chat, base, file, tmp_path):
    """Not the mean of micro-batches' means, which have answers of different lengths."""
    config = chat(steps=1, dtype="fp64", micro_batch=2)
    train(config)
    loader = Loader(open_data(config.data, 20).train, T=20, batch_tokens=240, micro_batch=12,
                    seed=config.seed)
    model = load_model(base)
    inputs, targets = inputs_and_targets(loader.get_batch(0)[0])
    loader.close()
    logits = model.logits(model.hidden(inputs)).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE).item()
    assert losses(tmp_path / "tiny")[0][1] == pytest.approx(expected, abs=1e-9)
    val = read_rows(tmp_path / "tiny" / "metrics.jsonl")[0]
    rows = torch.from_numpy(chat_rows(file, 20)[1]).long()
    inputs, targets = inputs_and_targets(rows)
    count = int((targets != IGNORE).sum())
    assert val["val_set"] == f"chat.jsonl, {count} tokens of the answers in 2 conversations"
    logits = model.logits(model.hidden(inputs)).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE).item()
    assert val["val_loss"] == pytest.approx(expected, abs=1e-9)


def test_two_ranks_and_accumulation_train_the_same_model(chat, tmp_path):
    """Invariant 1, as in test_tiny.py; answers of different lengths make it more than a share."""
    one = chat(name="one", dtype="fp64", steps=4, eval_every=4, save_every=4)
    train(one)
    train(replace(one, name="accumulated", micro_batch=3))
    done = run_several([replace(one, name="ranks", micro_batch=2)], tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout
    first = weights(tmp_path / "one", 4)
    for name in ("accumulated", "ranks"):
        other = weights(tmp_path / name, 4)
        assert max((first[key] - other[key]).abs().max().item() for key in first) < 1e-12
        rows = [read_rows(tmp_path / run / "metrics.jsonl")[-1] for run in ("one", name)]
        assert rows[0]["val_loss"] == pytest.approx(rows[1]["val_loss"], abs=1e-12)
        assert rows[0]["val_set"] == rows[1]["val_set"]


def test_it_goes_on_bit_for_bit_and_on_no_other_conversations(chat, file, tmp_path):
    train(chat())
    before = losses(tmp_path / "tiny")
    checkpoint.remove(tmp_path / "tiny" / "checkpoints" / "step_00000006")
    train(chat())
    assert losses(tmp_path / "tiny") == before
    lines = file.read_text().splitlines(keepends=True)
    lines[20] = lines[20].replace("red", "blue", 1)  # in the middle, and as long
    other = write(tmp_path / "other.jsonl", lines)
    with pytest.raises(BadInput, match="belongs to another run: training data"):
        train(chat(data=DataConfig(chat=str(other)), name="b", resume=str(tmp_path / "tiny")))


# ---- a model that answers ----

@pytest.fixture(scope="module")
def taught(tmp_path_factory, file, base) -> Path:
    """A run that has learnt by heart what KNOWS says."""
    from tests.conftest import make_config

    folder = tmp_path_factory.mktemp("taught")
    lines = [conversation(a, b) for a in KNOWS.items() for b in KNOWS.items()] * 2
    path = write(folder / "chat.jsonl", lines)
    config = make_config(
        folder, path, data=DataConfig(chat=str(path)), init=base, model=SHAPE, steps=120,
        batch_tokens=8 * 20, micro_batch=8, eval_every=120, save_every=120, prompt="red",
        optim=OptimConfig(lr=1e-2, warmup_steps=10))
    assert train(config) == 0
    return folder / "tiny"


def test_the_runs_own_sample_is_an_answer(taught):
    rows = [row for row in read_rows(taught / "metrics.jsonl") if "val_loss" in row]
    assert rows[0]["val_loss"] > 10 and rows[-1]["val_loss"] < 1
    assert rows[-1]["sample"] == "User: red\nAssistant: apple"


def test_sample_chat_talks_line_by_line(taught, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("blue\n\nred\nwhite\n"))
    sample.main(sample.Arguments(
        checkpoint=str(taught), chat=True, temperature=0, max_tokens=4, dtype="fp32"))
    assert capsys.readouterr().out == "sky\napple\nsnow\n"


def test_what_was_said_stays_until_the_context_is_full(taught):
    dialogue = Dialogue(load_model(str(taught)), SampleConfig(4, temperature=0),
                        torch.device("cpu"))
    assert "".join(dialogue.answer("red")) == "apple"
    first = [*encode("User: red\nAssistant: apple"), EOT]
    assert dialogue.turns == [first]
    assert "".join(dialogue.answer("green")) == "leaf"
    assert dialogue.turns[0] == first and len(dialogue.turns) == 2
    pieces = dialogue.answer("blue")
    assert next(pieces) == "sky"
    pieces.close()  # somebody has stopped listening
    assert decode(dialogue.turns[-1]) == "User: blue\nAssistant: sky<|endoftext|>"
    assert len(dialogue.turns) == 2 and dialogue.turns[0] != first


def test_an_answer_follows_from_what_was_said_before(taught):
    """The context that the model reads is the template's, turn after turn."""
    model = load_model(str(taught))
    dialogue = Dialogue(model, SampleConfig(4, temperature=0), torch.device("cpu"))
    for question in ("red", "green"):
        "".join(dialogue.answer(question))
    messages = [("user", "red"), ("assistant", "apple"), ("user", "green"), ("assistant", "leaf")]
    read = [token if token >= 0 else ~token for token in conversation_tokens(messages)]
    assert [token for turn in dialogue.turns for token in turn] == read


def test_chat_is_one_conversation(taught):
    with pytest.raises(BadInput, match="--chat is one conversation"):
        sample.main(sample.Arguments(checkpoint=str(taught), chat=True, num=2))
