"""HellaSwag and its like: right scores, from any file, on any number of ranks, one line if not."""

import json
import lzma
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from data.tokenizer import encode
from eval import choice, core, hellaswag
from launch.errors import BadInput, Failed, one_line_errors
from launch.world import World
from model.formats.hf import to_hf
from model.gpt2 import GPT, GPTConfig
from tests.running import ALONE, CONFIG, ROOT, environment

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


def losses_one_by_one(model: GPT) -> torch.Tensor:
    """(3, 4), nats."""
    return torch.tensor(plain_loop(model), dtype=torch.float64)


def test_hellaswag_scores_are_those_of_the_plain_loop(model, questions_file):
    questions = hellaswag.read_questions(questions_file)
    answers = choice.answer(model, questions, ALONE)
    expected = losses_one_by_one(model)
    # fp64 in another order: a relative 1e-12 is thousands of roundings.
    assert [a.losses for a in answers] == [pytest.approx(r, rel=1e-12) for r in expected.tolist()]
    score = hellaswag.evaluate(model, questions, ALONE)
    tokens = torch.tensor([[len(encode(" " + e)) for e in row["endings"]] for row in ROWS])
    sizes = torch.tensor([[len(e.encode()) for e in row["endings"]] for row in ROWS])
    labels = torch.tensor([int(row["label"]) for row in ROWS])
    for got, losses in ((score.acc, expected), (score.acc_norm, expected / tokens),
                        (score.acc_bytes, expected / sizes)):
        assert got == (losses.argmin(1) == labels).double().mean().item()
    assert score.n == 3
    assert score.acc_stderr == math.sqrt(score.acc * (1 - score.acc) / 2)


def known_losses(*losses: float) -> World:
    """A world whose sums are these losses, none of them of a greedy ending."""

    class Known(World):
        def all_reduce_sum(self, *values):
            return [*losses, *[0.0] * len(losses)]

    return Known(0, 1, torch.device("cpu"))


def test_the_three_ways_of_comparing_differ_where_they_should():
    """By hand: the sum favours B, the mean a token A, the mean a byte C."""
    request = choice.Request([1], [[2, 3, 4, 5], [2], [2, 3]])
    question = choice.Question([request], norm_lengths=[4, 1, 2], byte_lengths=[8, 4, 12], label=2)
    losses = [8.0, 5.0, 6.0]  # a token: 2, 5, 3; a byte: 1, 1.25, 0.5
    expected = choice.Answer(losses, 1, 0, 2)
    tiny = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, n_ctx=8))
    assert choice.answer(tiny, [question], known_losses(*losses)) == [expected]
    score = choice.score([question] * 4, [expected] * 3 + [choice.Answer(losses, 2, 2, 0)])
    assert vars(score) == {
        "n": 4, "acc": 0.25, "acc_norm": 0.25, "acc_stderr": 0.25, "acc_bytes": 0.75}


def test_hellaswag_is_the_same_on_any_number_of_ranks(model, questions_file, monkeypatch):
    monkeypatch.setattr("eval.likelihood.TOKENS_AT_ONCE_CPU", 100)
    questions = hellaswag.read_questions(questions_file) * 5
    whole = choice.answer(model, questions, ALONE)
    partial = []

    class Deaf(World):
        def all_reduce_sum(self, *values):
            partial.append(values)
            return list(values)

    for rank in range(4):
        choice.answer(model, questions, Deaf(rank, 4, torch.device("cpu")))
    losses = [sum(column) for column in zip(*partial, strict=True)][:60]
    assert losses == [loss for answer in whole for loss in answer.losses]


