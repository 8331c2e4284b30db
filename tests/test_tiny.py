"""The whole program in seconds: train, stop, resume, validate, sample, judge."""

import json
import math
import shlex
import signal
import subprocess
import threading
from dataclasses import asdict

import pytest
import torch
import tyro

import train_gpt2
from eval.sample import Arguments, continue_prompts
from eval.wrap import indented
from launch import recovery, tracker
from launch.reports import StepReports
from launch.tracker import read_rows
from model.checkpoint import load_model
from model.generate import SampleConfig
from model.gpt2 import GPTConfig
from tests.running import ROOT, flags, losses, run_program, weights
from train_gpt2 import train


def test_a_run_from_first_step_to_sample(tiny, capsys):
    config = tiny()
    assert train(config) == 0
    run = train_gpt2.Path(config.out_dir) / "tiny"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step_00000000", "step_00000003", "step_00000006",
    ]
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 3, 6]
    assert rows[-1]["tokens"] == 6 * config.batch_tokens
    first, last = rows[0]["val_loss"], rows[-1]["val_loss"]
    assert last < first - 0.1  # six steps at 3e-3 are enough to notice which words there are
    assert rows[0]["val_set"] == "corpus.txt, 320 tokens"
    assert (run / "report" / "loss.png").stat().st_size > 1000
    assert not (run / "STOPPED").exists()
    printed = capsys.readouterr().out
    assert "step      6/6" in printed
    assert "next: python -m eval.sample" in printed
    assert f"sample:\n{indented(rows[-1]['sample'])}\n" in printed  # on record it is exact

    model = load_model(str(run))
    texts = continue_prompts(model, ["the"] * 2, SampleConfig(max_tokens=8), torch.device("cpu"))
    assert len(texts) == 2
    assert all(made.text for made in texts)


def test_a_run_crops_a_prompt_that_is_too_long_and_says_so(tiny, capsys):
    config = tiny(steps=1, prompt="the face of the deep\n" * 10)
    assert train(config) == 0
    assert "the model's context 16: the model reads the last 16" in capsys.readouterr().out
    rows = read_rows(train_gpt2.Path(config.out_dir) / "tiny" / "metrics.jsonl")
    assert rows[-1]["sample"].startswith(config.evaluation.prompt)


def test_the_next_command_can_be_pasted_whatever_the_prompt(tiny, capsys):
    train(tiny(steps=1, prompt="-x 'quoted'\n$HOME"))
    command = capsys.readouterr().out.split("next: ")[1]
    arguments = tyro.cli(Arguments, args=shlex.split(command)[3:])
    assert arguments.prompt == "-x 'quoted'\n$HOME"


def test_initial_loss_is_that_of_gpt2s_init(tiny):
    config = tiny(steps=1)
    train(config)
    row = read_rows(train_gpt2.Path(config.out_dir) / "tiny" / "metrics.jsonl")[0]
    # Logits are sums of C products of a normalised activation and N(0, 0.02): variance C * 0.02^2.
    expected = math.log(50257) + config.model.n_embd * 0.02**2 / 2
    assert row["val_loss"] == pytest.approx(expected, abs=0.06)


def test_stopped_and_resumed_is_never_stopped_bit_for_bit(tiny, tmp_path, monkeypatch):
    whole = tiny(out_dir=str(tmp_path / "whole"))
    train(whole)
    stopped = tiny(out_dir=str(tmp_path / "stopped"))

    # A SIGTERM arrives in the fourth step, one after the last scheduled checkpoint.
    original = train_gpt2.get_lr

    def signal_in_step_four(step, *rest):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(step, *rest)

    monkeypatch.setattr(train_gpt2, "get_lr", signal_in_step_four)
    assert train(stopped) == 0
    monkeypatch.setattr(train_gpt2, "get_lr", original)
    run = tmp_path / "stopped" / "tiny"
    assert (run / "STOPPED").read_text() == "stopped by SIGTERM at step 4\n"
    assert (run / "checkpoints" / "step_00000004").is_dir()
    assert len(losses(run)) == 4

    assert train(stopped) == 0
    assert not (run / "STOPPED").exists()
    assert losses(run) == losses(tmp_path / "whole" / "tiny")
    one, two = weights(tmp_path / "whole" / "tiny", 6), weights(run, 6)
    assert all(torch.equal(one[name], two[name]) for name in one)
    val = [[row["val_loss"] for row in read_rows(folder / "metrics.jsonl") if "val_loss" in row]
           for folder in (run, tmp_path / "whole" / "tiny")]
    assert val[0] == val[1]


