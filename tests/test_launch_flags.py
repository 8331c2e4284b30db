"""Flags that a newcomer types: what is understood, what is suggested, and what is said of it."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, fields

import pytest

from eval import hellaswag, sample
from launch import cli, console, flags, folder, hints, preflight
from launch.errors import BadInput, one_line_errors
from launch.probes import Line
from model import checkpoint
from model.gpt2 import GPTConfig
from tests.running import ROOT, environment
from train_gpt2 import PRESETS, TrainConfig, train


def parse(*arguments):
    return cli.parse(TrainConfig, PRESETS, list(arguments))


# ---- help ----

@pytest.mark.parametrize("command", [
    ["train_gpt2.py", "gpt2-124m"], ["-m", "eval.sample"], ["-m", "eval.hellaswag"],
    ["-m", "eval.tasks"], ["-m", "eval.report"], ["-m", "data.fineweb"], ["-m", "model.convert"],
    ["-m", "launch.preflight"], ["-m", "eval.core"], ["-m", "eval.serve"], ["-m", "data.shards"],
], ids=" ".join)
def test_help_writes_flags_as_readme_does_and_names_the_command(command):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, env=environment())
    assert done.returncode == 0
    assert not re.search(r"--[a-z.]+-[a-z]", done.stdout)
    assert "'\"'\"'" not in done.stdout
    name = "train_gpt2.py" if command[0] == "train_gpt2.py" else f"python -m {command[1]}"
    assert done.stdout.startswith(f"usage: {name} ")


def test_help_shows_a_default_with_an_apostrophe_as_people_write_it(capsys):
    with pytest.raises(SystemExit):
        parse("gpt2-124m", "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert '(default: "Hello, I\'m a language model,")' in shown


def test_every_command_reads_its_flags_alike():
    """tyro called in another file would write dashes in help, and speak on every rank."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout.split()
    ours = [name for name in listed if not name.startswith("tests/")]
    parsers = re.compile(r"tyro\.cli\(|tyro\.extras\.\w*cli\w*\(")
    callers = [name for name in ours if parsers.search((ROOT / name).read_text(encoding="utf-8"))]
    assert callers == ["launch/flags.py"]


