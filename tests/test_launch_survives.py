"""Real faults in real processes: nothing is lost, nothing is changed.

    pytest tests/test_launch_survives.py              # 12 kills
    pytest -s tests/test_launch_survives.py -m storm  # 200 kills; prints what they hit
"""

import gc
import json
import os
import random
import signal
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train_gpt2
from launch import orphan
from launch.errors import FolderInUse
from launch.files import folder_lock
from launch.tracker import read_rows
from launch.world import World
from model import checkpoint
from tests.running import children, events, losses, run, same_weights, start, wait_for_ranks
from train_gpt2 import train

# ---- kills at random ----


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def last_step(folder: Path) -> int:
    rows = read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    return rows[-1]["step"] if rows else 0


def storm(config, kills: int, seed: int, tmp_path: Path, **more: str) -> dict[str, int]:
    """Kills a rank, the launcher or both, at random instants, until `kills` have hit; then lets
    the run finish. Returns what happened."""
    chance, folder = random.Random(seed), tmp_path / config.name
    told = {"rank": 0, "launcher": 0, "both": 0, "starts": 0, "steps lost": 0}
    hits = 0
    while True:
        process = start(config, ranks=2, restarts=100, **more)
        told["starts"] += 1
        while hits < kills and process.poll() is None:
            # One in four while it starts; else a few steps on, in the middle of a step or a save.
            if chance.random() < 0.25:
                time.sleep(chance.random() * 4)
            else:
                goal = last_step(folder) + chance.randint(1, 4)
                while process.poll() is None and last_step(folder) < min(goal, config.steps - 1):
                    time.sleep(0.02)
                time.sleep(chance.random() * 0.3)
            ranks = children(process.pid)
            if process.poll() is not None or len(ranks) < 2:
                continue
            before, what = last_step(folder), chance.choice(["rank", "rank", "launcher", "both"])
            if what != "rank":
                kill(process.pid)
            if what != "launcher":
                kill(chance.choice(ranks))
            hits, told[what] = hits + 1, told[what] + 1
            newest = checkpoint.list_checkpoints(folder / "checkpoints")
            if what != "launcher" and newest:  # orphans save before they leave
                told["steps lost"] += max(before - int(newest[0].name[5:]), 0)
            if what != "rank":
                break
        code, printed = wait_for_ranks(process, timeout=120, ranks=ranks)
        if code == 0:
            assert "is damaged" not in printed
            return told
        assert told["starts"] < 3 * kills + 5, printed[-3000:]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus_file):
    """40 steps on 2 ranks, never disturbed."""
    from tests.conftest import make_config

    def configure(folder, **changes):
        settings = dict(steps=40, save_every=3, eval_every=20, hang_timeout=60.0)
        return make_config(folder, corpus_file, **(settings | changes))

    folder = tmp_path_factory.mktemp("undisturbed")
    code, printed = run(configure(folder), ranks=2)
    assert code == 0, printed[-3000:]
    return configure, folder / "tiny"


def test_kills_at_random_change_nothing(undisturbed, tmp_path):
    configure, whole = undisturbed
    told = storm(configure(tmp_path), kills=12, seed=1, tmp_path=tmp_path)
    assert told["rank"] + told["launcher"] + told["both"] == 12
    assert same_weights(whole, tmp_path / "tiny", 40)
    assert losses(whole) == losses(tmp_path / "tiny")


@pytest.mark.storm
@pytest.mark.parametrize(("mode", "kills", "seed"), [("ddp", 65, 2), ("zero1", 45, 3),
                                                     ("fsdp", 45, 4)])
def test_a_storm_of_kills_changes_nothing(undisturbed, tmp_path, mode, kills, seed):
    configure, _ = undisturbed
    whole = tmp_path / "whole"
    code, printed = run(configure(tmp_path, name="whole", steps=160, parallel=mode), ranks=2)
    assert code == 0, printed[-3000:]
    told = storm(configure(tmp_path, steps=160, parallel=mode), kills, seed, tmp_path)
    print(mode, told)
    assert same_weights(whole, tmp_path / "tiny", 160)
    assert losses(whole) == losses(tmp_path / "tiny")


@pytest.mark.storm
def test_a_storm_among_rollbacks_changes_nothing(undisturbed, tmp_path):
    """Every eighth batch is poison, and every step is saved: orphans save where they are, and a
    rollback goes to the newest checkpoint, which is the one before the poison in either run."""
    configure, _ = undisturbed
    settings = dict(steps=100, save_every=1, on_spike="rollback", max_spikes=100)
    poison = json.dumps({"kind": "poison", "batches": list(range(7, 400, 8))})
    whole = configure(tmp_path, name="whole", **settings)
    code, printed = run(whole, ranks=2, FAULT=poison)
    assert code == 0, printed[-3000:]
    assert printed.count("rolled back to step") > 10
    told = storm(configure(tmp_path, **settings), 45, 5, tmp_path, FAULT=poison)
    print("rollback", told)
    assert same_weights(tmp_path / "whole", tmp_path / "tiny", 100)
    assert losses(tmp_path / "whole") == losses(tmp_path / "tiny")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_starts_leaves_when_its_launcher_and_its_peer_die(tiny, tmp_path, rank):
    """It would wait for its peer for half an hour: launch/orphan.py."""
    process = start(tiny(), ranks=2)
    while len(ranks := children(process.pid)) < 2:
        assert process.poll() is None
    kill(process.pid)
    kill(ranks[rank])
    wait_for_ranks(process, timeout=60, ranks=ranks)  # its output ends when the last one is gone
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("first_process", "adopts"),
    [("/usr/lib/systemd/systemd", True), ("/usr/bin/python3.13", False),
     (PermissionError(), True), (FileNotFoundError(), False)],
)
def test_the_first_process_of_a_machine_started_a_rank_only_as_torchrun(
    monkeypatch, first_process, adopts
):
    def exe(self):
        if isinstance(first_process, OSError):
            raise first_process
        return Path(first_process)

    monkeypatch.setattr(Path, "readlink", exe)
    assert orphan.is_init(1) is adopts
    assert not orphan.is_init(2)


