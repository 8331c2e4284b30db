"""Writing checkpoints while training goes on: every rank writes its own rows.

    saver = Saver(run, train_state, tracker, keep=3)
    saver.save(step, progress, wait=False)   # stalls training for a copy into memory, no longer
    saver.report_finished(step)              # at the next step: prints what was saved, or failed

The names, shapes and places in a .safetensors file follow from the model alone. Rank 0 makes the
files at their full size; then each rank's thread writes its rows at their offsets and leaves a
note, and rank 0's thread, when all notes are there, hashes, writes the manifest, renames and
prunes. Threads exchange nothing but these notes, so they can't disturb training's collectives.
All ranks have to see one file system.
"""

import base64
import contextlib
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch import cli
from launch.errors import Failed
from launch.files import free_bytes, fsync
from launch.tracker import Tracker
from model.checkpoint import TrainState, folder_name, list_checkpoints, remove, write_manifest
from model.optim import ROW_STATE, SCALAR_STATE

NAMES = {torch.float32: "F32", torch.float64: "F64"}  # of dtypes, in a safetensors header
PATIENCE = 300.0  # seconds that rank 0 gives the slowest rank after its own rows are written
LAST_PATIENCE = 10.0  # the same where this process is leaving, perhaps because a rank is dead
LARGEST_WRITE = 1 << 30  # bytes; Linux writes at most 2^31 - 4096 at once (write(2))


@dataclass(frozen=True)
class SavingConfig:
    """When a run is saved."""

    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """Newest checkpoints to keep."""

    def __post_init__(self) -> None:
        cli.within("save_every", self.save_every, 1, cli.MOST_STEPS)
        cli.within("keep", self.keep, 1, cli.MOST_STEPS)


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in a safetensors file: 8 bytes of length, a JSON header, the data."""

    header: bytes
    offsets: dict[str, int]
    size: int

    @classmethod
    def of(cls, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> "Layout":
        """Tensors one after the other, as they come. Format: huggingface/safetensors, README."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        relative, end = {}, 0
        for name, (dtype, shape) in tensors.items():
            relative[name] = end
            end += dtype.itemsize * torch.Size(shape).numel()
            place = [relative[name], end]
            entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": place}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
        header = len(text).to_bytes(8, "little") + text
        return cls(header, {k: len(header) + v for k, v in relative.items()}, len(header) + end)


@dataclass
class Piece:
    """Rows to write: their values here, and where they belong."""

    file: str
    offset: int
    values: Tensor


