"""CORE: each of its three kinds of task, by the plain definition, and the bundle it comes in."""

import csv
import functools
import hashlib
import http.server
import json
import math
import random
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data.tokenizer import decode, encode
from eval import core, core_bundle
from eval.core_bundle import Task, read_tasks
from launch.errors import BadInput, Failed, one_line_errors
from model.formats.hf import to_hf
from model.gpt2 import GPT, GPTConfig
from tests.running import ALONE, ROOT, environment

# label, kind, examples, delimiter, chance in percent
TASKS = [
    ("animals", "multiple_choice", 2, " ", 25.0),
    ("letters", "multiple_choice", 0, "\nAnswer: ", 50.0),
    ("pronouns", "schema", 0, " ", 50.0),
    ("shots", "schema", 3, " ", 50.0),
    ("words", "language_modeling", 2, "\nA: ", 0.0),
    ("last", "language_modeling", 0, " ", 0.0),
]
CUT: list[bool] = []  # for each row that plain() has judged: did it exceed the context?


@pytest.fixture(scope="module")
def model() -> GPT:
    """Opinions in fp64. A context of 32 tokens: prompts with examples are cut at their front."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=32)).double()
    torch.nn.init.normal_(model.wte.weight[:50257], std=0.3)
    return model


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("core") / "eval_bundle"
    (folder / "eval_data" / "some").mkdir(parents=True)
    words = "the café a man über snow she naïve lifts ☃ into door and quickly".split(" ")
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(low, high)))

    def row(kind: str) -> dict:
        if kind == "multiple_choice":
            choices = [text(1, 4) for _ in range(4)]
            return {"query": text(4, 12), "choices": choices, "gold": draw.randint(0, 3)}
        if kind == "schema":
            return {"context_options": [f"{text(3, 9)} {end}" for end in ("snow", "door")],
                    "continuation": text(1, 4), "gold": draw.randint(0, 1)}
        return {"context": text(3, 12) + " ", "continuation": text(1, 2)}

    entries = []
    for label, kind, examples, delimiter, _ in TASKS:
        rows = [row(kind) for _ in range(14)]
        if kind == "language_modeling":  # some that greedy decoding does give
            rows += [obvious(model, entry["context"], delimiter) for entry in rows[:5]]
        lines = [json.dumps(entry) + "\n" for entry in rows]
        (folder / "eval_data" / "some" / f"{label}.jsonl").write_text("".join(lines))
        entries.append({"label": label, "icl_task_type": kind, "num_fewshot": [examples],
                        "dataset_uri": f"some/{label}.jsonl"})
        if delimiter != " ":
            entries[-1]["continuation_delimiter"] = delimiter
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))  # JSON is YAML
    with (folder / "eval_meta_data.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Eval Task", "Task Category", "Random baseline"])
        table.writerows([label, "made up", chance] for label, *_, chance in TASKS)
    return folder


@torch.no_grad()
def obvious(model: GPT, context: str, delimiter: str) -> dict:
    """A row whose continuation is the word that the model finds likeliest, without examples."""
    prompt = torch.tensor([[50256, *encode((context.strip() + delimiter).strip())]])
    likeliest = int(model(prompt)[0, -1].argmax())
    return {"context": context, "continuation": decode([likeliest]).removeprefix(" ")}


@torch.no_grad()
def plain(model: GPT, label: str, folder: Path, limit: int = 0) -> list[tuple[bool, list[float]]]:
    """The definition, as nanochat has it: one row, one option, one whole sequence at a time."""
    _, kind, shots, delimiter, _ = next(task for task in TASKS if task[0] == label)
    path = folder / "eval_data" / "some" / f"{label}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    random.Random(1337).shuffle(rows)
    rows = rows[:limit] if limit else rows
    answers = []
    for number, row in enumerate(rows):
        others = [i for i in range(len(rows)) if i != number]
        examples = ""
        for i in random.Random(1234 + number).sample(others, shots):
            examples += shown(rows[i], kind, delimiter) + "\n\n"
        if kind == "multiple_choice":
            prompts = [examples + row["query"] + delimiter + choice for choice in row["choices"]]
        elif kind == "schema":
            prompts = [examples + context + delimiter + row["continuation"]
                       for context in row["context_options"]]
        else:
            question = examples + row["context"].strip() + delimiter
            prompts = [question.strip(), question + row["continuation"]]
        tokens = [[50256, *encode(prompt)] for prompt in prompts]
        if kind == "multiple_choice":
            starts = [shared(tokens)] * len(tokens)
        elif kind == "schema":
            suffix = shared([sequence[::-1] for sequence in tokens])
            starts = [len(sequence) - suffix for sequence in tokens]
        else:
            starts = [len(tokens[0])]
            assert tokens[1][: starts[0]] == tokens[0]
            tokens = tokens[1:]
        CUT.append(max(map(len, tokens)) > model.config.n_ctx)
        losses, greedy = [], []
        for sequence, start in zip(tokens, starts, strict=True):
            cut = max(0, len(sequence) - model.config.n_ctx)
            read, start = torch.tensor(sequence[cut:]), start - cut
            logits, targets = model(read[None])[0, start - 1 : -1], read[start:]
            losses.append(F.cross_entropy(logits, targets).item())
            greedy.append(bool((logits.argmax(-1) == targets).all()))
        if kind == "language_modeling":
            answers.append((greedy[0], losses))
        else:
            answers.append((losses.index(min(losses)) == row["gold"], losses))
    return answers


def shown(row: dict, kind: str, delimiter: str) -> str:
    """An example: a row with its right answer."""
    if kind == "multiple_choice":
        return row["query"] + delimiter + row["choices"][row["gold"]]
    if kind == "schema":
        return row["context_options"][row["gold"]] + delimiter + row["continuation"]
    return row["context"].strip() + delimiter + row["continuation"]


def shared(sequences: list[list[int]]) -> int:
    length = 0
    while all(length < len(s) and s[length] == sequences[0][length] for s in sequences):
        length += 1
    return length


@pytest.mark.parametrize("limit", [0, 7])
def test_every_kind_is_its_plain_definition(model, bundle, limit):
    """fp64 in another order: a relative 1e-12 is thousands of roundings."""
    score, answers = core.evaluate(model, read_tasks(bundle), ALONE, limit)
    total = 0.0
    for label, *_, chance in TASKS:
        expected = plain(model, label, bundle, limit)
        got = answers[label]
        for (right, losses), answer in zip(expected, got, strict=True):
            assert answer.right == right
            assert answer.losses == pytest.approx(losses, rel=1e-12)
        accuracy = sum(right for right, _ in expected) / len(expected)
        centered = (accuracy - chance / 100) / (1 - chance / 100)
        assert score.accuracy[label] == accuracy
        assert score.centered[label] == pytest.approx(centered, rel=1e-12, abs=1e-15)
        total += centered
    assert score.core == pytest.approx(total / len(TASKS), rel=1e-12)
    assert (score.n, score.tasks) == (sum(map(len, answers.values())), 6)
    if not limit:
        assert 0 < score.accuracy["last"] < 1  # not all wrong
        assert 0 < sum(CUT) < len(CUT)  # some prompts exceed the context


def test_chunks_of_rows_change_nothing(model, bundle, monkeypatch):
    (task,) = [task for task in read_tasks(bundle) if task.label == "animals"]
    rows = core.shuffled(task)
    whole = core.answer(model, task, rows, ALONE)
    monkeypatch.setattr(core, "ROWS_AT_ONCE", 3)
    for one, other in zip(core.answer(model, task, rows, ALONE), whole, strict=True):
        assert one.right == other.right
        assert one.losses == pytest.approx(other.losses, rel=1e-12)


def test_a_choice_that_begins_another_is_judged_by_its_last_token(model, tmp_path):
    task = Task("x", "multiple_choice", tmp_path, 0, " ", 0.0)
    row = core_bundle.Row([("she lifts", "the door"), ("she lifts", "the door and snow")], 0)
    parts = list(core.judged_parts(task, [row], 0, 64))
    door, more = encode(" door"), encode(" and snow")
    assert [judged for _, judged in parts] == [door, door + more]


def test_continuations_longer_than_the_context_are_cut(tmp_path):
    task = Task("x", "language_modeling", tmp_path, 0, " ", 0.0)
    row = core_bundle.Row([("she", "lifts the door and " * 9)], 0)
    ((context, judged),) = core.judged_parts(task, [row], 0, 16)
    assert (len(context), len(judged)) == (1, 15)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("hf")
    to_hf(model, folder)
    return f"hf:{folder}"


def test_the_command_on_one_rank_and_on_two(checkpoint, bundle, tmp_path):
    """Same figures, same details; the JSON is the last line."""
    arguments = ["-m", "eval.core", checkpoint, "--data", str(bundle), "--dtype", "fp64"]
    printed = []
    for ranks in (1, 2):
        details = tmp_path / f"{ranks}.jsonl"
        start = [sys.executable, *["-m", "torch.distributed.run", "--standalone",
                                   f"--nproc_per_node={ranks}"] * (ranks > 1)]
        done = subprocess.run([*start, *arguments, "--details", str(details)], cwd=ROOT,
                              env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.splitlines())
    assert printed[0] == printed[1]
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    last = json.loads(printed[0][-1])
    assert list(last) == ["n", "tasks", "core", "accuracy", "centered"]
    assert printed[0][-2] == ("CORE of OpenAI's GPT-2: 0.1139 (124M), 0.1849 (350M), 0.2146 "
                              "(774M), 0.2565 (1558M). This is over 6 tasks, "
                              f"{last['n']} rows: not to be compared")
    rows = [json.loads(line) for line in (tmp_path / "1.jsonl").read_text().splitlines()]
    assert list(rows[0]) == ["task", "row", "right", "losses"]
    right = [row["right"] for row in rows if row["task"] == "pronouns"]
    assert last["accuracy"]["pronouns"] == round(sum(right) / len(right), 6)


def test_losses_that_are_no_numbers_get_no_score(bundle):
    broken = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=64))
    torch.nn.init.constant_(broken.ln_f.weight, math.nan)
    with pytest.raises(Failed, match="the model's losses are no numbers"):
        core.evaluate(broken, read_tasks(bundle), ALONE)


# ---- the bundle ----


@pytest.fixture
def served(bundle, tmp_path, monkeypatch):
    """served(): its bundle is published on a server here, with its hash. Where requests go."""
    archive = tmp_path / "published" / "eval_bundle.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(bundle.rglob("*")):
            packed.write(path, Path("eval_bundle") / path.relative_to(bundle))
        packed.writestr("__MACOSX/._core.yaml", "a file of the zip that is no part of it")
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.command)

    handler = functools.partial(Handler, directory=str(archive.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/eval_bundle.zip"
    monkeypatch.setattr(core_bundle, "URL", url)
    monkeypatch.setattr(core_bundle, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setattr("launch.files.time.sleep", lambda _: None)
    monkeypatch.chdir(tmp_path)
    yield requests
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_bundle_is_fetched_once_and_unpacked(served, bundle, tmp_path):
    assert core_bundle.fetch() == Path("eval_bundle")
    asked = len(served)
    assert core_bundle.fetch() == Path("eval_bundle")
    assert len(served) == asked
    assert [task.label for task in read_tasks(Path("eval_bundle"))] == [name for name, *_ in TASKS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval_bundle", "published"]


def test_another_bundle_than_the_published_one_is_not_taken(served, tmp_path, monkeypatch):
    monkeypatch.setattr(core_bundle, "SHA256", "0" * 64)
    with pytest.raises(Failed, match="another sha256 than the published file"):
        core_bundle.fetch()
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_more_than_is_ever_taken_is_not_fetched(served, monkeypatch):
    monkeypatch.setattr(core_bundle, "LARGEST", 100)
    with pytest.raises(Failed, match="and 100 are the most that are taken"):
        core_bundle.fetch()
    assert served == ["HEAD"]


def test_without_a_network_the_bundle_gets_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(core_bundle, "URL", "http://127.0.0.1:9/eval_bundle.zip")
    with pytest.raises(Failed, match="could not download .* ConnectionError.* --data"):
        core_bundle.fetch()


ENTRY = {"label": "x", "icl_task_type": "schema", "num_fewshot": [0], "dataset_uri": "x.jsonl"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [([ENTRY | {"icl_task_type": "schem"}], "x is of the kind 'schem': expected multiple_choice"),
     ([ENTRY | {"num_fewshot": 3}], "num_fewshot of x is 3: expected a list of one number"),
     ([ENTRY | {"dataset_uri": "../x"}], "lie outside of eval_data"),
     ([ENTRY | {"label": "y"}], "no baseline of 0 to 99 percent for y"),
     ([{"label": "x"}], "there is no 'icl_task_type'"),
     ([ENTRY, ENTRY], "names no task, or one twice: x, x"),
     (None, "can't read")],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_bundle_that_cannot_be_used_gets_one_line(tmp_path, entries, words):
    (tmp_path / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nx,50\n")
    with pytest.raises(BadInput, match=words) as raised:
        read_tasks(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [("multiple_choice", {"query": "a", "choices": ["b", "c"], "gold": 2}, "label 2: expected 0"),
     ("multiple_choice", {"query": "a", "choices": "bc", "gold": 0}, "no list of texts"),
     ("schema", {"context_options": ["a", None], "continuation": "c", "gold": 0}, "is no text"),
     ("language_modeling", {"context": "a"}, "no 'continuation', only context")],
)
def test_a_wrong_row_is_named(tmp_path, kind, row, words):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(BadInput, match=f"line 1: .*{words}"):
        core.shuffled(Task("x", kind, tmp_path / "rows.jsonl", 0, " ", 0.0))


def test_too_few_rows_for_the_examples_and_a_folder_that_is_none(checkpoint, bundle, tmp_path):
    (task,) = [task for task in read_tasks(bundle) if task.label == "shots"]
    with pytest.raises(BadInput, match="shots has 3 rows, .* 4 are the fewest"):
        core.shuffled(task, limit=3)
    with pytest.raises(BadInput, match="is no bundle of CORE's tasks: there is no eval_meta"):
        core.main(checkpoint, data=str(tmp_path))
    with pytest.raises(SystemExit) as leaving, one_line_errors():
        core.main(checkpoint, limit=-1)
    assert leaving.value.code == 2