def test_a_group_that_was_left_is_not_taken_down():
    """Its destructor can wait for ever: launch/world.py, LEFT."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = weakref.ref(dist.group.WORLD)
    World(0, 2, torch.device("cpu")).destroy()
    gc.collect()
    assert not dist.is_initialized()
    assert group() is not None


# ---- signals ----


@pytest.mark.parametrize(
    ("moment", "call", "step"),
    [("validation", 1, 0), ("validation", 3, 3), ("sample", 2, 3), ("save", 2, 4)],
)
def test_a_signal_at_any_moment_saves_and_goes_on(tiny, tmp_path, monkeypatch, moment, call, step):
    """A validation takes two batches; the signal comes in the given call of what is going on."""
    from eval import evaluator, loss
    from model.saving import Saver

    train(tiny(name="whole"))
    place, name = {"validation": (loss, "validation_batch"), "sample": (evaluator, "generate"),
                   "save": (Saver, "_copy")}[moment]
    original, calls = getattr(place, name), []

    def signalled(*rest, **more):
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return original(*rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, signalled)
        assert train(tiny()) == 0
    stopped = (tmp_path / "tiny" / "STOPPED").read_text()
    assert stopped == f"stopped by SIGTERM at step {step}\n"
    assert train(tiny()) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "tiny", 6)
    val = [[r["val_loss"] for r in read_rows(tmp_path / run / "metrics.jsonl") if "val_loss" in r]
           for run in ("whole", "tiny")]
    assert val[0] == val[1]


def test_a_signal_in_the_last_evaluation_leaves_it_to_the_next_start(tiny, tmp_path, monkeypatch):
    from eval import loss

    original, calls = loss.validation_batch, []

    def signalled(*rest):
        calls.append(1)
        if len(calls) == 3:  # two batches at step 0
            signal.raise_signal(signal.SIGTERM)
        return original(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(loss, "validation_batch", signalled)
        assert train(tiny(steps=2, eval_every=2)) == 0
    assert (tmp_path / "tiny" / "STOPPED").exists()
    assert train(tiny(steps=2, eval_every=2)) == 0
    rows = read_rows(tmp_path / "tiny" / "metrics.jsonl")
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 2]


def test_a_rank_that_hangs_is_named_and_the_group_starts_again(undisturbed, tmp_path):
    configure, whole = undisturbed
    fault = json.dumps({"kind": "stop", "rank": 1, "step": 8})
    code, printed = run(configure(tmp_path, hang_timeout=4.0), ranks=2, restarts=1, FAULT=fault)
    assert code == 0, printed[-3000:]
    assert "no step was finished in 4 s" in printed
    assert "rank 1: no answer" in printed
    assert "stuck: rank 1" in printed
    assert same_weights(whole, tmp_path / "tiny", 40)


# ---- the disk ----


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fills_during_a_save_loses_that_checkpoint_only(undisturbed, tmp_path, rank):
    """Rank 0 fails when it makes the files, rank 1 in its thread, when it writes its rows."""
    configure, whole = undisturbed
    fault = json.dumps({"kind": "full", "rank": rank, "step": 6})  # that after step 6 is too large
    code, printed = run(configure(tmp_path, keep=50), ranks=2, FAULT=fault)
    assert code == 0, printed[-3000:]
    assert "File too large" in printed
    names = {path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir()}
    assert "step_00000006" not in names
    assert {"step_00000003", "step_00000009"} <= names
    (event,) = [e for e in events(tmp_path / "tiny") if "checkpoint failed" in e]
    assert ("rank 1: " in event) == (rank == 1)
    assert same_weights(whole, tmp_path / "tiny", 40)


def test_a_half_deleted_checkpoint_is_passed_over_by_the_run(tiny, tmp_path, capsys):
    train(tiny(name="whole"))
    train(tiny())
    last = tmp_path / "tiny" / "checkpoints" / "step_00000006"
    (last / "optimizer.safetensors").unlink()
    assert train(tiny()) == 0
    printed = capsys.readouterr().out
    assert "step_00000006 is damaged: optimizer.safetensors is missing; going back to" in printed
    assert same_weights(tmp_path / "whole", tmp_path / "tiny", 6)


def test_a_second_job_in_the_folder_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "folder_lock", partial(folder_lock, wait=0.0))
    with folder_lock(tmp_path / "tiny"), pytest.raises(FolderInUse, match="is in use by process"):
        train(tiny())
