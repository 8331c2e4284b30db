"""Bad flags and environments get one clear line and exit code 2, before any work starts."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from data import fineweb
from data.fineweb import FineWebConfig
from eval import sample
from launch import cli, preflight
from launch.errors import BadInput, one_line_errors
from launch.preflight import Needs
from model.generate import SampleConfig
from tests.running import run_program
from train_gpt2 import PRESETS, TrainConfig, train


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpt2-123m"], "did you mean gpt2-124m?"),
        (["nowhere.json"], "can't read nowhere.json"),
        (["demo", "--stepz", "3"], "--steps"),
        (["demo", "--dtype", "bf15"], "bf16"),
        (["demo", "--reduce_dtype", "fp16"], "Expected one of ('fp32', 'bf16')"),
        (["demo", "--batch_tokens", "1000"], "the nearest that is: 896 or 1,024"),
        (["demo", "--data.text", "/nowhere.txt"], "can't read the text"),
        (["demo", "--name", "a/b"], "no folder name"),
        (["demo", "--name", "é" * 128], "has 256 bytes"),
        (["demo", "--model.n_head", "3"], "not divisible by n_head 3"),
        (["gpt2-124m", "--data.dir", "/nowhere"], "python -m data.fineweb"),
        (["demo", "--init", "/nowhere"], "is no checkpoint"),
        (["demo", "--resume", "/nowhere"], "is no checkpoint"),
        (["demo", "--model.n_vocab", "100"], "--model.n_vocab is 50257"),
        (["gpt2-124m", "--plan", "8xh100", "--steps", "-5"], "--steps -5: expected 1 to"),
        (["gpt2-124m", "--plan", "8xh100", "--micro_batch", "0"], "--micro_batch 0: expected at"),
        (["demo", "--model.n_layer", "0"], "n_layer 0: expected a whole number, 1 to"),
        (["demo", "--model.n_head", "-2"], "n_head -2: expected a whole number, 1 to"),
        (["demo", "--model.n_embd", "0"], "n_embd 0: expected a whole number, 1 to"),
        (["demo", "--model.n_ctx", str(10**9)], "n_ctx 1000000000: expected a whole number"),
        (["demo", "--model.n_vocab", "-1"], "n_vocab -1: expected a whole number, 1 to"),
        (["demo", "--model.n_embd", "1", "--model.n_head", "1", "--optim.optimizer", "muon"],
         "--optim.optimizer muon needs matrices, and this model's have a side of 1: a larger"),
        (["demo", "--optim.muon.momentum", "0.9"],
         "--optim.muon.momentum is read with --optim.optimizer muon, and this run has adamw: leave "
         "it out, or choose that"),
        (["speedrun-demo", "--optim.optimizer", "adamw", "--optim.muon.embed-lr=0.1"],
         "--optim.muon.embed_lr is read with --optim.optimizer muon"),
        (["shakespeare-char", "--optim.schedule", "constant", "--optim.final_lr", "0.2"],
         "--optim.final_lr is read with --optim.schedule cosine or wsd"),
        (["demo", "--optim.decay_ratio", "0.5"], "read with --optim.schedule wsd"),
        (["demo", "--optim.schedule", "constant", "--optim.final_lr", "0.1"],
         "--optim.final_lr is read with --optim.schedule cosine or wsd, and this run has constant"),
        (["demo", "--optim.lr", "high"], "--optim.lr"),
        (["demo", "--steps", "1e3"], "--steps"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "",
)
def test_one_clear_line(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving, one_line_errors():
        train(cli.parse(TrainConfig, PRESETS, [*arguments, "--out_dir", str(tmp_path)]))
    assert leaving.value.code == 2
    printed = capsys.readouterr().err
    assert words in " ".join(printed.replace("│", " ").split())  # tyro's box breaks its lines
    if printed.startswith("error:"):  # not tyro's box
        assert printed.count("\n") == 1


# What is outside the bounds of every number that a run can be given, and the bounds as they are
# named. Each was legal once, or would be harmful: NaN and infinity where a float is asked, what is
# negative, zero where it divides, more than the type behind it holds.
OUT_OF_BOUNDS = {
    "steps": (["0", "-5", "100000000", str(10**400)], "1 to 99,999,999"),
    "minutes": (["-1.0", "nan", "inf", "525601.0"], "0 to 525,600"),
    "batch_tokens": (["0", "-128", str(10**30)], "1 to 1,000,000,000"),
    "micro_batch": (["0", "-1"], "at least 1"),
    "seed": (["-1", str(2**32)], "0 to 4,294,967,295"),
    "optim.lr": (["-0.1", "nan", "inf", "1e+39"], "0 to 1e+38"),
    "optim.final_lr": (["-0.1", "nan", "1.5"], "0 to 1"),
    "optim.warmup_steps": (["-1", str(10**400)], "0 to 99,999,999"),
    "optim.weight_decay": (["-0.1", "nan", "inf", "1e+30"], "0 to 100"),
    "optim.beta1": (["-0.1", "nan", "1.0", "1.5"], "0 to 0.999999"),
    "optim.beta2": (["-0.1", "nan", "1.0", "inf"], "0 to 0.999999"),
    "optim.eps": (["0.0", "1e-50", "-1e-08", "nan", "inf"], "1e-37 to 1"),
    "optim.clip": (["-1.0", "nan", "inf"], "0 to 1e+38"),
    "optim.decay_ratio": (["-0.1", "nan", "1.5"], "0 to 1"),
    "optim.muon.momentum": (["-0.1", "nan", "1.0"], "0 to 0.999999"),
    "optim.muon.momentum_warmup": (["-1", str(10**400)], "0 to 99,999,999"),
    "optim.muon.embed_lr": (["-0.1", "nan", "inf"], "0 to 1e+38"),
    "optim.muon.head_lr": (["-0.1", "nan", "inf"], "0 to 1e+38"),
    "optim.muon.vector_lr": (["-0.1", "nan", "inf"], "0 to 1e+38"),
    "optim.muon.adamw_weight_decay": (["-0.1", "nan", "inf"], "0 to 100"),
    "save_every": (["0", "-1", str(10**30)], "1 to 99,999,999"),
    "keep": (["0", "-1", str(10**400)], "1 to 99,999,999"),
    "eval_every": (["0", "-1", str(10**30)], "1 to 99,999,999"),
    "val_tokens": (["0", "-1", str(10**400)], "1 to 1,000,000,000,000"),
    "early_stop": (["-1", str(10**30)], "0 to 99,999,999"),
    "profile": (["-1", "1000000"], "0 to 1,000 steps"),
    "diagnose_every": (["-1", str(10**30)], "0 to 99,999,999"),
    "max_spikes": (["-1"], "at least 0"),
    "hang_timeout": (["0.0", "-1.0", "nan", "inf", "0.001", "9223372036.0"],
                     "1 to 2,592,000 seconds"),
    "plan_price": (["-1.0", "nan", "inf"], "0 to 1,000,000.0 dollars per GPU-hour"),
}


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [(flag, value, expected) for flag, (values, expected) in OUT_OF_BOUNDS.items()
     for value in values],
    ids=lambda text: text[:20],
)
def test_a_number_out_of_bounds_is_named_with_what_would_be_right(
        flag, value, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving, one_line_errors():
        arguments = ["demo", f"--{flag}={value}", "--out_dir", str(tmp_path)]
        train(cli.parse(TrainConfig, PRESETS, arguments))
    assert leaving.value.code == 2
    assert capsys.readouterr().err == f"error: --{flag} {value}: expected {expected}\n"
    assert not [*tmp_path.iterdir()]


def test_every_number_of_a_run_has_bounds():
    """But the model's shape, whose bounds also hold for files of others: test_one_clear_line."""
    flags = [flag.split("=") for flag in cli.as_flags(asdict(TrainConfig()))]
    numbers = {name.removeprefix("--") for name, value in flags if is_number(value)}
    assert {name for name in numbers if not name.startswith("model.")} == OUT_OF_BOUNDS.keys()


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("settings", "line"), [
    (lambda: SampleConfig(max_tokens=-1), "--max_tokens -1: expected 0 to 1,000,000,000"),
    (lambda: SampleConfig(temperature=-1.0), "--temperature -1.0: expected 0 to 1,000,000.0"),
    (lambda: SampleConfig(temperature=math.nan), "--temperature nan: expected 0 to"),
    (lambda: SampleConfig(top_k=-1), "--top_k -1: expected 0 to 1,000,000,000"),
    (lambda: SampleConfig(top_p=0.0), "--top_p 0.0: expected 1e-09 to 1"),
    (lambda: SampleConfig(top_p=math.nan), "--top_p nan: expected 1e-09 to 1"),
    (lambda: SampleConfig(seed=2**63), "--seed 9223372036854775808: expected 0 to 9,223"),
    (lambda: sample.main(sample.Arguments(checkpoint="x", num=0)), "--num 0: expected 1 to"),
    (lambda: fineweb.make(FineWebConfig(Path("nowhere"), shard_tokens=0)),
     "--shard_tokens 0: expected 1 to 2,147,483,647"),
    (lambda: fineweb.make(FineWebConfig(Path("nowhere"), shard_tokens=2**31)),
     "--shard_tokens 2147483648: expected 1 to 2,147,483,647"),
    (lambda: fineweb.make(FineWebConfig(Path("nowhere"), workers=0)),
     "--workers 0: expected 1 to 1,024"),
    (lambda: fineweb.make(FineWebConfig(Path("nowhere"), workers=10**9)),
     "--workers 1000000000: expected 1 to 1,024"),
    (lambda: Needs(keep=0), "--keep 0: expected 1 to"),
    (lambda: Needs(checkpoint_bytes=-1), "--checkpoint_bytes -1: expected 0 to"),
    (lambda: Needs(head_width=0), "--head_width 0: expected 1 to"),
])
def test_numbers_of_other_commands_have_bounds_too(settings, line):
    with pytest.raises(BadInput) as caught:
        settings()
    assert str(caught.value).startswith(line)


