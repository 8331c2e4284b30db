"""What takes more than five seconds says how far it is; what is quicker says nothing."""

import io
import os
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from data.shard_file import Shard, open_shard
from data.stream import Stream
from eval.likelihood import Request, negative_loglikelihoods
from eval.loss import validation_loss
from launch import files, progress
from launch.progress import Bar, track
from launch.tracker import Tracker
from launch.world import World
from model import checkpoint, convert
from model.gpt2 import GPT, GPTConfig
from model.safetensors_layout import save_tensors
from train_gpt2 import train

WORLD = World(0, 1, torch.device("cpu"))


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that tqdm reads, and that tests set."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def said(monkeypatch, clock, terminal: bool, seconds: list[float], **options) -> str:
    """What stands on standard error after items that took so many seconds each."""
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    with Bar(desc="validation", total=len(seconds), **options) as bar:
        for one in seconds:
            clock[0] += one
            bar.update()
    return screen.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_what_takes_less_than_five_seconds_says_nothing(monkeypatch, clock, terminal):
    assert said(monkeypatch, clock, terminal, [1.2] * 4) == ""


def test_a_log_gets_a_line_after_five_seconds_and_then_every_half_minute(monkeypatch, clock):
    """Seconds 6 and 36 of 60, in steps of two."""
    lines = said(monkeypatch, clock, False, [2.0] * 30).splitlines()
    assert lines == [
        "validation: 10 %, 3 of 30 after 00:06, 00:54 to go",
        "validation: 60 %, 18 of 30 after 00:36, 00:24 to go",
    ]


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch, clock):
    shown = said(monkeypatch, clock, True, [2.0] * 4)
    assert "validation:  75%|" in shown
    assert "\n" not in shown
    assert shown.endswith("\r") and shown.rstrip("\r").endswith(" ")  # blanks over the bar


def test_other_ranks_say_nothing(monkeypatch, clock):
    monkeypatch.setenv("RANK", "1")
    assert said(monkeypatch, clock, False, [2.0] * 30) == ""


def test_bytes_are_counted_in_a_unit_that_can_be_read(monkeypatch, clock):
    screen = Screen(terminal=False)
    monkeypatch.setattr(sys, "stderr", screen)
    with Bar(desc="hashing", total=3_000_000_000, unit="B") as bar:
        clock[0] += 6
        bar.update(1_500_000_000)
    assert screen.getvalue().startswith("hashing: 50 %, 1.50G of 3.00G after 00:06, ")


def test_a_reader_that_has_gone_stops_nothing(monkeypatch, clock):
    class Gone(Screen):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone(terminal=False))
    items = []
    for item in track([1, 2, 3], "work"):
        clock[0] += 10
        items.append(item)
    assert items == [1, 2, 3]


# ---- who says it ----

def tiny_model() -> GPT:
    return GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, n_ctx=16))


def judge(tmp_path):
    requests = [Request([i], [[i + 1, i + 2]]) for i in range(4)]
    negative_loglikelihoods(tiny_model(), requests, WORLD)


def validate(tmp_path):
    tokens = np.zeros(1000, np.uint16)
    shard = Shard(tmp_path / "a.bin", tokens)
    validation_loss(tiny_model(), Stream([shard]), 8, 2, WORLD)


def hash_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100)
    files.hashed(tmp_path / "file")


def check_a_shard(tmp_path):
    np.zeros(100, np.uint16).tofile(tmp_path / "train.bin")
    open_shard(tmp_path / "train.bin").check()


def convert_and_load(to):
    def work(tmp_path):
        convert.write_whole(tmp_path / "out", {
            "ours": lambda path: convert.write_ours(tiny_model(), path),
            "hf": lambda path: convert.write_hf(tiny_model(), path),
            "llmc": lambda path: convert.to_llmc(tiny_model(), path, "fp32"),
        }[to])
        if to == "llmc":
            convert.read_source(str(tmp_path / "out"))
        else:
            checkpoint.load_model("hf:" * (to == "hf") + str(tmp_path / "out"))

    return work


