"""Saving loses nothing: killed anywhere, on a full disk, with a rank that fails."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.errors import Failed
from launch.world import World
from model import checkpoint, saving
from model.parallel import rows_of
from model.saving import Saver
from tests.running import Silent
from tests.saved import names, progress, save, trained, truncate


def test_old_ones_are_pruned_and_nothing_else_is_visible(run):
    save(run, 3, trained(), keep=2)
    assert names(run) == ["step_00000002", "step_00000003"]


def test_a_damaged_checkpoint_is_replaced_by_the_next_save(run):
    truncate(run / "checkpoints" / "step_00000002")
    save(run, 2, trained(2), keep=3)
    assert checkpoint.find_damage(run / "checkpoints" / "step_00000002") == ""


def test_a_full_disk_leaves_the_checkpoint_before(run, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.os, "pwrite", full)
    with pytest.raises(Failed, match="No space left"):
        save(run, 3, trained(), keep=1)
    assert names(run) == ["step_00000001", "step_00000002"]
    assert checkpoint.newest_valid(run / "checkpoints")[0].name == "step_00000002"


def test_a_rank_that_does_not_see_the_folder_is_told_so(run):
    saver = Saver(run, trained(), Silent(), keep=3)
    with pytest.raises(Failed, match="on a file system that all ranks share"):
        saver._open(run / "checkpoints" / ".step_00000009.tmp")


def test_pruning_spares_what_was_just_written(run):
    """The run went back from a damaged step 2 to step 1, and stops there once more."""
    truncate(run / "checkpoints" / "step_00000002")
    save(run, 1, trained(1), keep=1)
    assert checkpoint.newest_valid(run / "checkpoints")[0].name == "step_00000001"


# ---- broken weights, and what bad steps followed ----


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_broken_weights_are_never_sealed(run, value, capsys):
    state = trained()
    with torch.no_grad():
        state.model.module.h[0].mlp.c_fc.weight[3, 5] = value
    with pytest.raises(Failed, match=r"step_00000003: h.0.mlp.c_fc.weight holds .* no numbers"):
        save(run, 3, state, keep=1)
    saver = Saver(run, state, Silent(), keep=1, newest_step=2)
    saver.save(3, progress(3), wait=False)
    saver.wait()
    saver.report_finished(4)
    assert "h.0.mlp.c_fc.weight holds" in capsys.readouterr().out
    assert saver.newest_step == 2
    assert names(run) == ["step_00000001", "step_00000002"]


def test_moments_may_be_infinite(run):
    state = trained()
    state.optimizer.state[state.model.shards[0].optim_param]["exp_avg_sq"][0, 0] = float("inf")
    save(run, 3, state)
    assert checkpoint.find(str(run)).name == "step_00000003"


def test_doubtful_checkpoints_push_out_no_good_one(run):
    checkpoint.mark_doubtful(run, 2, "step 3: the loss is nan")
    save(run, 3, trained(), keep=2)
    assert names(run) == ["step_00000001", "step_00000002", "step_00000003"]
    save(run, 4, trained(), keep=2)
    assert names(run) == ["step_00000003", "step_00000004"]


# ---- failed until proved good ----


def fail(error: BaseException):
    def call(*_, **__):
        raise error

    return call


@pytest.mark.parametrize("place", ["_write_rows", "_finish"])
def test_a_failed_save_is_written_again_at_the_same_step(run, monkeypatch, capsys, place):
    saver = Saver(run, trained(), Silent(), keep=3, newest_step=2)
    with monkeypatch.context() as patch:
        patch.setattr(saver, place, fail(MemoryError()))
        saver.save(3, progress(3), wait=False)
        saver._thread.join()
    assert saver.newest_step == 2
    saver.save(3, progress(3), wait=True)  # the run is stopped here
    assert saver.newest_step == 3
    assert checkpoint.find(str(run)).name == "step_00000003"
    printed = capsys.readouterr().out
    assert "MemoryError(); training goes on" in printed
    assert printed.count("saved") == 1


@pytest.mark.parametrize("place", ["_copy", "_write_rows", "_others_notes", "_finish"])
def test_a_full_memory_in_the_last_save_is_a_failure(run, monkeypatch, place):
    saver = Saver(run, trained(), Silent(), keep=3)
    monkeypatch.setattr(saver, place, fail(Failed("") if place == "_copy" else MemoryError()))
    with pytest.raises(Failed, match="could not save .*step_00000003"):
        saver.save(3, progress(3), wait=True)
    assert names(run) == ["step_00000001", "step_00000002"]


def test_a_copy_that_finds_no_memory_is_a_failure(run, monkeypatch):
    saver = Saver(run, trained(), Silent(), keep=3)
    monkeypatch.setattr(torch, "empty_like", fail(RuntimeError("DefaultCPUAllocator: full")))
    with pytest.raises(Failed, match="no copy in memory could be made: DefaultCPUAllocator"):
        saver.save(3, progress(3), wait=True)


def test_a_thread_that_can_not_start_is_a_failure(run, monkeypatch):
    saver = Saver(run, trained(), Silent(), keep=3)
    monkeypatch.setattr(threading.Thread, "start", fail(RuntimeError("can't start new thread")))
    with pytest.raises(Failed, match="can't start new thread"):
        saver.save(3, progress(3), wait=True)


def test_a_save_that_makes_progress_is_life(run, monkeypatch):
    """The disk takes the next bytes only after a heartbeat for those before."""
    beat, pwrite, told = threading.Event(), os.pwrite, [0]

    def slow(*arguments):
        while told[-1] < saver._bytes:
            assert beat.wait(timeout=20), "no heartbeat"
            beat.clear()
        return pwrite(*arguments)

    def heartbeat():
        told.append(saver._bytes)
        beat.set()

    monkeypatch.setattr(saving, "WRITE_CHUNK", 1 << 20)
    saver = Saver(run, trained(), Silent(), keep=3, heartbeat=heartbeat)
    monkeypatch.setattr(saving.os, "pwrite", slow)
    saver.save(3, progress(3), wait=True)
    files = (run / "checkpoints" / "step_00000003").glob("*.safetensors")
    assert len(told) > sum(path.stat().st_size for path in files) // (1 << 20)
    assert saver.newest_step == 3


def test_a_save_that_stands_still_gives_no_sign_of_life(run, monkeypatch):
    beats, looks = [], []
    saver = Saver(run, trained(), Silent(), keep=3, heartbeat=lambda: beats.append(1))
    go_on = threading.Event()
    monkeypatch.setattr(saver, "_write_rows", lambda *_: go_on.wait(timeout=20))
    writing = saver._writing

    def look():
        looks.append(writing())
        if len(looks) == 5:
            assert beats == []
            go_on.set()
        return looks[-1]

    monkeypatch.setattr(saver, "_writing", look)
    saver.save(3, progress(3), wait=True)
    assert len(looks) > 5


def test_leaving_waits_for_the_last_save(run):
    saver = Saver(run, trained(), Silent(), keep=3)
    saver.save(3, progress(3), wait=False)
    saver.close()
    assert checkpoint.find(str(run)).name == "step_00000003"


# ---- two ranks ----


class Thread(World):
    """A rank that is a thread of this process; `peers` is what both of them share."""

    def __init__(self, rank, peers):
        super().__init__(rank, 2, torch.device("cpu"))
        object.__setattr__(self, "peers", peers)

    def exchange(self, value):
        values, barrier = self.peers
        values[self.rank] = value
        barrier.wait(timeout=60)
        both = list(values)
        barrier.wait(timeout=60)
        return both

    def all_reduce_sum(self, *values):
        one, two = self.exchange(values)
        return [a + b for a, b in zip(one, two, strict=True)]

    def raise_on_all_ranks(self, error):
        one, two = self.exchange(error)
        if one or two:
            raise one or type(two)(f"rank 1: {two}")

    def broadcast_from_rank0(self, function, *arguments):
        result = None
        with self.fail_together():
            if self.is_rank0:
                result = function(*arguments)
        return self.exchange(result)[0]


class Noting(Silent):
    def __init__(self, world):
        self.world, self.events = world, []

    def log(self, step, **values):
        self.events.append(values["event"])


def on_two_ranks(run, work):
    """work(saver) on two ranks, each of which saves its half of the rows; its results."""
    peers, results = ([None, None], threading.Barrier(2)), [None, None]

    def rank(number):
        try:
            results[number] = work(savers[number])
        except BaseException as error:
            results[number] = error

    savers = []
    for number in (0, 1):
        state = trained(3)
        state.model.shards = [replace(shard, save_rows=rows_of(len(shard.param), number, 2))
                              for shard in state.model.shards]
        savers.append(Saver(run, state, Noting(Thread(number, peers)), 3, newest_step=2))
    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return savers, results


def test_two_ranks_write_one_checkpoint(run):
    savers, results = on_two_ranks(run, lambda saver: saver.save(3, progress(3), wait=True))
    assert results == [None, None]
    assert [saver.newest_step for saver in savers] == [3, 3]
    save(run, 4, trained(3))
    one, two = (run / "checkpoints" / f"step_0000000{step}" for step in (3, 4))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_share_that_fails_on_one_rank_has_failed_on_all(run, rank):
    """The weights are broken in a row that only this rank saves; then they are mended."""
    row = {0: 0, 1: -1}[rank]

    def work(saver):
        weight = saver.state.model.module.wpe.weight.data
        good, weight[row, 0] = weight[row, 0].item(), torch.nan
        saver.save(3, progress(3), wait=False)
        saver.wait()
        failed = saver.newest_step
        weight[row, 0] = good
        saver.save(3, progress(3), wait=True)
        return failed

    savers, results = on_two_ranks(run, work)
    assert results == [2, 2]
    assert [saver.newest_step for saver in savers] == [3, 3]
    for saver in savers:
        (event,) = saver.tracker.events
        assert "wpe.weight holds values that are no numbers" in event
        assert ("rank 1" in event) == (rank == 1)


def test_a_rank_that_can_leave_no_note_is_not_waited_for(run, monkeypatch):
    """Its memory was full; rank 0 hears of it from the ranks, and not after PATIENCE."""
    monkeypatch.setattr(Path, "write_text", no_notes(Path.write_text))

    def work(saver):
        if saver.world.rank == 1:
            monkeypatch.setattr(saver, "_write_rows", fail(MemoryError()))
        saver.save(3, progress(3), wait=True)

    savers, results = on_two_ranks(run, work)
    assert all(isinstance(result, Failed) for result in results)
    assert [saver.newest_step for saver in savers] == [2, 2]
    assert names(run) == ["step_00000001", "step_00000002"]


def no_notes(original):
    def write_text(self, *arguments, **more):
        if self.name.startswith("rank_"):
            raise OSError(28, "No space left on device")
        return original(self, *arguments, **more)

    return write_text