def test_the_smallest_eps_keeps_rows_without_gradient_at_zero():
    """Padding rows have none. Two numbers: fp32's smallest eps is allowed, and 0 gives NaN."""
    after = []
    for eps in (1e-37, 0.0):
        row = torch.nn.Parameter(torch.zeros(1))
        row.grad = torch.zeros(1)
        torch.optim.AdamW([row], eps=eps, fused=True).step()
        after.append(row.item())
    assert after[0] == 0
    assert math.isnan(after[1])


def test_the_longest_patience_is_one_that_the_timers_hold(tiny):
    assert train(tiny(steps=1, hang_timeout=30 * 86_400.0)) == 0


ENVIRONMENTS = {
    "no RANK": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment without RANK"),
    "no WORLD_SIZE": ({"RANK": "1"}, "RANK=1 in the environment without WORLD_SIZE"),
    "too large": ({"RANK": "2", "WORLD_SIZE": "2"},
                  "RANK=2 with WORLD_SIZE=2 in the environment: expected 0 to WORLD_SIZE - 1"),
    "none": ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 with WORLD_SIZE=0 in the environment"),
    "no number": ({"RANK": "first", "WORLD_SIZE": "2"},
                  "RANK='first' in the environment: expected a number"),
    "negative": ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' in the environment"),
    "empty": ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment"),
    "nobody to meet": ({"RANK": "1", "WORLD_SIZE": "2"},
                       "WORLD_SIZE=2 in the environment without MASTER_ADDR"),
}


