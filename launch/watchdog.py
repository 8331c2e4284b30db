"""Ends a run that stands still, says where every rank stands, and which one doesn't answer.

A rank that hangs (a dead disk, a dead link, a stopped process) leaves the others waiting for ever,
at the price of all their GPUs. Where nothing has moved for `hang_timeout` seconds, every rank that
still can leaves a note in the run folder on where it stands, the lowest of them prints them all,
and each dumps its stacks and leaves with 1, so that torchrun starts the group again.

Only time in which the watchdog itself ran counts: a run that was suspended (Ctrl-Z, `docker pause`,
a laptop's lid) goes on where it was. A thread that hangs with Python's lock held stops the watchdog
too: a process beside it, launch/lifeline.py, then ends the rank.
"""

import contextlib
import faulthandler
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from launch.config import WatchdogConfig
from launch.world import World

ROOT = str(Path(__file__).parent.parent)
ANSWER = 5.0  # seconds that the ranks have to say where they stand
TICK = 1.0  # seconds between two looks, at most
GRACE = 30  # seconds after hang_timeout at which a rank whose Python can't run is ended
# Before the first step ranks wait for one another longer: rank 0 may be hashing a checkpoint of
# 19 GB or downloading, and torch.distributed itself gives up after 30 minutes (launch/world.py).
SET_UP_SECONDS = 1800.0


class Watchdog:
    """Waits on a thread for signs of life, which heartbeat() gives; the first one starts it."""

    def __init__(self, world: World, folder: Path, config: WatchdogConfig) -> None:
        self.world, self.folder, self.seconds = world, folder, config.hang_timeout
        self.left = self.seconds  # until the run counts as hung, while nothing moves
        self.main = threading.get_ident()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def heartbeat(self, setting_up: bool = False) -> None:
        """Something has moved on: the waiting begins anew."""
        self.left = self.seconds
        if setting_up:
            self.left = max(self.seconds, SET_UP_SECONDS)
        if not self.thread.ident:
            with contextlib.suppress(OSError):
                self._note(self.world.rank).unlink(missing_ok=True)
            self.thread.start()

    def close(self) -> None:
        """The work is done."""
        self.closed.set()
        if self.thread.ident:
            self.thread.join()

    def _watch(self) -> None:
        """Counts its own ticks: one that lasted longer, for the process was stopped, is one."""
        tick = min(TICK, self.seconds / 4)
        lifeline = start_lifeline(int(self.seconds) + GRACE)
        while not self.closed.wait(tick):
            if lifeline:
                with contextlib.suppress(OSError):
                    lifeline.stdin.write(b".")
            self.left -= tick
            if self.left <= 0:
                self._end()
        if lifeline:
            lifeline.stdin.close()  # which ends it
            lifeline.wait()

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._note(self.world.rank).write_text(self._where(), encoding="utf-8")
        time.sleep(ANSWER)
        notes = {rank: self._read(rank) for rank in range(self.world.size)}
        if self.world.rank == min((r for r, note in notes.items() if note), default=-1):
            print(f"error: no step was finished in {self.seconds:g} s (--hang_timeout):\n"
                  + report(notes), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=2, all_threads=True)
        os._exit(1)

    def _where(self) -> str:
        """The line of this project's code that the main thread is in."""
        frame = sys._current_frames().get(self.main)
        while frame and frame.f_back and not frame.f_code.co_filename.startswith(ROOT):
            frame = frame.f_back
        if not frame:
            return "nowhere"
        file = os.path.relpath(frame.f_code.co_filename, ROOT)
        return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"

    def _note(self, rank: int) -> Path:
        return self.folder / f".stuck_rank_{rank}"

    def _read(self, rank: int) -> str:
        try:
            return self._note(rank).read_text(encoding="utf-8")
        except OSError:
            return ""


def start_lifeline(seconds: int) -> Any:
    """Starts launch/lifeline.py, a Popen whose stdin feeds it; None where that can't be done."""
    if not faulthandler.is_enabled():
        faulthandler.enable(file=2)  # standard error, whatever sys.stderr has become
    # -I and -S: nothing is imported but the standard library, so that it starts in 15 ms.
    script = os.path.join(ROOT, "launch", "lifeline.py")
    command = [sys.executable, "-I", "-S", script, str(seconds)]
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                bufsize=0, start_new_session=True)
    except OSError:  # the watchdog alone then
        return None


def report(notes: dict[int, str]) -> str:
    """A line for each rank, and a last one that names those who differ from the rest."""
    lines = [f"  rank {rank}: {note or 'no answer'}" for rank, note in notes.items()]
    silent = [rank for rank, note in notes.items() if not note]
    places = [note for note in notes.values() if note]
    usual = max(set(places), key=places.count, default="")
    odd = [rank for rank, note in notes.items() if note and note != usual]
    suspects = silent or (odd if places.count(usual) > 1 else [])
    if suspects:
        lines.append(f"  stuck: {', '.join(f'rank {rank}' for rank in suspects)}")
    return "\n".join(lines)
