"""What the pages say is true of the program: commands, flags, files, links, Python and numbers."""

import contextlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import yaml

import train_gpt2
from launch import cli
from launch.tracker import read_rows
from tests.conftest import make_config
from tests.pages import (
    PAGES,
    Command,
    blocks,
    check,
    check_module,
    check_training,
    commands,
    spans,
)
from tests.running import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
MODULES = ["data.fineweb", "eval.core", "eval.hellaswag", "eval.sample", "eval.serve",
           "eval.speedrun_cpu", "eval.tasks", "eval.report", "kernels.audit", "kernels.bench",
           "kernels.schedule", "launch.preflight", "lessons.grade", "lessons.render",
           "model.convert", "tests.bench", "tests.gpucheck"]
# Flags of torchrun, sbatch and others, that the pages name in their text.
OTHERS_FLAGS = {"--signals_to_handle", "--standalone"}
# What makes a preset's run tiny. After a page's own flags these win.
TINY = ["--steps", "2", "--eval_every", "2", "--batch_tokens", "64", "--val_tokens", "160",
        "--model.n_layer", "1", "--model.n_ctx", "16", "--micro_batch", "4"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- commands and flags ----

@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_is_one_that_its_program_takes(page):
    found = commands(page.read_text(), name(page))
    assert found or page.name == "files.md"
    for command in found:
        check(command)


@pytest.mark.parametrize("line", [
    "python train_gpt2.py demo --stepz 3",
    "python train_gpt2.py demos",
    "python train_gpt2.py demo --optim.lr fast",
    "python train_gpt2.py demo --steps 0",
    "python -m eval.sample runs/demo --promt x",
    "python -m eval.samples runs/demo",
    "python -m model.convert runs/demo out --to onnx",
    "python -m data.shards verfy mine",
    "python -m data.shards convert mine --into npy",
    "python -m kernels.audit --arch sm_91",
    "python -m kernels.selfcheck --fast",
    "torchrun --nprocs_per_node=8 train_gpt2.py gpt2-124m",
    "torchrun --nproc_per_node=8 -m eval.hellaswag runs/demo --limits 3",
    "launch/torchrun.sh gpt2-124m --data.folder x",
    "bash launch/slurm.sbatch --nodez=4 -- gpt2-124m",
    "bash launch/slurm.sbatch --nodes=4 -- gpt2-124m --sed 3",
    "PET_NPROC_PER_NOD=2 launch/torchrun.sh demo",
    "DRY_RUNS=1 launch/torchrun.sh demo",
    "sky jobs launch launch/skypilot.yaml --env ARGS='gpt2-124m --stepz 3'",
    "kubectl apply -f launch/kubernetes/job.yaml",
    "make trane",
    "make train ARGS='--stepz 3'",
    "make test ARGS=tests/test_none.py",
    "pip install -c constraints.txt -e '.[datas]'",
    "pytest -m storms",
    "frobnicate --all",
])
def test_a_command_that_is_wrong_is_found(line):
    (wrong,) = commands(f"```sh\n{line}    # and so on\n```\n", "page.md")
    with pytest.raises(AssertionError):
        check(wrong)


def test_a_page_is_taken_apart_as_a_shell_would():
    page = ("Say `make train`, or `--steps 3` of `runs/demo`.\n```sh\n"
            "A=1 make x --b 'c d' \\\n    e && cp f g | tail -1 > h   # i\n```\n"
            "```\nmake none\n```\n")
    assert commands(page, "page.md") == [
        Command("page.md", ["make", "x", "--b", "c d", "e"], {"A": "1"}),
        Command("page.md", ["cp", "f", "g"], {}),
        Command("page.md", ["tail", "-1"], {}),
        Command("page.md", ["make", "train"], {}),
    ]


@pytest.fixture(scope="module")
def training_flags() -> set[str]:
    return flags_in(partial(check_training, ["demo", "--help"]))


@pytest.fixture(scope="module")
def all_flags(training_flags) -> set[str]:
    found = training_flags | flags_in(partial(check_module, "data.shards", ["convert", "--help"]))
    for module in MODULES:
        found |= flags_in(partial(check_module, module, ["--help"]))
    return found | OTHERS_FLAGS


def flags_in(show_help) -> set[str]:
    """The flags that a program's --help names, with _ for -."""
    said = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(said):
        show_help()
    return {flag.replace("-", "_").replace("__", "--", 1)
            for flag in re.findall(r"--[a-z][\w.-]*", said.getvalue())}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_flag_in_the_text_is_a_flag(page, training_flags, all_flags):
    for span in spans(page.read_text()):
        if not re.match("--[a-z]", span):
            continue
        flag, *values = re.split(r"[\s=]+", span, maxsplit=1)
        assert flag in all_flags, f"{page.name}: {span}"
        if flag in training_flags and values and not re.search(r"[A-Z@,]", values[0]):
            check_training(["demo", flag, values[0]])


# ---- files, links, numbers ----

def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"],
                            cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {target}"
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
        assert not anchor or anchor in anchors, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_is_named_is_here(page):
    """A span of code that is the path of a file in one of this project's folders."""
    folders = "|".join(sorted({path.split("/")[0] for path in tracked() if "/" in path}))
    for path in re.findall(rf"`((?:{re.escape(folders).replace(re.escape('|'), '|')})/[\w./*-]+)`",
                           page.read_text()):
        assert list(ROOT.glob(path)), f"{page.name}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_name_that_a_page_places_in_a_file_is_there(page):
    """`NAME` in `FILE`, and `FILE`: `NAME`, `NAME`."""
    text = " ".join(page.read_text().split())
    placed = [(path, [word]) for word, path in re.findall(r"`(\w+)` in `([\w/]+\.py)`", text)]
    for path, names in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", text):
        placed.append((path, re.findall(r"\w+", names)))
    for path, names in placed:
        for word in names:
            assert re.search(rf"\b{word}\b", (ROOT / path).read_text()), f"{page.name}: {word}"


def test_the_tree_is_the_tree():
    """docs/files.md has a line for each file, and README one for each folder."""
    (tree,) = blocks((ROOT / "docs" / "files.md").read_text(), "")
    named, folders = set(), [""]
    for line in tree.splitlines():
        indent, word = re.match(r"( *)(\S+)  ", line).groups()
        folders = folders[: len(indent) // 2 + 1]
        path = folders[-1] + word
        if word.endswith("/"):
            folders.append(path)
        named.add(path)
    for path in named:
        assert (ROOT / path).exists(), f"docs/files.md: {path} is not here"
    whole = ("tests/", "docs/", "eval/report/llmc/", "lessons/exercises/", "lessons/solutions/",
             "lessons/checks/")  # a line for all of them
    unnamed = ("__init__.py", "__main__.py", ".gitignore", "README.md")
    for path in tracked():
        if not path.startswith(whole) and Path(path).name not in unnamed:
            assert path in named, f"docs/files.md has no line for {path}"
    readme = (ROOT / "README.md").read_text()
    for folder in {path.split("/")[0] for path in tracked() if "/" in path}:
        if not folder.startswith("."):
            assert re.search(rf"^{folder}/ ", readme, re.MULTILINE), f"README names no {folder}/"


def test_readme_is_short_and_so_is_the_heart():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") < 200
    order = readme.split("## Reading order")[1].split("\n## ")[0]
    heart = re.findall(r"^\d\. `([\w./]+)`:", order, re.MULTILINE)
    assert len(heart) == 7
    assert sum((ROOT / path).read_text().count("\n") for path in heart) < 2000


def test_presets_on_the_page_are_the_presets():
    (sentence,) = re.findall(r"A preset is .*?\n\n", (ROOT / "docs/training.md").read_text(), re.S)
    assert set(re.findall(r"`([\w.-]+)`", sentence)) == set(train_gpt2.PRESETS)


# ---- the pages done, on tiny inputs ----

@pytest.fixture(scope="module")
def reader(tmp_path_factory, corpus_file) -> Path:
    """What a reader has in front of these pages: runs/demo, and a text."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copy(corpus_file, folder / "input.txt")
    with contextlib.chdir(folder):
        assert train_gpt2.train(make_config(Path("runs"), Path("input.txt"), name="demo")) == 0
    return folder


@pytest.fixture
def workplace(reader, tmp_path, monkeypatch) -> None:
    """The same, as this test's working directory."""
    shutil.copytree(reader, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))


def do(command: Command) -> None:
    """Carries out a command of a page, in this process."""
    program, *arguments = command.words
    assert program == "python"
    if arguments[0] == "train_gpt2.py":
        if arguments[1] in train_gpt2.PRESETS:
            arguments += TINY
        if "1800" in arguments:  # twice the demo's steps
            arguments[arguments.index("1800")] = "4"
        config = cli.parse(train_gpt2.TrainConfig, train_gpt2.PRESETS, arguments[1:])
        assert train_gpt2.train(config) == 0, command
        return
    module = ROOT / arguments[1].replace(".", "/")
    script = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
    with (mock.patch.object(sys, "argv", [str(script), *arguments[2:]]),
          pytest.raises(SystemExit) as done):
        runpy.run_path(str(script), run_name="__main__")
    assert done.value.code == 0, command


def section(page: str, heading: str) -> list[Command]:
    """The commands of ours under a heading."""
    text = (ROOT / page).read_text().split(f"# {heading}\n")[1].split("\n## ")[0]
    return [command for command in commands(text, page) if command.words[0] == "python"]


def test_going_on_works_as_the_page_says(workplace):
    for command in section("docs/training.md", "Going on"):
        do(command)
    first = {run: read_rows(Path("runs") / run / "metrics.jsonl")[0]["val_loss"]
             for run in ("demo", "again", "further", "tuned")}
    last = read_rows(Path("runs/demo/metrics.jsonl"))[-1]["val_loss"]
    assert first["again"] == first["demo"]
    assert first["further"] == first["tuned"] == last


def test_documents_become_a_model_as_the_page_says(workplace):
    Path("my_documents").mkdir()
    text = Path("input.txt").read_text()
    for i in range(0, len(text), 500):
        Path(f"my_documents/{i:06d}.txt").write_text(text[i : i + 500])
    Path("held_out.txt").write_text("what nobody was trained on\n" * 100)
    for command in section("docs/data.md", "Documents of your own"):
        do(command)
    for run in ("my-model", "judged", "both"):
        assert Path(f"runs/{run}/checkpoints/step_00000002").is_dir()


def test_weights_move_and_a_report_is_made_as_the_pages_say(workplace):
    shutil.copytree("runs/demo", "runs/gpt2-124m")
    shutil.copytree("runs/demo", "runs/again")
    for command in section("docs/weights.md", "Moving weights"):
        if "ckpt.pt" not in command.words:
            do(command)
    for command in section("docs/judging.md", "Is it on track?"):
        do(command)
    assert Path("exported/tokenizer.json").exists()
    assert Path("runs/again/report/index.html").exists()


def test_python_on_the_page_runs(workplace, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    tiny = cli.parse(train_gpt2.TrainConfig, train_gpt2.PRESETS, ["demo", *TINY])
    monkeypatch.setitem(train_gpt2.PRESETS, "demo", tiny)
    namespace: dict = {}
    for block in blocks((ROOT / "docs/python.md").read_text(), "python"):
        exec(block.replace("steps=20", "steps=2"), namespace)
    assert namespace["exit_code"] == 0
    assert Path("runs/from-python/checkpoints/step_00000002").is_dir()


# ---- continuous integration ----

def test_the_workflow_is_one_that_github_takes():
    """actionlint where it is (its package fetches it from GitHub); the published schema always."""
    schema = ["check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    linters = [[sys.executable, "-m", *schema]]
    beside = Path(sys.executable).parent
    if actionlint := shutil.which("actionlint", path=f"{beside}:{os.environ['PATH']}"):
        linters.append([actionlint])
    for lint in linters:
        done = subprocess.run([*lint, str(WORKFLOW)], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_runs_what_a_change_has_to_pass():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    lines = {job: [step["run"] for step in steps["steps"] if "run" in step]
             for job, steps in jobs.items()}
    for line in lines["linux"] + lines["smoke"]:
        for command in commands(f"```sh\n{line}\n```\n", "ci.yml"):
            check(command)
    make = [line for line in lines["linux"] if line.startswith("make")]
    script = (ROOT / ".ci/run").read_text()
    assert make == [line.partition(" #")[0] for line in script.splitlines()
                    if line.startswith("make")]