@pytest.mark.parametrize(("rank", "said"), [("0", True), ("1", False)])
def test_a_wrong_word_is_answered_by_rank_0_alone(rank, said):
    done = subprocess.run([sys.executable, "-m", "data.shards", "verfy", "fineweb10B"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120, env=environment(RANK=rank))
    assert done.returncode == 2
    assert ("Available subcommands: verify, info, convert" in done.stderr) is said


def test_subcommands_take_their_own_flags():
    def count(folder: str, all_of_them: bool = False) -> None:
        seen.append((folder, all_of_them))

    seen: list[tuple[str, bool]] = []
    flags.parse_subcommand({"count": count, "other": print}, ["count", "--folder", "x"])
    flags.parse_subcommand({"count": count, "other": print},
                           ["count", "--all_of_them", "--folder", "y"])
    assert seen == [("x", False), ("y", True)]


# ---- switches ----

@pytest.mark.parametrize(("words", "expected"), [
    (["--deterministic"], True), (["--deterministic", "True"], True),
    (["--deterministic", "true"], True), (["--deterministic=True"], True),
    (["--deterministic", "False"], False), (["--deterministic", "--seed", "1"], True),
    (["--seed", "1"], False),
])
def test_a_switch_takes_no_value_or_the_one_of_a_file(words, expected):
    assert parse("demo", *words).compute.deterministic is expected


def test_a_switch_with_dashes_and_a_prefix_is_one_too():
    assert parse("demo", "--activation-checkpointing").compute.activation_checkpointing
    assert parse("demo", "--data.split_text", "False").data.split_text is False
    assert parse("demo", "--preflight", "--name", "x").planning.preflight


def test_a_switch_before_a_checkpoint_does_not_swallow_it():
    arguments = flags.parse(sample.Arguments, ["--json", "runs/demo", "--num", "2"])
    assert (arguments.json, arguments.checkpoint, arguments.num) == (True, "runs/demo", 2)


def test_a_text_that_is_called_like_a_switch_s_value_stays_a_text():
    assert flags.parse(sample.Arguments, ["x", "--prompt", "true"]).prompt == "true"


def test_a_function_is_called_with_its_flags(capsys):
    with pytest.raises(BadInput, match="which checkpoint"):
        flags.parse(hellaswag.main, [])


def test_a_wrong_value_of_a_switch_names_the_right_ones(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("demo", "--deterministic=maybe")
    assert leaving.value.code == 2
    assert "'True', 'False'" in capsys.readouterr().err


# ---- names from elsewhere ----

def test_nanogpts_names_are_translated_all_at_once():
    line = ("--n_layer is --model.n_layer; --learning_rate is --optim.lr; --max_iters is --steps; "
            "--block_size is --model.n_ctx; --batch_size is --micro_batch")
    with pytest.raises(BadInput) as caught:
        parse("demo", "--n_layer=6", "--learning_rate", "1e-3", "--max-iters=100", "--seed", "3",
              "--block_size=64", "--batch_size=12")
    assert str(caught.value) == line


def own_flags() -> set[str]:
    written = cli.as_flags(asdict(TrainConfig()))
    return {flag.removeprefix("--").partition("=")[0] for flag in written}


@pytest.mark.parametrize("name", hints.NANOGPT)
def test_a_name_of_nanogpts_is_none_of_ours_and_what_it_is_translated_into_is(name):
    assert name not in own_flags()
    ours = re.findall(r"--([a-z_.0-9]+)", hints.NANOGPT[name])
    assert set(ours) <= own_flags()


@pytest.mark.parametrize(("name", "preset"), [
    ("gpt2", "gpt2-124m"), ("gpt2-medium", "gpt2-350m"), ("gpt2-large", "gpt2-774m"),
    ("gpt2-xl", "gpt2-1558m"), ("774m", "gpt2-774m"), ("GPT2-124M", "gpt2-124m"),
    ("gpt2-123m", "gpt2-124m"), ("dmeo", "demo"),
])
def test_the_preset_that_was_meant_is_suggested(name, preset):
    with pytest.raises(BadInput, match=f"did you mean {preset}\\?"):
        parse(name)


# ---- a run's folder ----

def test_a_run_s_folder_goes_on_with_that_run(tiny, tmp_path, capsys):
    config = tiny(steps=3, save_every=1)
    train(config)
    asked = parse(str(tmp_path / "tiny"))
    assert asked == config
    with pytest.raises(SystemExit) as leaving:
        train(asked)
    assert leaving.value.code == 0
    assert "is finished: 3 steps" in capsys.readouterr().out


def test_a_run_that_was_moved_goes_on_where_it_is(tiny, tmp_path):
    train(tiny(steps=1, resume="never"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tiny").rename(tmp_path / "elsewhere" / "other")
    config = parse(str(tmp_path / "elsewhere" / "other") + "/")
    assert (config.name, config.out_dir) == ("other", str(tmp_path / "elsewhere"))
    assert config.resume == "auto"
    assert config.model == tiny().model


def test_the_folder_one_stands_in_may_be_a_run(tiny, tmp_path, monkeypatch):
    train(tiny(steps=1))
    monkeypatch.chdir(tmp_path / "tiny")
    config = parse(".", "--keep", "7")
    assert (config.name, config.out_dir, config.saving.keep) == ("tiny", str(tmp_path), 7)


def test_a_checkpoint_is_no_run_and_neither_is_any_folder(tiny, tmp_path):
    train(tiny(steps=1))
    with pytest.raises(BadInput, match="is a checkpoint: .*--init"):
        parse(str(tmp_path / "tiny" / "checkpoints" / "step_00000001"))
    with pytest.raises(BadInput, match="no run's folder"):
        parse(str(tmp_path))


def test_a_resume_with_forgotten_flags_names_the_file_that_has_them(tiny, tmp_path, monkeypatch):
    train(tiny(steps=2))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as caught:
        train(tiny(steps=3, seed=5))
    assert "seed 1337 there, 5 asked" in str(caught.value)
    assert ("`python train_gpt2.py tiny` goes on with it and the settings in tiny/config.json"
            in str(caught.value))


def test_the_header_names_the_weights_that_a_run_starts_from(tiny, tmp_path, capsys):
    train(tiny(steps=1))
    capsys.readouterr()
    train(tiny(steps=1, name="fine", init=str(tmp_path / "tiny")))
    newest = tmp_path / "tiny" / "checkpoints" / "step_00000001"
    assert f"starts from the weights of {newest} (--init {tmp_path / 'tiny'})" in (
        capsys.readouterr().out)


def test_init_of_another_shape_lists_every_flag_that_is_missing(tiny, tmp_path):
    train(tiny(steps=1))
    other = GPTConfig(n_layer=1, n_head=1, n_embd=16, n_ctx=16)
    with pytest.raises(BadInput) as caught:
        train(tiny(name="other", model=other, init=str(tmp_path / "tiny")))
    added = re.findall(r"--(\S+) (\S+)", str(caught.value))
    shape = tiny().model
    assert dict(added) == {"model.n_layer": str(shape.n_layer), "model.n_head": str(shape.n_head),
                           "model.n_embd": str(shape.n_embd)}


# ---- the micro-batch ----

def test_another_context_without_a_micro_batch_says_what_is_as_much_work(capsys):
    parse("gpt2-124m", "--model.n_ctx", "512")
    line = ("note: --micro_batch 64 is the preset's, for sequences of 1,024 tokens; of 512, "
            "--micro_batch 128 is as much for a GPU at once\n")
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("arguments", [
    ["gpt2-124m"], ["gpt2-124m", "--model.n_ctx", "1024"],
    ["gpt2-124m", "--model.n_ctx", "512", "--micro_batch", "64"],
], ids=" ".join)
def test_nothing_is_said_where_nothing_changes(arguments, capsys):
    parse(*arguments)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("asked", "chosen", "steps", "why"), [
    (8, 8, 3, "8: as --micro_batch says"),
    (64, 24, 1, "24: a rank has no more; --micro_batch allows 64"),
    (10, 8, 3, "8: the largest up to --micro_batch 10 that divides a rank's 24"),
])
def test_the_header_says_where_the_micro_batch_comes_from(asked, chosen, steps, why):
    assert folder.why_micro_batch(asked, {"micro_batch": chosen, "accumulation": steps}) == why


def test_it_stands_in_the_header_of_a_run(tiny, capsys):
    train(tiny(steps=1))
    assert re.search(r"sequences x 16 \(micro-batch \d+: ", capsys.readouterr().out)


# ---- terminals ----

class Terminal:
    """Standard output as a terminal."""

    def __init__(self, stream):
        self.stream = stream

    def isatty(self):
        return True

    def __getattr__(self, name):
        return getattr(self.stream, name)


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Makes one of a stream, once the test has begun: before, pytest still changes it."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    return lambda name: monkeypatch.setattr(sys, name, Terminal(getattr(sys, name)))


FOUND = {0: [Line("disk", "ok", "fast"), Line("clock", "warn", "an hour behind " * 5, "set it")]}


def test_a_terminal_has_colours(terminal):
    terminal("stdout")
    assert console.warning("look out") == "\033[33mwarning:\033[0m look out"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_it_has_none_where_they_are_not_wanted(terminal, monkeypatch, name, value):
    terminal("stdout")
    monkeypatch.setenv(name, value)
    assert console.warning("look out") == "warning: look out"


def test_what_is_piped_has_none(capsys):
    assert console.colour("text", "red") == "text"


def test_preflight_is_a_table_on_a_terminal(terminal, capsys):
    terminal("stdout")
    assert preflight.report(FOUND) == 0
    shown = capsys.readouterr().out
    assert "{" not in shown
    plain = re.sub(r"\033\[\d+m", "", shown).splitlines()
    assert plain[0] == f"ok    {'disk':<15} fast"
    assert plain[1].startswith(f"warn  {'clock':<15} an hour behind")
    assert re.match(" {22}[^ ]", plain[2])
    assert all(len(line) <= 60 for line in plain)
    assert "\033[33mwarn" in shown and "\033[32mok" in shown
    assert plain[-1] == "fit"


def test_preflight_is_json_too_where_it_is_piped_or_asked_for(terminal, capsys):
    preflight.report({0: [Line("disk", "fail", "gone")]})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"fail  {'disk':<15} gone"
    assert json.loads(lines[-1])["fit"] is False
    terminal("stdout")
    preflight.report(FOUND, as_json=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fit"] is True


def test_an_error_is_red_on_a_terminal(terminal, capsys):
    terminal("stderr")
    with pytest.raises(SystemExit), one_line_errors():
        raise BadInput("no")
    assert capsys.readouterr().err == "\033[31merror:\033[0m no\n"



def test_the_names_of_nanogpts_sample_py_are_translated_all_at_once():
    names = hints.NANOGPT_SAMPLE
    assert not names.keys() & {f.name for f in fields(sample.Arguments)}
    done = subprocess.run(
        [sys.executable, "-m", "eval.sample", *(f"--{name}=5" for name in names)],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment())
    assert done.returncode == 2
    expected = "; ".join(f"--{name} is {ours}" for name, ours in names.items())
    assert done.stderr == f"error: {expected}\n"


def test_a_run_or_a_checkpoint_that_is_nearly_there_is_named(tiny, tmp_path, monkeypatch):
    train(tiny(steps=3, out_dir=str(tmp_path / "runs")))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="tiny is no checkpoint: did you mean runs/tiny"):
        checkpoint.find("tiny")
    with pytest.raises(BadInput, match="there is no step_00000099 .* step_00000000, step_00000003"):
        checkpoint.find("runs/tiny/checkpoints/step_00000099")


@pytest.mark.parametrize("given", [
    *([preset] for preset in PRESETS), ["speedrun-demo", "--optim.optimizer", "adamw"],
    ["shakespeare-char", "--optim.schedule", "constant"]], ids=" ".join)
def test_a_script_may_write_all_flags_down(given):
    """Also those that do nothing in this run."""
    config = parse(*given)
    assert parse(*cli.as_flags(asdict(config))) == config


def test_what_a_file_holds_is_not_typed(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(asdict(parse("speedrun-demo", "--optim.optimizer", "adamw"))))
    assert parse(str(file), "--steps", "7").steps == 7
    with pytest.raises(BadInput, match="--optim.muon.head_lr is read with"):
        parse(str(file), "--optim.muon.head_lr", "0.2")