@pytest.mark.parametrize(("work", "said"), [
    (judge, ["scoring"]),
    (validate, ["validation"]),
    (hash_a_file, ["hashing file"]),
    (check_a_shard, ["checking the tokens of train.bin"]),
    (convert_and_load("ours"), ["writing model.safetensors", "checking", "loading"]),
    (convert_and_load("hf"), ["writing model.safetensors", "reading model.safetensors", "loading"]),
    (convert_and_load("llmc"), ["writing .out.tmp", "reading out", "loading"]),
], ids=["scoring", "validation", "hashing", "shard", "ours", "hf", "llmc"])
def test_each_of_these_says_how_far_it_is(work, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SILENT", 0.0)
    work(tmp_path)
    printed = capsys.readouterr().err
    for what in said:
        assert f"{what}" in printed
        assert "to go" in printed


def test_a_run_says_it_too_and_prints_no_line_of_it_where_it_is_quick(tiny, capsys):
    train(tiny(steps=1))
    assert "to go" not in capsys.readouterr().err


def test_bars_start_no_thread(monkeypatch):
    """A thread of tqdm's own would outlive every bar, and could wake up in the middle of a fork."""
    monkeypatch.setattr(tqdm, "monitor", None)  # other libraries' bars may have started one
    with Bar(total=1):
        assert tqdm.monitor is None
        assert Bar.monitor is None


# ---- the time that is left ----

def test_the_eta_counts_the_evaluations_to_come(tmp_path):
    description = {
        "config": {"steps": 100, "batch_tokens": 8, "evaluation": {"eval_every": 25},
                   "tracker": {"wandb": "disabled", "tensorboard": False, "profile": 0}},
        "resolved": {"dtype": "fp32", "flops_per_token": 1, "val_set": "x"},
    }
    tracker = Tracker(tmp_path, WORLD, description)
    tracker.smooth_seconds, tracker.evaluation_seconds = 2.0, 60.0
    assert tracker.seconds_left(26) == 74 * 2 + 3 * 60  # after 50, 75 and 100
    assert tracker.seconds_left(25) == 75 * 2 + 4 * 60  # and the one that is about to begin
    assert tracker.seconds_left(99) == 1 * 2 + 1 * 60
    assert tracker.seconds_left(100) == 60
    tracker.close()


def test_an_evaluation_is_timed(tiny, monkeypatch):
    seen = []
    original = Tracker.log_step

    def log_step(self, *args, **kwargs):
        seen.append(self.evaluation_seconds)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Tracker, "log_step", log_step)
    train(tiny(steps=1))
    assert seen[0] > 0


# ---- the files that are written on the way ----

@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_exported_file_may_be_read_by_whom_the_umask_says(umask, tmp_path):
    before = os.umask(umask)
    try:
        convert.write_whole(tmp_path / "hf", lambda path: convert.write_hf(tiny_model(), path))
        convert.write_whole(tmp_path / "ours", lambda path: convert.write_ours(tiny_model(), path))
        files.atomic_write(tmp_path / "plain", "text")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777
             for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) > 6
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_a_run_s_files_have_the_mode_of_the_umask_too(tiny, tmp_path):
    before = os.umask(0o022)
    try:
        train(tiny(steps=1))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777
             for path in tmp_path.rglob("*") if path.is_file() and path.name != "corpus.txt"}
    assert modes["model.safetensors"] == 0o644
    assert set(modes.values()) == {0o644}, modes


def test_what_is_saved_is_what_safetensors_reads(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4.0).half(), "c": torch.randn(2, 3).t(),
               "d": torch.tensor(1.5, dtype=torch.bfloat16), "e": torch.empty(0, 3)}
    save_tensors(tensors, tmp_path / "file", {"format": "pt", "source": "here"})
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt", "source": "here"}