@pytest.mark.parametrize(
    ("row", "words"),
    [("{}", "there is no 'ctx', only nothing"), ("nonsense", "no JSON: Expecting value"),
     ("[1]", "no JSON object"),
     (json.dumps({"ctx": "a", "label": 0}), "there is no 'endings', only ctx, label"),
     (json.dumps({"ctx": "a", "endings": ROWS[0]["endings"]}), "there is no 'label'"),
     (json.dumps(ROWS[0] | {"label": 4}), "label 4: expected 0 to 3"),
     (json.dumps(ROWS[0] | {"label": -1}), "label -1: expected 0 to 3"),
     (json.dumps(ROWS[0] | {"label": ""}), "label '': expected 0 to 3"),
     (json.dumps(ROWS[0] | {"label": None}), "label None: expected 0 to 3"),
     (json.dumps(ROWS[0] | {"label": True}), "label True: expected 0 to 3"),
     (json.dumps(ROWS[0] | {"endings": ["a"]}), "1 endings"),
     (json.dumps(ROWS[0] | {"endings": ["a", "b"]}), "2 endings, expected 4"),
     (json.dumps(ROWS[0] | {"endings": ["a", "b", "c", " "]}), "no list of texts"),
     (json.dumps(ROWS[0] | {"endings": "abcd"}), "no list of texts"),
     (json.dumps(ROWS[0] | {"ctx": ["a"]}), "ctx is no text")],
    ids=lambda v: v[-30:],
)
def test_a_wrong_row_is_named(tmp_path, row, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + row + "\n")
    with pytest.raises(BadInput) as found:
        hellaswag.read_questions(path)
    assert f"{path}, line 2: " in str(found.value)
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_no_rows_and_no_file_are_refused(tmp_path):
    with pytest.raises(BadInput, match="can't read"):
        hellaswag.read_questions(tmp_path / "none.jsonl")
    for name, content in (("empty.jsonl", b""), ("blank.jsonl", b"\n \n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=f"{name} is empty: expected a JSON object a line"):
            hellaswag.read_questions(tmp_path / name)
    for name in ("text.jsonl.xz", "binary.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00 no")
        with pytest.raises(BadInput, match="can't read"):
            hellaswag.read_questions(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.xz"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, name):
    content = b"\xef\xbb\xbf" + json.dumps(ROWS[2], ensure_ascii=False).encode()
    path = tmp_path / name
    path.write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    assert hellaswag.read_questions(path)[0].label == 0


def test_rows_are_utf8_in_any_locale(tmp_path):
    """Text files are ASCII in the locale C without Python's ways round it (PEP 538, PEP 540)."""
    for name, pack in (("rows.jsonl", bytes), ("rows.jsonl.xz", lzma.compress)):
        (tmp_path / name).write_bytes(pack(json.dumps(ROWS[1], ensure_ascii=False).encode()))
    code = ("import sys; from pathlib import Path; from eval.hellaswag import read_questions;"
            "print(*[read_questions(Path(p))[0].byte_lengths for p in sys.argv[1:]])")
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, tmp_path.iterdir())], cwd=ROOT, timeout=120,
        capture_output=True, text=True,
        env=environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
    )
    assert done.stdout == "[7, 30, 12, 20] [7, 30, 12, 20]\n", done.stderr


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_numbers_get_no_score(loss):
    request = choice.Request([1], [[2], [3]])
    question = choice.Question([request], norm_lengths=[1, 1], byte_lengths=[1, 1], label=0)
    tiny = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, n_ctx=8))
    with pytest.raises(Failed, match="the model's losses are no numbers"):
        choice.answer(tiny, [question], known_losses(1.0, loss))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model) -> str:
    folder = tmp_path_factory.mktemp("hf")
    to_hf(model, folder)
    return f"hf:{folder}"


def test_the_command_ends_with_its_json_and_tells_what_was_published(
    checkpoint, questions_file, tmp_path, capsys
):
    details = tmp_path / "a.jsonl"
    hellaswag.main(checkpoint, str(questions_file), dtype="fp32", details=str(details))
    *_, published, last = capsys.readouterr().out.splitlines()
    assert list(json.loads(last)) == ["n", "acc", "acc_norm", "acc_stderr", "acc_bytes"]
    for figure in ("0.294463 (124M)", "0.375224", "0.431986", "0.488946", "3 questions: not to be"):
        assert figure in published
    assert hellaswag.published(10_042).endswith("guessing: 0.25")
    rows = [json.loads(line) for line in details.read_text().splitlines()]
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert [row["label"] for row in rows] == [3, 1, 0]
    right = sum(row["acc"] == row["label"] for row in rows) / 3
    assert json.loads(last)["acc"] == round(right, 6)


