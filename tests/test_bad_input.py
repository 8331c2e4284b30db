"""Bad input gets one clear line and exit code 2, before any work starts; nothing is lost."""

import json
import lzma
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_gpt2
from data import fineweb
from data.corpus import read_text
from data.dataset import DataConfig
from data.fineweb import FineWebConfig
from data.shards import read_manifest, write_folder
from data.tokenizer import encode_documents
from eval import sample, tasks
from eval.choice import read_rows as read_questions
from launch import cli, preflight
from launch.errors import BadInput, Failed, one_line_errors
from launch.preflight import Needs
from launch.tracker import read_rows
from model import checkpoint, saving
from model.checkpoint import read_config
from model.formats import hf
from model.generate import SampleConfig
from model.gpt2 import GPTConfig
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


@pytest.mark.parametrize("prompt", ["-x", "--steps 3", "- a list\n- of two", "=", "", " ", "'\""])
def test_any_prompt_comes_back_from_a_config_file(prompt, tiny, tmp_path):
    config = tiny(prompt=prompt)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": asdict(config)}))
    assert cli.parse(TrainConfig, PRESETS, [str(path)]) == config


def test_a_config_file_may_begin_with_a_byte_order_mark(tiny, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(asdict(tiny()), indent=1), encoding="utf-8-sig", newline="\r\n")
    assert cli.parse(TrainConfig, PRESETS, [str(path)]) == tiny()


@pytest.mark.parametrize("group", ["exam", "evaluation"])
def test_a_config_file_of_before_its_group_was_renamed_is_read(group, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": {group: {"eval_every": 7}}}))
    assert cli.parse(TrainConfig, PRESETS, [str(path), "--eval_every", "7"]) == cli.parse(
        TrainConfig, PRESETS, [str(path)])


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is no JSON"), (b"{'steps': 1}", "is no JSON"), (b"\xff\xfe\x00", "is no JSON"),
    (b"[1]", "expected an object of settings"), (b"[" * 100_000, "brackets in brackets"),
    (b'{"name": "a\\u0000b"}', "holds a zero character"),
], ids=["empty", "quotes", "bytes", "list", "deep", "zero"])
def test_a_config_file_that_is_none(content, words, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadInput, match=words):
        cli.parse(TrainConfig, PRESETS, [str(tmp_path / "config.json")])


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


def test_a_wrong_key_in_a_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": {"optim": {"rl": 1}}}))
    done = run_program([str(path)])
    assert done.returncode == 2
    assert "--optim.rl" in done.stderr
    assert "--optim.lr" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b" \n ", "is empty"), (b"\xff\xfe\x00abc", "no UTF-8 text: byte 0xff"),
     (b"text \x00 text", "is binary"), (b"x", "too short to hold out")],
)
def test_a_text_that_is_none(tiny, tmp_path, content, words):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(BadInput, match=words):
        train(tiny(data=DataConfig(text=str(tmp_path / "bad.txt"))))


@pytest.fixture
def shards(tmp_path, corpus_file):
    tokens = encode_documents([corpus_file.read_text()])
    folder = tmp_path / "shards"
    write_folder(folder, "toy", [tokens[1000:3000], tokens[3000:]], tokens[:1000], "toy")
    return folder


def test_shards_are_trained_on(tiny, tmp_path, shards):
    assert train(tiny(data=DataConfig(dir=str(shards)))) == 0
    rows = read_rows(tmp_path / "tiny" / "metrics.jsonl")
    assert rows[0]["val_set"] == "toy, 320 tokens"


def test_a_damaged_validation_shard_stops_the_run_before_it_starts(tiny, tmp_path, shards):
    path = shards / "toy_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x00\x00")
    with pytest.raises(BadInput, match="sha256 differs"):
        train(tiny(data=DataConfig(dir=str(shards))))
    assert not (tmp_path / "tiny").exists()


def test_a_damaged_train_shard_stops_the_run_after_a_save(tiny, tmp_path, shards):
    path = shards / "toy_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x00\x00")
    # Whichever shard comes first: the run ends where the damaged one would be read.
    config = tiny(data=DataConfig(dir=str(shards)), steps=40, eval_every=100, save_every=100,
                  optim=replace(tiny().optim, warmup_steps=1))
    with pytest.raises(BadInput, match=r"toy_train_000002\.bin is not the file"):
        train(config)
    done = len([r for r in read_rows(tmp_path / "tiny" / "metrics.jsonl") if "train_loss" in r])
    newest = checkpoint.newest_valid(tmp_path / "tiny" / "checkpoints")[0]
    assert newest.name == f"step_{done:08d}"


def test_a_validation_set_shorter_than_a_sequence(tiny):
    with pytest.raises(BadInput, match="shorter than one sequence"):
        train(tiny(val_tokens=10))


def test_resuming_with_another_shape_lists_what_differs(tiny):
    train(tiny(steps=1))
    other = GPTConfig(n_layer=3, n_head=2, n_embd=32, n_ctx=16)
    with pytest.raises(BadInput, match="model.n_layer 2 there, 3 asked; steps 1 there, 6 asked"):
        train(tiny(model=other))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch_tokens": 24 * 16}, {"steps": 9, "seed": 1}, {"dtype": "fp64"}],
    ids=str,
)
def test_resuming_another_run_is_refused(tiny, change):
    train(tiny(steps=2))
    with pytest.raises(BadInput, match="belongs to another run"):
        train(tiny(**({"steps": 2} | change)))


