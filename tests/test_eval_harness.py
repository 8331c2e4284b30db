"""lm-evaluation-harness finds through our adapter what it finds through the exported folder."""

import contextlib
import json
import lzma
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `eval`)")
pytest.importorskip("accelerate", reason="lm-eval's Hugging Face model needs accelerate")

import lm_eval
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from eval import choice, harness, hellaswag, tasks
from launch.errors import BadInput, Failed
from launch.world import World
from model.convert import write_hf
from model.gpt2 import GPT, GPTConfig

ALONE = World(0, 1, torch.device("cpu"))
# Tasks over a local file. local_hellaswag asks the same text as eval.hellaswag.
TASKS = {
    "local_hellaswag": """
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{endings}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
""",
    # lm-evaluation-harness's own HellaSwag, over rows of the original file.
    "original_hellaswag": """
output_type: multiple_choice
process_docs: !function utils.process_docs
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: "choices"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    # As the harness's piqa, arc_easy, winogrande and lambada_openai, over the fields of our rows.
    "local_query": """
output_type: multiple_choice
doc_to_text: "Question: {{query}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
""",
    "local_schema": """
output_type: multiple_choice
doc_to_text: gold
doc_to_target: continuation
doc_to_choice: "{{context_options}}"
metric_list: [{metric: acc}]
""",
    "local_cloze": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{(ctx + ' ') * 32}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
}
HEADER = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}, cache_dir: CACHE}
test_split: test
"""


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)  # of which three ways to count shares give three figures
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=192))
    torch.nn.init.normal_(model.wte.weight[:50257], std=0.3)  # opinions, not noise
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 questions, made of words whose bytes are not all letters, and tasks over them."""
    words = "the café a man über snow she naïve lifts ☃ into door and quickly".split(" ")
    torch.manual_seed(1)

    def text(low: int, high: int) -> str:
        picked = torch.randint(0, len(words), (int(torch.randint(low, high, ())),))
        return " ".join(words[i] for i in picked)

    def endings(count: int) -> list[str]:
        return [text(1, 6) for _ in range(count)]

    folder = tmp_path_factory.mktemp("tasks")
    shutil.copy(Path(lm_eval.tasks.__file__).parent / "hellaswag" / "utils.py", folder)
    rows: dict[str, list] = {"rows": [], "local_query": [], "local_schema": [], "local_cloze": []}
    for i in range(200):
        rows["rows"].append({"ctx": text(2, 8), "endings": endings(4), "label": i % 4})
    for i in range(60):  # spaces at the ends belong to the text, for the harness too
        # Few tokens of many letters, several tokens and bytes a letter, and what lies between.
        choices = [f"{text(1, 4)} responsibility", f"☃☃ {text(1, 3)}", text(2, 6), " über "]
        rows["local_query"].append({"query": text(2, 8) + " ", "choices": choices, "gold": i % 4})
    for i in range(60):
        contexts = [f"{text(1, 4)} door", f"{text(1, 4)} snow"]
        continuation = text(1, 3)
        rows["local_schema"].append(
            {"context_options": contexts, "continuation": continuation, "gold": i % 2})
    for _ in range(40):
        rows["local_cloze"].append({"text": text(3, 9)})
    rows["local_text"] = [{"text": " ".join(endings(200))}]
    for name, contents in rows.items():
        lines = [json.dumps(row) + "\n" for row in contents]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name, task in TASKS.items():
        file = "original" if name == "original_hellaswag" else name if name in rows else "rows"
        header = HEADER.replace("NAME", name).replace("ROWS", str(folder / f"{file}.jsonl"))
        header = header.replace("CACHE", str(folder / "cache"))
        (folder / f"{name}.yaml").write_text(header + task)
    return folder


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """What the harness itself makes of the exported folder."""
    path = tmp_path_factory.mktemp("hf")
    write_hf(model, path)
    return HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=16)


@pytest.fixture(scope="module")
def manager(folder):
    """Knows our tasks alone: to read the harness's own thousands takes seconds."""
    return TaskManager(include_path=str(folder), include_defaults=False)


def both(
    task: str, model: GPT, exported: HFLM, manager: TaskManager, limit: int = 0
) -> tuple[dict, dict]:
    """The harness's metrics of a task through our adapter, and through the exported folder."""
    ours = harness.evaluate(model, [task], ALONE, manager, limit)[task]
    theirs = lm_eval.simple_evaluate(
        model=exported, tasks=[task], task_manager=manager, limit=limit or None, bootstrap_iters=0
    )["results"][task]
    return ours, theirs


def test_hellaswag_is_the_same_through_adapter_export_and_eval_hellaswag(
    model, exported, folder, manager
):
    ours, theirs = both("local_hellaswag", model, exported, manager)
    score = hellaswag.evaluate(model, hellaswag.read_questions(folder / "rows.jsonl"), ALONE)
    assert score.n == 200
    for way in choice.WAYS:
        assert ours[f"{way},none"] == theirs[f"{way},none"]
    assert score.acc == ours["acc,none"]
    assert score.acc_bytes == ours["acc_bytes,none"]
    assert score.acc_norm != ours["acc_norm,none"]  # a token's mean, and a character's