def test_rows_past_the_resumed_step_are_cut(tiny, tmp_path):
    config = tiny()
    train(config)
    run = tmp_path / "tiny"
    before = losses(run)
    train_gpt2.checkpoint.remove(run / "checkpoints" / "step_00000006")
    train(config)
    assert losses(run) == before  # rows 4 to 6 were written again, not twice


def test_a_finished_run_says_so_and_exits_0(tiny, capsys):
    config = tiny(steps=1)
    train(config)
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        train(config)
    assert leaving.value.code == 0
    assert "is finished" in capsys.readouterr().out


def test_config_json_starts_the_same_run_again(tiny, tmp_path):
    config = tiny(steps=3)
    train(config)
    saved = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert saved["config"] == asdict(config)
    done = run_program([str(tmp_path / "tiny" / "config.json"), "--name", "again"])
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "again") == losses(tmp_path / "tiny")


def test_init_starts_a_new_run_from_weights_alone(tiny, tmp_path):
    train(tiny(steps=3))
    train(tiny(steps=1, name="fine", init=str(tmp_path / "tiny"), eval_every=1))
    rows = read_rows(tmp_path / "fine" / "metrics.jsonl")
    parent = read_rows(tmp_path / "tiny" / "metrics.jsonl")
    assert rows[0]["step"] == 0
    assert rows[0]["val_loss"] == parent[-1]["val_loss"]


def test_two_ranks_and_accumulation_train_the_same_model(tiny, tmp_path):
    """Invariant 1. fp64: another order of summation moves a sum by some 1e-16 of itself, Adam's
    division and five steps by a few hundred times that; a fault in scaling moves it by 1."""
    start = dict(dtype="fp64", steps=5, eval_every=5, save_every=5)
    train(tiny(name="one", **start))
    train(tiny(name="accumulated-2", micro_batch=6, **start))
    train(tiny(name="accumulated-4", micro_batch=3, **start))
    done = run_program(flags(tiny(name="ranks", micro_batch=2, **start)), ranks=2)
    assert done.returncode == 0, done.stderr
    one = weights(tmp_path / "one", 5)
    assert one["wte.weight"].dtype == torch.float64
    for name in ("accumulated-2", "accumulated-4", "ranks"):
        other = weights(tmp_path / name, 5)
        worst = max((one[key] - other[key]).abs().max().item() for key in one)
        assert worst < 1e-12, name
        val = [read_rows(tmp_path / run / "metrics.jsonl")[-1]["val_loss"] for run in ("one", name)]
        assert val[0] == pytest.approx(val[1], abs=1e-12)


def test_ctrl_c_saves_and_exits_130(tiny, tmp_path, monkeypatch):
    original = train_gpt2.get_lr

    def interrupt(step, *rest):
        signal.raise_signal(signal.SIGINT)
        return original(step, *rest)

    monkeypatch.setattr(train_gpt2, "get_lr", interrupt)
    assert train(tiny()) == 130
    assert (tmp_path / "tiny" / "checkpoints" / "step_00000001" / "manifest.json").exists()


def test_compiled_steps_are_the_eager_steps(tiny, tmp_path):
    """Inductor fuses and reorders fp32 sums: a relative 1e-5 of the loss is a hundred roundings."""
    small = {"steps": 3, "model": GPTConfig(n_layer=1, n_head=1, n_embd=16, n_ctx=16)}
    train(tiny(name="eager", **small))
    done = run_program(flags(tiny(name="compiled", compile=True, **small)), timeout=300)
    assert done.returncode == 0, done.stderr
    for (_, one), (_, two) in zip(
        losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True
    ):
        assert one == pytest.approx(two, rel=1e-5)
    assert set(weights(tmp_path / "compiled", 3)) == set(weights(tmp_path / "eager", 3))