class Saver:
    """One rank's share in writing a run's checkpoints. At most one is being written at a time."""

    def __init__(
        self, run: Path, state: TrainState, tracker: Tracker, keep: int, newest_step: int = -1
    ) -> None:
        self.run, self.state, self.tracker, self.keep = run, state, tracker, keep
        self.newest_step = newest_step  # of the checkpoint on the disk, or on its way there
        self.world = tracker.world
        self.checkpoints = run / "checkpoints"
        self.layouts = _layouts(state)
        self._copies: dict[tuple[str, int], Tensor] = {}  # in memory; used again at every save
        self._thread: threading.Thread | None = None
        self._saved: list[Path] = []  # since report_finished; written by the thread
        self._failed: list[str] = []
        self._problem = ""  # what this rank's last write died of
        self._closing = threading.Event()

    def save(self, step: int, progress: dict[str, Any], wait: bool) -> None:
        """Begins a checkpoint; on return the weights may change again. All ranks call it.

        progress: what state.json holds beside random states and loss scale. wait: return when it's
        on the disk, and raise Failed on all ranks if it can't be; otherwise a failure is reported,
        and the checkpoints there were stay as they were. Does nothing where this step is saved.
        """
        if step == self.newest_step:
            return
        self.wait()
        self.report_finished(step)
        self.newest_step = step
        try:
            self._begin(step, progress)
            if wait:
                self.wait()
                self.world.raise_on_all_ranks(Failed(self._problem) if self._problem else None)
        except Failed as error:
            if wait:
                raise
            self._failed.append(str(error))
        if wait:
            self.report_finished(step)

    def wait(self) -> None:
        """Until the checkpoint that is being written is on the disk, or has failed."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def report_finished(self, step: int) -> None:
        """Says what was finished since the last call, and reports what went wrong."""
        while self._saved:
            self.world.print0("saved", self._saved.pop(0))
        while self._failed:
            problem = self._failed.pop(0)
            self.world.print0(f"warning: {problem}; training goes on, earlier checkpoints are good")
            self.tracker.log(step, event=f"checkpoint failed: {problem}")

    def close(self) -> None:
        """Lets a checkpoint that is being written come to its end, if the other ranks live."""
        self._closing.set()
        self.wait()

    # ---- in the foreground ----

    def _begin(self, step: int, progress: dict[str, Any]) -> None:
        """Makes the files, copies this rank's rows, and starts the thread."""
        scaler = self.state.scaler.state_dict()
        content = {**progress, "loss_scale": scaler, **_random_states()}  # of state.json
        work = self.world.broadcast_from_rank0(self._make_files, step, content)
        with self.world.fail_together():
            files = self._open(work)
        self._thread = threading.Thread(
            target=self._write, args=(work, files, self._copy()), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _make_files(self, step: int, content: dict[str, Any]) -> Path:
        """Rank 0 makes the folder and the files, their size final and their rows still zero."""
        final = self.checkpoints / folder_name(step)
        work = self.checkpoints / f".{final.name}.tmp"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            needed, free = sum(x.size for x in self.layouts.values()), free_bytes(self.checkpoints)
            if needed > free:
                raise Failed(f"could not save {final}: it takes {needed / 1e9:,.2f} GB, and "
                             f"{free / 1e9:,.2f} GB are free: no space left on the disk")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            for name, layout in self.layouts.items():
                with (work / name).open("wb") as file:
                    file.write(layout.header)
                    file.truncate(layout.size)
            (work / "state.json").write_text(json.dumps(content) + "\n")
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
                files[name] = os.open(work / name, os.O_WRONLY)
        except OSError as error:
            for handle in files.values():
                os.close(handle)
            raise Failed(f"{work} is not there for every rank ({error.strerror}): --out_dir must "
                         "be on a file system that all ranks share") from None
        return files

    def _copy(self) -> list[Piece]:
        """Copies what this rank writes into memory of its own."""
        pieces = []
        for file, name, row, values in self._rows():
            offset = self.layouts[file].offsets[name] + row * values[:1].nbytes
            key = (file, offset)
            if key not in self._copies:
                pinned = values.device.type == "cuda"
                self._copies[key] = torch.empty_like(values, device="cpu", pin_memory=pinned)
            self._copies[key].copy_(values, non_blocking=True)
            pieces.append(Piece(file, offset, self._copies[key]))
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return pieces

    def _rows(self) -> list[tuple[str, str, int, Tensor]]:
        """(file, tensor's name, first row, values) of everything that this rank writes."""
        rows = []
        for shard in self.state.model.shards:
            first = shard.save_rows.start
            end = _stored_rows(self.state, shard.name, shard.save_rows.stop)
            kept = self.state.optimizer.state.get(shard.optim_param, {})
            if first < end:
                weights = shard.local[first - shard.local_start : end - shard.local_start]
                rows.append(("model.safetensors", shard.name, first, weights))
                for key in ROW_STATE:
                    values = kept[key][first - shard.optim_start : end - shard.optim_start]
                    rows.append(("optimizer.safetensors", f"{shard.name}.{key}", first, values))
            if self.world.is_rank0:  # which always has rows, of every parameter
                for key in SCALAR_STATE:
                    value = kept[key].reshape(1)
                    rows.append(("optimizer.safetensors", f"{shard.name}.{key}", 0, value))
        return rows

    # ---- in the thread ----

    def _write(self, work: Path, files: dict[str, int], pieces: list[Piece]) -> None:
        """Writes this rank's rows; rank 0 finishes the checkpoint."""
        final = work.with_name(work.name[1:].removesuffix(".tmp"))
        problem = _write_rows(files, pieces)
        if self.world.is_rank0:
            try:
                if not problem:
                    problem = self._others_notes(work)
                if not problem:
                    self._finish(work, final)
            except OSError as error:
                problem = str(error)
            if problem:
                problem = f"could not save {final}: {problem}"
                shutil.rmtree(work, ignore_errors=True)
                self._failed.append(problem)
            else:
                self._saved.append(final)
        else:
            # A name says it all, for on a full disk that may be all there's room for.
            note = work / f"rank_{self.world.rank}{'.failed' * bool(problem)}"
            with contextlib.suppress(OSError):  # rank 0 has given up, or will lose patience
                note.write_text(problem)
        self._problem = problem

    def _others_notes(self, work: Path) -> str:
        """Waits for a note of every other rank and takes it away; returns what went wrong."""
        patience, began = PATIENCE, time.monotonic()
        missing = set(range(1, self.world.size))
        while missing:
            for rank in sorted(missing):
                failed = work / f"rank_{rank}.failed"
                if failed.exists():
                    return f"rank {rank}: {failed.read_text() or 'could not write its rows'}"
                if (work / f"rank_{rank}").exists():
                    (work / f"rank_{rank}").unlink()
                    missing.remove(rank)
            if self._closing.is_set():
                patience = LAST_PATIENCE
            if missing and time.monotonic() - began > patience:
                return f"rank {min(missing)} has not written its rows {patience:.0f} s after rank 0"
            time.sleep(0.02)
        return ""

    def _finish(self, work: Path, final: Path) -> None:
        write_manifest(work)
        if final.exists():  # a damaged one of the same step, which the run went back from
            remove(final)
        work.rename(final)
        fsync(self.checkpoints)
        with contextlib.suppress(OSError):  # what can't be pruned now will be after the next save
            # Newer folders are damaged ones that the run went back from: they aren't counted.
            kept = [c for c in list_checkpoints(self.checkpoints) if c.name <= final.name]
            for old in kept[self.keep :]:
                remove(old)


def _layouts(state: TrainState) -> dict[str, Layout]:
    """Both files' layouts, the same on every rank."""
    weights: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    optimizer: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for shard in state.model.shards:
        p = shard.param
        shape = (_stored_rows(state, shard.name, len(p)), *p.shape[1:])
        weights[shard.name] = (p.dtype, shape)
        for key in ROW_STATE:
            optimizer[f"{shard.name}.{key}"] = (p.dtype, shape)
        for key in SCALAR_STATE:
            optimizer[f"{shard.name}.{key}"] = (torch.float32, ())
    return {"model.safetensors": Layout.of(weights), "optimizer.safetensors": Layout.of(optimizer)}


def _stored_rows(state: TrainState, name: str, rows: int) -> int:
    """How many of a parameter's first `rows` rows are stored: the embedding's padding is not."""
    return min(rows, state.model.module.config.n_vocab) if name == "wte.weight" else rows


def _write_rows(files: dict[str, int], pieces: list[Piece]) -> str:
    """Writes and flushes; returns what went wrong. Closes the files.

    On a network file system ranks of other nodes write beside these bytes: no file is read back,
    so no stale page is ever written over theirs.
    """
    try:
        for piece in pieces:
            left, offset = memoryview(piece.values.view(-1).numpy()).cast("B"), piece.offset  # type: ignore[arg-type]
            while left:
                written = os.pwrite(files[piece.file], left[:LARGEST_WRITE], offset)
                left, offset = left[written:], offset + written
        for handle in files.values():
            os.fsync(handle)
    except OSError as error:
        return str(error)
    finally:
        for handle in files.values():
            os.close(handle)
    return ""


def _random_states() -> dict[str, str | None]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"rng_cpu": _text_of(torch.get_rng_state()), "rng_cuda": _text_of(cuda)}


def _text_of(state: Tensor | None) -> str | None:
    return None if state is None else base64.b64encode(state.numpy().tobytes()).decode()
