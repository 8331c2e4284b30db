"""lm-evaluation-harness finds through our adapter what it finds through the exported folder."""

import json
import lzma
import shutil
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

from eval import choice, harness, hellaswag
from launch.errors import BadInput
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
    torch.manual_seed(0)
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

    folder = tmp_path_factory.mktemp("tasks")
    shutil.copy(Path(lm_eval.tasks.__file__).parent / "hellaswag" / "utils.py", folder)
    rows = folder / "rows.jsonl"
    made = [{"ctx": text(2, 8), "endings": [text(1, 6) for _ in range(4)], "label": i % 4}
            for i in range(200)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    for name, task in TASKS.items():
        file = folder / "original.jsonl" if name == "original_hellaswag" else rows
        header = HEADER.replace("NAME", name).replace("ROWS", str(file))
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
    own = hellaswag.evaluate(model, hellaswag.read_questions(folder / "rows.jsonl"), ALONE)
    assert own.n == 200
    for way in choice.WAYS:
        assert ours[f"{way},none"] == theirs[f"{way},none"]
    assert own.acc == ours["acc,none"]
    assert own.acc_bytes == ours["acc_bytes,none"]
    assert len({own.acc, own.acc_bytes, ours["acc_norm,none"]}) > 1  # ways that can differ


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