def test_deterministic_algorithms_train_the_same_model(tiny, tmp_path):
    """And launch nothing more: PyTorch would fill every new tensor with NaN."""
    train(tiny(name="usual", profile=1))
    done = run_program(flags(tiny(name="strict", profile=1, deterministic=True)))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "usual") == losses(tmp_path / "strict")
    fills = {}
    for name in ("usual", "strict"):
        trace = json.loads((tmp_path / name / "profile" / "trace.json").read_text())
        names = [event["name"] for event in trace["traceEvents"]]
        assert names.count("aten::addmm") > 0
        fills[name] = names.count("aten::fill_")
    assert fills["strict"] == fills["usual"]


def test_profile_writes_a_trace(tiny, tmp_path):
    train(tiny(profile=1))
    assert (tmp_path / "tiny" / "profile" / "trace.json").stat().st_size > 10_000


def test_a_profile_hears_of_each_step_once_however_late_the_host_hears(tiny, monkeypatch):
    """With evaluations between, before which the host catches up."""
    order, put, next_step = [], StepReports.put, tracker._next_step
    monkeypatch.setattr(StepReports, "put", lambda self, step, *rest: (
        order.append(("launched", step)), put(self, step, *rest)))
    monkeypatch.setattr(tracker, "_next_step", lambda profiler, *rest: (
        next_step(profiler, *rest), order.append(("profiled", profiler.step_num - 1))))
    monkeypatch.setattr(train_gpt2, "device_decides", lambda *_: True)
    train(tiny(profile=1, steps=4, eval_every=2))
    assert order == [(what, step) for step in range(4) for what in ("launched", "profiled")]


def test_a_run_too_short_for_a_profile_says_so(tiny, capsys):
    train(tiny(profile=1, steps=2))
    assert "no profile: it takes three steps more" in capsys.readouterr().out


def test_story_stays_short():
    """train_gpt2.py is read aloud: under 300 lines (ARCHITECTURE's budget)."""
    source = train_gpt2.Path(train_gpt2.__file__).read_text()
    assert source.count("\n") < 300


def test_a_file_is_read_in_one_sitting():
    """400 lines at most, but for tests: what grows beyond answers two questions."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout.split()
    lengths = {name: (ROOT / name).read_text(encoding="utf-8").count("\n") for name in listed
               if not name.startswith("tests/")}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_a_step_waits_for_nothing_where_the_device_decides(tiny, monkeypatch):
    """On a GPU every tensor that the host reads makes it wait for all that was launched: from a
    step's batch to its report there is none, and a step's report is read once, behind the next."""
    read, steps, order = [], [], []

    def counted(name, original):
        def reads(tensor, *rest):
            if threading.current_thread() is threading.main_thread():  # not the one that saves
                read.append((name, tensor.numel()))
            return original(tensor, *rest)
        return reads

    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    get_batch, put, follow = recovery.get_batch, StepReports.put, StepReports._follow

    def begin(*arguments):
        read.clear()
        return get_batch(*arguments)

    def end(self, step, *rest):
        put(self, step, *rest)
        steps.append(list(read))
        order.append(("launched", step))

    def heard(self, run, report):
        read.clear()
        step = follow(self, run, report)
        steps.append(list(read))
        order.append(("heard of", report.step))
        return step

    monkeypatch.setattr(recovery, "get_batch", begin)
    monkeypatch.setattr(StepReports, "put", end)
    monkeypatch.setattr(StepReports, "_follow", heard)
    monkeypatch.setattr(train_gpt2, "device_decides", lambda *_: True)
    assert train(tiny(micro_batch=3, steps=3, save_every=3)) == 0
    assert order == [("launched", 0), ("launched", 1), ("heard of", 0), ("launched", 2),
                     ("heard of", 1), ("heard of", 2)]
    assert [len(reads) for reads in steps] == [0, 0, 1, 0, 1, 1]
    assert {read for reads in steps for read in reads} == {("tolist", 6)}
