"""Writing checkpoints while training goes on: every rank writes its own rows.

    saver = Saver(run, train_state, tracker, keep=3)
    saver.save(step, progress, wait=False)   # stalls training for a copy into memory, no longer
    saver.report_finished(step)              # at the next step: prints what was saved, or failed

The names, shapes and places in a .safetensors file follow from the model alone. Rank 0 makes the
files at their full size; then each rank's thread writes its rows at their offsets and leaves a
note, and rank 0's thread, when all notes are there, hashes, writes the manifest, renames and
prunes. Threads exchange nothing but these notes, so they can't disturb training's collectives.
All ranks have to see one file system.

A checkpoint has failed until it's proved good: newest_step changes, on all ranks at once, when
every rank's thread has come to its end without an error.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch import console
from launch.errors import Failed
from launch.files import flush, free_bytes, human_size, set_size
from launch.progress import Bar
from launch.tracker import Tracker
from model.best import mark_best
from model.checkpoint import (
    find_rollback_checkpoint,
    folder_name,
    hidden,
    mark_doubtful,
    prune,
    put_in_place,
    step_of,
)
from model.manifest import write_manifest
from model.train_state import (
    Piece,
    TrainState,
    find_not_finite,
    layouts,
    load_train_state,
    pieces_to_save,
    small_state,
)

PATIENCE = 300.0  # seconds without a byte from any rank after which a save has failed
LAST_PATIENCE = 10.0  # that rank 0 gives the others where it's leaving, perhaps for a dead rank
POLL = 0.05  # seconds between two looks at how a save is getting on
WRITE_CHUNK = 1 << 26  # bytes written and flushed at once: a slow disk's progress is seen


class Saver:
    """One rank's share in writing a run's checkpoints. At most one is being written at a time.

    newest_step: of the newest checkpoint that is proved to be on the disk; the same on all ranks.
    resumed_from: the checkpoint that the run began with, perhaps another run's.
    heartbeat: called while a wait makes progress, so that a long one isn't taken for a hang.
    keep_best, full_rate: beside the `keep` newest, the one of the lowest validation loss, and the
    newest up to this step, the last before the rate falls.
    """

    def __init__(
        self, run: Path, state: TrainState, tracker: Tracker, keep: int, newest_step: int = -1,
        resumed_from: Path | None = None, heartbeat: Callable[[], object] = lambda: None,
        keep_best: bool = False, full_rate: int = -1) -> None:
        self.run, self.state, self.tracker, self.keep = run, state, tracker, keep
        self.newest_step, self.resumed_from, self.heartbeat = newest_step, resumed_from, heartbeat
        self.keep_best, self.full_rate = keep_best, full_rate
        self.world = tracker.world
        self.checkpoints = run / "checkpoints"
        self.layouts = layouts(state)
        self._copies: dict[tuple[str, int], Tensor] = {}  # in memory; used again at every save
        self._losses: dict[int, float] = {}  # validation losses, when the last save began
        self._saved: list[Path] = []  # since report_finished
        self._failed: list[Failed] = []
        # Of the checkpoint that is being written; the thread sets _problem and counts _bytes.
        self._step: int | None = None
        self._thread: threading.Thread | None = None
        self._in_streak = False  # made after bad steps, so it may push out nothing
        self._problem = ""  # what this rank's share has died of
        self._bytes = 0  # written and hashed
        self._seen, self._seen_at = 0.0, 0.0  # bytes of all ranks, and when there were more
        self._give_up = threading.Event()  # rank 0 needn't wait for the others' notes any longer
        self._closing = threading.Event()
        if keep_best and self.world.is_rank0:  # a kill may have come before it was written
            with contextlib.suppress(OSError):
                newest = self.checkpoints / folder_name(newest_step)
                mark_best(self.checkpoints, newest, tracker.val_losses)

    def save(self, step: int, progress: dict[str, Any], wait: bool) -> None:
        """Begins a checkpoint; on return the weights may change again. All ranks call it.

        progress: what state.json holds beside random states and loss scale. wait: return when it's
        on the disk, and raise Failed on all ranks if it can't be; otherwise a failure is reported,
        and the checkpoints there were stay as they were. Does nothing where this step is saved.
        """
        self.wait()
        self.report_finished(step)
        if step == self.newest_step:
            return
        try:
            self._begin(step, progress)
        except Failed as error:
            self._failed.append(error)
        if wait:
            self.wait()
            if self._failed:
                raise self._failed.pop()
            self.report_finished(step)

    def must_keep(self, step: int) -> bool:
        """Whether a step is saved in any case, as the best so far or the last of full rate."""
        return self.is_best(step) or step == self.full_rate

    def is_best(self, step: int) -> bool:
        """Whether this step is to be saved as the best so far: the same on all ranks."""
        return self.keep_best and step == self.tracker.best_step()

    def wait(self) -> None:
        """Until the checkpoint being written is on the disk, or has failed. All ranks call it."""
        written_and_hashed = 2 * sum(layout.size for layout in self.layouts.values())
        with Bar(desc="saving", total=written_and_hashed, unit="B") as bar:
            while self._step is not None and self._writing():
                bar.update(self._seen - bar.n)
                if self._thread:
                    self._thread.join(POLL)
        self._settle()

    def report_finished(self, step: int) -> None:
        """Says what was finished since the last call, and reports what went wrong. All ranks call
        it together."""
        if self._step is not None and not self._writing():
            self._settle()
        while self._saved:
            saved = self._saved.pop(0)
            best = self.is_best(step_of(saved))
            self.world.print0("saved", saved)
            if best:
                self.tracker.log_event(step, f"best validation loss so far: {saved}")
        while self._failed:
            problem = self._failed.pop(0)
            self.world.print0(console.warning(
                f"{problem}; training goes on, earlier checkpoints are good"))
            self.tracker.log(step, event=f"checkpoint failed: {problem}")

    def load_newest(self) -> dict[str, Any]:
        """Goes back to the newest checkpoint; returns its state.json. All ranks call it together.

        The next save() of that step writes it anew.
        """
        self.wait()
        source = self.world.broadcast_from_rank0(
            find_rollback_checkpoint, self.run, self.resumed_from
        )
        with self.world.fail_together():
            saved = load_train_state(self.state, source)
        self.newest_step = -1
        return saved

    def doubt_since(self, step: int, reason: str) -> None:
        """The next start passes over the checkpoints of this step and later, which nothing but bad
        steps have followed: they may be the cause. All ranks call it together."""
        self.wait()
        self.world.broadcast_from_rank0(mark_doubtful, self.run, step, reason)

    def close(self) -> None:
        """Lets a checkpoint that is being written come to its end, if the other ranks live. Asks
        them nothing."""
        self._closing.set()
        before = -1
        while self._thread and self._thread.is_alive():
            if self._bytes > before:
                before = self._bytes
                self.heartbeat()
            self._thread.join(POLL)

    # ---- in the foreground, all ranks together ----

    def _writing(self) -> bool:
        """Whether any rank is still at it; a heartbeat where there was progress."""
        alive = self._thread is not None and self._thread.is_alive()
        failed = not alive and self._problem != ""
        total, alive_ranks, failed_ranks = self.world.all_reduce_sum(self._bytes, alive, failed)
        now = time.monotonic()
        if total > self._seen:
            self._seen, self._seen_at = total, now
            self.heartbeat()
        if failed_ranks or now - self._seen_at > PATIENCE:
            self._give_up.set()
        return alive_ranks > 0

    def _settle(self) -> None:
        """All ranks learn how the checkpoint came out."""
        if self._step is None:
            return
        step, self._step = self._step, None
        final = self.checkpoints / folder_name(step)
        try:
            self.world.raise_on_all_ranks(Failed(self._problem) if self._problem else None)
            self.newest_step = step
            self._saved.append(final)
        except Failed as error:
            self._failed.append(Failed(f"could not save {final}: {error}"))

    def _begin(self, step: int, progress: dict[str, Any]) -> None:
        """Makes the files, copies this rank's rows, and starts the thread."""
        content = {**progress, **small_state(self.state)}  # of state.json
        work = self.world.broadcast_from_rank0(self._make_files, step, content)
        files: dict[str, int] = {}
        try:
            with self.world.fail_together():
                files = self._open(work)
                pieces = self._copy()
        except Failed as error:
            _close(files)
            if self.world.is_rank0:
                shutil.rmtree(work, ignore_errors=True)
            raise Failed(f"could not save {work.with_name(folder_name(step))}: {error}") from None
        self._in_streak = progress.get("streak", 0) > 0
        self._problem = "its thread died"  # until it has come to its end
        self._step, self._bytes, self._seen, self._seen_at = step, 0, 0.0, time.monotonic()
        self._give_up.clear()
        if self.keep_best:
            self._losses = dict(self.tracker.val_losses)  # the thread's own copy
        self._thread = threading.Thread(
            target=self._write, args=(step, files, pieces), name="checkpoint", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads
            self._thread, self._problem = None, str(error)
            _close(files)

    def _make_files(self, step: int, content: dict[str, Any]) -> Path:
        """Rank 0 makes the folder and the files, their size final and their rows still zero."""
        final = self.checkpoints / folder_name(step)
        work = hidden(final, "tmp")
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            needed, free = sum(x.size for x in self.layouts.values()), free_bytes(self.checkpoints)
            if needed > free:
                raise Failed(f"could not save {final}: it takes {human_size(needed)}, and "
                             f"{human_size(free)} are free: no space left on the disk")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            for name, layout in self.layouts.items():
                with (work / name).open("wb") as file:
                    file.write(layout.header)
                    set_size(file, layout.size)
            (work / "state.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
            shutil.copyfile(self.run / "config.json", work / "config.json")
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            raise Failed(f"could not save {final}: {error}") from None
        return work

    def _open(self, work: Path) -> dict[str, int]:
        """Opens the files now, and not in the thread: a rank that was orphaned, and writes late,
        then holds the files of its own save and can't touch those of a run that took over."""
        files: dict[str, int] = {}
        try:
            for name in self.layouts:
                files[name] = os.open(work / name, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            _close(files)
            raise Failed(f"{work} is not there for every rank ({error.strerror}): --out_dir must "
                         "be on a file system that all ranks share") from None
        return files

    def _copy(self) -> list[Piece]:
        """Copies what this rank writes into memory of its own."""
        copies = []
        try:
            for piece in pieces_to_save(self.state, self.layouts, self.world.is_rank0):
                key, values = (piece.file, piece.offset), piece.values
                if key not in self._copies:
                    pinned = values.device.type == "cuda"
                    self._copies[key] = torch.empty_like(values, device="cpu", pin_memory=pinned)
                self._copies[key].copy_(values, non_blocking=True)
                copies.append(replace(piece, values=self._copies[key]))
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()
        except (MemoryError, RuntimeError) as error:  # torch's words for a full memory
            raise Failed(f"no copy in memory could be made: {error}") from None
        return copies

    # ---- in the thread ----

    def _write(self, step: int, files: dict[str, int], pieces: list[Piece]) -> None:
        """Writes this rank's rows; rank 0 finishes the checkpoint. _problem is empty at the end of
        a share that came out well, and never before."""
        final = self.checkpoints / folder_name(step)
        work = hidden(final, "tmp")
        try:
            problem = find_not_finite(pieces)
            if not problem:
                self._write_rows(work, files, pieces)
                if self.world.is_rank0:
                    problem = self._others_notes(work)
            if not problem and self.world.is_rank0:
                self._finish(work, final)
        except BaseException as error:  # a full memory too: nothing may pass for a good checkpoint
            problem = str(error) if isinstance(error, OSError) else repr(error)
        finally:
            _close(files)
        if not self.world.is_rank0:
            # A name says it all, for on a full disk that may be all there's room for.
            note = work / f"rank_{self.world.rank}{'.failed' * bool(problem)}"
            with contextlib.suppress(OSError):  # rank 0 has given up, or hears it in _writing()
                note.write_text(problem, encoding="utf-8")
        elif problem:
            shutil.rmtree(work, ignore_errors=True)
        self._problem = problem

    def _write_rows(self, work: Path, files: dict[str, int], pieces: list[Piece]) -> None:
        """Writes and flushes, piece by piece.

        On a network file system ranks of other nodes write beside these bytes: no file is read
        back, so no stale page is ever written over theirs.
        """
        unflushed = 0
        for piece in pieces:
            left, offset = memoryview(piece.values.view(-1).numpy()).cast("B"), piece.offset  # type: ignore[arg-type]
            while left:
                written = os.pwrite(files[piece.file], left[:WRITE_CHUNK], offset)
                left, offset = left[written:], offset + written
                unflushed += written
                if unflushed >= WRITE_CHUNK:
                    flush(files[piece.file], work)
                    self._bytes, unflushed = self._bytes + unflushed, 0
        for handle in files.values():
            flush(handle, work)
        self._bytes += unflushed

    def _others_notes(self, work: Path) -> str:
        """Waits for a note of every other rank and takes it away; returns what went wrong."""
        missing = set(range(1, self.world.size))
        closing_since = None
        while missing:
            for rank in sorted(missing):
                failed = work / f"rank_{rank}.failed"
                if failed.exists():
                    problem = failed.read_text(encoding="utf-8") or "could not write its rows"
                    return f"rank {rank}: {problem}"
                if (work / f"rank_{rank}").exists():
                    (work / f"rank_{rank}").unlink()
                    missing.remove(rank)
            if self._closing.is_set() and closing_since is None:
                closing_since = time.monotonic()
            out_of_time = closing_since and time.monotonic() - closing_since > LAST_PATIENCE
            if missing and (out_of_time or self._give_up.is_set()):
                return f"rank {min(missing)} has not written its rows"
            time.sleep(0.02)
        return ""

    def _finish(self, work: Path, final: Path) -> None:
        write_manifest(work, self._count)
        put_in_place(work, final)
        if self._in_streak:
            return
        with contextlib.suppress(OSError):  # what can't be pruned now will be after the next save
            best = mark_best(self.checkpoints, final, self._losses)
            prune(self.checkpoints, final, self.keep, best, self.full_rate)

    def _count(self, done: int) -> None:
        self._bytes += done


def _close(files: dict[str, int]) -> None:
    """Closes what is open, once."""
    while files:
        with contextlib.suppress(OSError):
            os.close(files.popitem()[1])