def test_resuming_on_other_data_is_refused(tiny, tmp_path):
    train(tiny(steps=2))
    (tmp_path / "other.txt").write_text("another text altogether\n" * 500)
    with pytest.raises(BadInput, match="training data"):
        train(tiny(steps=2, data=DataConfig(text=str(tmp_path / "other.txt"))))


def test_resuming_with_sequences_cut_otherwise_is_refused(tiny, corpus_file):
    train(tiny(steps=2))
    with pytest.raises(BadInput, match="training data .* there, .*, cut at documents asked"):
        train(tiny(steps=2, data=DataConfig(text=str(corpus_file), align="documents")))


def test_what_may_change_on_resume_may(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "finish", lambda run, step, last_step: 0)
    whole = tiny(name="whole")
    train(whole)
    train(tiny())
    checkpoint.remove(tmp_path / "tiny" / "checkpoints" / "step_00000006")
    assert train(tiny(micro_batch=5, eval_every=2, save_every=2, keep=5, val_tokens=160)) == 0


def test_resume_never_refuses_a_used_folder(tiny):
    train(tiny(steps=1))
    with pytest.raises(BadInput, match="--resume never"):
        train(tiny(steps=1, resume="never"))


def test_going_back_past_a_later_checkpoint_needs_another_name(tiny, tmp_path):
    train(tiny())
    early = str(tmp_path / "tiny" / "checkpoints" / "step_00000003")
    with pytest.raises(BadInput, match="choose another --name"):
        train(tiny(resume=early))
    assert train(tiny(resume=early, name="branch")) == 0
    with pytest.raises(SystemExit):  # the same command again: finished, and not a conflict
        train(tiny(resume=early, name="branch"))


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tiny, tmp_path):
    wild = replace(tiny().optim, lr=1e18, warmup_steps=0)
    with pytest.raises(Failed, match="the loss is nan"):
        train(tiny(optim=wild, steps=20, save_every=1, eval_every=100))
    saved = load_file(
        checkpoint.newest_valid(tmp_path / "tiny" / "checkpoints")[0] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert "NaN" not in (tmp_path / "tiny" / "metrics.jsonl").read_text()


def test_init_of_another_shape_is_refused(tiny, tmp_path):
    train(tiny(steps=1))
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=16)
    with pytest.raises(BadInput, match=r"another shape than this run's: add --model.n_layer 2$"):
        train(tiny(name="other", model=shape, init=str(tmp_path / "tiny")))


def test_a_disk_that_fills_in_mid_run_is_reported_and_training_goes_on(tiny, tmp_path, monkeypatch,
                                                                      capsys):
    original, calls = saving.write_manifest, []

    def full_once(folder, progress):
        calls.append(folder)
        if len(calls) == 2:  # step 3; step 0 was saved
            raise OSError(28, "No space left on device")
        original(folder, progress)

    monkeypatch.setattr(saving, "write_manifest", full_once)
    assert train(tiny()) == 0
    printed = capsys.readouterr().out
    assert "No space left on device; training goes on" in " ".join(printed.split())
    names = sorted(p.name for p in (tmp_path / "tiny" / "checkpoints").iterdir())
    assert names == ["step_00000000", "step_00000006"]
    events = [r["event"] for r in read_rows(tmp_path / "tiny" / "metrics.jsonl") if "event" in r]
    assert "checkpoint failed" in events[0]


def test_a_disk_that_is_full_at_the_start_stops_the_run(tiny, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_manifest", full)
    with pytest.raises(Failed, match="No space left"):
        train(tiny())
    assert Failed("").exit_code == 1


HF_CONFIG = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 50257}
ROW = {"step": 1, "tokens": 8, "val_loss": 3.0}
MARKED = {  # what people write or edit by hand: file, content, what reads it
    "prompts": ("a.txt", "Once upon a time\nThe cat\n", sample.read_prompts),
    "text to judge": ("a.txt", "Once upon a time", tasks.read_text),
    "text to train on": ("a.txt", "Once upon a time", read_text),
    "questions": ("a.jsonl", '{"ctx": 1}\n{"ctx": 2}\n', lambda path: read_questions(path, dict)),
    "shards": ("manifest.json", '{"shards": []}', lambda path: read_manifest(path.parent)),
    "checkpoint": ("config.json", '{"config": {}}', lambda path: read_config(path.parent)),
    "of HF": ("config.json", json.dumps(HF_CONFIG), lambda path: hf.read_config(path.parent)),
    "metrics": ("metrics.jsonl", json.dumps(ROW) + "\n", read_rows),
}


@pytest.mark.parametrize("case", MARKED)
def test_a_byte_order_mark_changes_nothing(case, tmp_path):
    """Notepad and PowerShell write one before UTF-8."""
    name, content, read = MARKED[case]
    results = []
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_text(content, encoding=encoding)
        results.append(read(tmp_path / name))
    assert results[0]
    assert results[0] == results[1]


def test_compressed_questions_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b'\xef\xbb\xbf{"ctx": 1}\n'))
    assert read_questions(tmp_path / "a.jsonl.xz", dict) == [{"ctx": 1}]