def test_compare_names_the_questions_that_two_models_answer_differently(
    questions_file, tmp_path, capsys
):
    questions = hellaswag.read_questions(questions_file)  # labels 3, 1, 0
    paths = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    losses = [1.0] * 4
    for path, second in zip(paths, (0, 1), strict=True):
        answers = [choice.Answer(losses, 3, 2, 2), choice.Answer(losses, second, 2, 2),
                   choice.Answer(losses, 1, 2 - second, 2)]
        choice.write_details(path, questions, answers)
    hellaswag.main(compare=paths)
    a, b = paths
    assert capsys.readouterr().out.splitlines() == [
        "row 1, label 1: acc 0 -> 1",
        "row 2, label 0: acc_norm 2 -> 1",
        f"acc: 1 of 3 answers differ; right in {a} alone 0, in {b} alone 1",
        f"acc_norm: 1 of 3 answers differ; right in {a} alone 0, in {b} alone 0",
        f"acc_bytes: 0 of 3 answers differ; right in {a} alone 0, in {b} alone 0",
    ]


def test_compare_refuses_other_questions(questions_file, tmp_path):
    questions = hellaswag.read_questions(questions_file)
    answers = [choice.Answer([1.0] * 4, 0, 0, 0)] * 3
    paths = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    choice.write_details(paths[0], questions, answers)
    choice.write_details(paths[1], questions[::-1], answers)
    with pytest.raises(BadInput, match="not of the same questions"):
        choice.compare(*paths)
    with pytest.raises(BadInput, match=r"line 1: there is no 'row', only ctx"):
        choice.compare(paths[0], questions_file)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({}, "which checkpoint?"), ({"checkpoint": "x", "limit": -1}, "--limit -1"),
     ({"checkpoint": "/nowhere", "data": "rows"}, "/nowhere is no checkpoint"),
     ({"checkpoint": ".", "data": "rows"}, "can't read rows")], ids=str,
)
def test_a_wrong_command_gets_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as leaving, one_line_errors():
        hellaswag.main(**arguments)
    assert leaving.value.code == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("weight", ["wte.weight", "h.1.attn.c_proj.bias"])
def test_broken_weights_are_refused_by_the_command(questions_file, tmp_path, capsys, weight):
    """Every comparison with NaN is false: they would be right wherever the first ending is."""
    broken = GPT(CONFIG)
    with torch.no_grad():
        broken.get_parameter(weight).flatten()[:8] = math.nan
    to_hf(broken, tmp_path / "hf")
    with pytest.raises(SystemExit) as leaving, one_line_errors():
        hellaswag.main(f"hf:{tmp_path / 'hf'}", str(questions_file), dtype="fp32")
    assert leaving.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: the model's losses are no numbers")
    assert printed.err.count("\n") == 1


def test_real_rows(model, real_data):
    questions = hellaswag.read_questions(real_data / "hellaswag_val_first1000.jsonl.xz", limit=20)
    score = hellaswag.evaluate(model, questions, ALONE)
    assert score.n == 20
    assert 0 <= score.acc_norm <= 1


@pytest.mark.parametrize("command", [hellaswag, core], ids=["hellaswag", "core"])
@pytest.mark.parametrize(("name", "said"), [
    ("model.bin", "model.convert"), ("ckpt.pt", "model.convert"), ("nothing", "is no checkpoint"),
])
def test_what_is_no_checkpoint_is_said_before_anything_is_downloaded(
    command, name, said, tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "fetch", lambda: pytest.fail("downloads for no checkpoint"))
    monkeypatch.chdir(tmp_path)
    if name != "nothing":
        (tmp_path / name).write_bytes(b"weights of somebody's")
    with pytest.raises(BadInput, match=said):
        command.main(name)