@pytest.mark.parametrize(("task", "names", "figures"), [
    ("local_query", ("piqa", "arc_easy"), ("acc", "acc_norm", "acc_bytes")),
    ("local_schema", ("winogrande",), ("acc",)),
], ids=["query", "schema"])
def test_eval_tasks_gives_the_harness_shares(
    model, exported, folder, manager, task, names, figures
):
    ours, theirs = both(task, model, exported, manager)
    for name in names:
        questions = tasks.read_docs(name, folder / f"{task}.jsonl", 0)
        score = tasks.evaluate(name, model, questions, ALONE)
        for figure in figures:
            assert getattr(score, figure) == ours[f"{figure},none"]
            assert ours[f"{figure},none"] == theirs[f"{figure},none"]
        if task == "local_query":
            by_token = [replace(q, norm_lengths=q.token_lengths) for q in questions]
            other = choice.score(by_token, choice.answer(model, by_token, ALONE))
            assert len({other.acc_norm, score.acc_norm, score.acc_bytes}) == 3  # they can differ


def test_eval_tasks_gives_the_harness_perplexity(model, exported, folder, manager):
    """fp32 losses, averaged, in the exponent: a relative 1e-5 is some hundred roundings."""
    ours, theirs = both("local_cloze", model, exported, manager)
    docs = tasks.read_docs("lambada", folder / "local_cloze.jsonl", 0)
    result = tasks.evaluate("lambada", model, docs, ALONE)
    assert result.acc == ours["acc,none"] == theirs["acc,none"]
    assert result.ppl == pytest.approx(ours["perplexity,none"], rel=1e-12)
    assert result.ppl == pytest.approx(theirs["perplexity,none"], rel=1e-5)


def test_eval_tasks_gives_the_harness_bits_per_byte(model, exported, folder, manager):
    """One text of three contexts and more."""
    ours, theirs = both("local_text", model, exported, manager)
    text = json.loads((folder / "local_text.jsonl").read_text())["text"]
    result = tasks.evaluate("bits_per_byte", model, text, ALONE)
    assert result.tokens > 3 * model.config.n_ctx
    assert result.bits_per_byte == pytest.approx(ours["bits_per_byte,none"], rel=1e-12)
    assert result.bits_per_byte == pytest.approx(theirs["bits_per_byte,none"], rel=1e-5)


@pytest.mark.parametrize("task", ["local_query", "local_text"])
def test_losses_that_are_no_numbers_get_no_figure(manager, task):
    broken = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=192))
    torch.nn.init.constant_(broken.ln_f.weight, math.nan)
    with pytest.raises(Failed, match="the model's losses are no numbers"):
        harness.evaluate(broken, [task], ALONE, manager)


def test_the_last_line_is_json_where_a_metric_is_no_number(monkeypatch, capsys):
    results = {"task": {"acc,none": 0.5, "ppl,none": math.inf, "acc_stderr,none": math.nan}}
    monkeypatch.setattr(harness, "evaluate", lambda *_: results)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: None)
    monkeypatch.setattr(choice, "open_model", lambda *_: contextlib.nullcontext())
    harness.main("checkpoint", "task")
    last = capsys.readouterr().out.splitlines()[-1]
    metrics = {"acc,none": 0.5, "ppl,none": None, "acc_stderr,none": None}
    assert json.loads(last, parse_constant=pytest.fail) == {"task": metrics}


def test_the_harness_own_hellaswag_on_real_rows(model, exported, folder, manager, real_data):
    rows = lzma.open(real_data / "hellaswag_val_first1000.jsonl.xz", "rt").readlines()[:200]
    (folder / "original.jsonl").write_text("".join(rows))
    ours, theirs = both("original_hellaswag", model, exported, manager)
    for way in ("acc", "acc_norm"):
        assert ours[f"{way},none"] == theirs[f"{way},none"]


def test_rolling_likelihood_is_that_of_the_export(model, exported, manager):
    """Texts longer than the context of 192. fp32 sums of some 1,000 losses: relative 1e-5."""
    ours, theirs = both("local_rolling", model, exported, manager, limit=6)
    for metric in ("bits_per_byte,none", "word_perplexity,none"):
        assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5)


def test_greedy_continuations_are_those_of_the_export(model, exported, folder):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()[:6]]
    settings = {"until": [" the", "e"], "max_gen_toks": 12, "do_sample": False}
    requests = [Instance("generate_until", {}, (row["ctx"], settings), i)
                for i, row in enumerate(rows)]
    ours = harness.Adapter(model, ALONE).generate_until(requests)
    assert ours == exported.generate_until(requests, disable_tqdm=True)
    assert any(ours)


def test_an_unknown_task_gets_one_line(model, manager):
    with pytest.raises(BadInput, match="no task 'helaswag'"):
        harness.evaluate(model, ["helaswag"], ALONE, manager)


def test_data_that_cannot_be_fetched_get_one_line(model, tmp_path):
    """Tests are offline (conftest.py), as a machine without a network is."""
    (tmp_path / "far_away.yaml").write_text(
        "task: far_away\ndataset_path: nobody/nothing\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with pytest.raises(Failed, match="the data of far_away can't be fetched: .* Offline: give the"):
        harness.evaluate(model, ["far_away"], ALONE, manager)
