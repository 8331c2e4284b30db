"""Bad input gets one clear line and exit code 2, before any work starts; nothing is lost."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train_gpt2
from data.loader import DataConfig
from data.shards import write_folder
from data.tokenizer import encode_documents
from launch import cli
from launch.errors import BadInput, Failed, one_line_errors
from launch.tracker import read_rows
from model import checkpoint, saving
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
        (["demo", "--steps", "0"], "--steps 0: expected at least 1"),
        (["demo", "--batch_tokens", "1000"], "the nearest that is: 896 or 1,024"),
        (["demo", "--data.text", "/nowhere.txt"], "can't read the text"),
        (["demo", "--name", "a/b"], "no folder name"),
        (["demo", "--seed", "-1"], "--seed -1"),
        (["demo", "--prompt", "a " * 200], "the model's context 128"),
        (["demo", "--model.n_head", "3"], "not divisible by n_head 3"),
        (["gpt2-124m", "--data.dir", "/nowhere"], "python -m data.fineweb"),
        (["demo", "--init", "/nowhere"], "is no checkpoint"),
        (["demo", "--resume", "/nowhere"], "is no checkpoint"),
        (["demo", "--model.n_vocab", "100"], "--model.n_vocab is 50257"),
        (["demo", "--profile", "-1"], "profile -1: expected at least 0"),
        (["gpt2-124m", "--plan", "8xh100", "--steps", "-5"], "--steps -5: expected at least 1"),
        (["gpt2-124m", "--plan", "8xh100", "--micro_batch", "0"], "--micro_batch 0: expected at"),
        (["demo", "--optim.clip", "-1"], "clip -1.0 is negative"),
        (["demo", "--optim.lr", "nan"], "lr nan is negative or no number"),
        (["demo", "--optim.beta1", "1.5"], "beta1 1.5"),
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
    "change", [{"seed": 1}, {"batch_tokens": 24 * 16}, {"steps": 9}, {"dtype": "fp64"}], ids=str
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
    monkeypatch.setattr(train_gpt2, "finish", lambda run, step: 0)
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
    with pytest.raises(BadInput, match="n_layer=2.*asks for.*n_layer=1"):
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