@pytest.mark.parametrize("start", [
    lambda: train(cli.parse(TrainConfig, PRESETS, ["demo"])),
    lambda: preflight.run(Needs()),
], ids=["run", "preflight"])
@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_an_environment_that_no_torchrun_made(case, start, monkeypatch, tmp_path, capsys):
    variables, line = ENVIRONMENTS[case]
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as leaving, one_line_errors():
        start()
    assert leaving.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line}")
    assert "unset RANK WORLD_SIZE" in printed
    assert printed.count("\n") == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("arguments", "steps", "warmup"), [
    (["gpt2-124m"], 18_865, 700),
    (["gpt2-124m", "--steps", "500"], 500, 19),  # 500 * 700 / 18,865 = 18.6
    (["gpt2-124m", "--steps=500"], 500, 19),
    (["demo", "--steps", "90"], 90, 12),  # 120 of 900
    (["--steps", "500"], 500, 19),
    (["gpt2-124m", "--steps", "500", "--optim.warmup_steps", "700"], 500, 700),
    (["gpt2-124m", "--steps", "500", "--optim.warmup-steps=30"], 500, 30),
])
def test_a_preset_s_warm_up_keeps_its_share_of_the_run(arguments, steps, warmup):
    config = cli.parse(TrainConfig, PRESETS, arguments)
    assert (config.steps, config.optim.warmup_steps) == (steps, warmup)


def test_a_run_s_own_file_keeps_its_warm_up(tmp_path):
    """What config.json says was resolved before; only flags beside it change it."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": asdict(PRESETS["demo"])}))
    assert cli.parse(TrainConfig, PRESETS, [str(path), "--steps", "90"]).optim.warmup_steps == 120


def test_a_warm_up_as_long_as_the_run_is_warned_of(capsys):
    arguments = ["demo", "--steps", "500", "--optim.warmup_steps"]
    cli.parse(TrainConfig, PRESETS, [*arguments, "499"])
    assert capsys.readouterr().out == ""
    cli.parse(TrainConfig, PRESETS, [*arguments, "700"])
    printed = capsys.readouterr().out
    assert printed.startswith("warning: --optim.warmup_steps 700 is no shorter than the run, "
                              "--steps 500:")
    assert printed.count("\n") == 1


def test_the_program_itself_leaves_with_2_and_without_a_traceback(tmp_path):
    done = run_program(["demo", "--batch_tokens", "1000", "--out_dir", str(tmp_path)])
    assert done.returncode == 2
    assert done.stderr.startswith("error: batch_tokens 1,000 is not divisible")
    assert done.stderr.count("\n") == 1


def test_a_full_gpu_is_one_line(capsys):
    with pytest.raises(SystemExit, match="1"), one_line_errors():
        raise torch.OutOfMemoryError("CUDA out of memory")
    line = "error: the GPU of rank 0 is full: halve --micro_batch (the result is the same)\n"
    assert capsys.readouterr().err == line
