"""Signals: asks the run to stop after the step it is in, once all ranks have agreed.

SIGINT (Ctrl-C), SIGTERM (torchrun, Slurm, Kubernetes), SIGUSR1 (Slurm's early warning), SIGHUP (a
closed terminal) and SIGQUIT say so on standard error and raise a flag. The training loop reads it
between steps, evaluation between batches, generation between tokens; the run saves and leaves.

Clusters send SIGTERM twice, so a second one changes nothing. A second Ctrl-C ends the process at
once, unsaved: under torchrun each Ctrl-C comes twice, from the terminal and from torchrun, so
there it takes the third signal. Under nohup SIGHUP is ignored, and stays so.
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from launch import orphan
from launch.files import atomic_write
from launch.watchdog import Watchdog
from launch.world import World

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
STOPPED_FILE = "STOPPED"  # in the run folder: this run was stopped on purpose and can go on
# A second SIGINT within this time is torchrun's copy of the first: nobody presses so fast.
COPY_SECONDS = 1.0


class DistributedSignalHandler:
    """Remembers the signal that came to this rank, and makes all ranks see the same one."""

    def __init__(self, world: World, watchdog: Watchdog) -> None:
        self.world, self.watchdog = world, watchdog
        self.received = 0  # by this rank
        self.agreed = 0  # by all ranks
        self._interrupts: list[float] = []  # when each SIGINT came
        self._before = {
            number: signal.signal(number, self._remember)
            for number in HANDLED
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN)
        }

    def _remember(self, number: int, frame: FrameType | None) -> None:
        first = not self.received
        self.received = self.received or number
        if first:
            again = ", once more to leave now" if number == signal.SIGINT else ""
            self._say(f"{signal.Signals(number).name}: saving after this step{again}")
        if number == signal.SIGINT:
            self._interrupts.append(time.monotonic())
            since_first = self._interrupts[-1] - self._interrupts[0]
            if len(self._interrupts) >= 3 or since_first > COPY_SECONDS:
                self._say("left at once: what came after the newest checkpoint is not saved")
                os._exit(130)

    def _say(self, line: str) -> None:
        """On standard error, by rank 0. A handler may interrupt a print, so it can't print."""
        if self.world.is_rank0:
            try:
                os.write(2, f"{line}\n".encode())
            except OSError:  # a closed terminal is the reason for many a signal
                pass

    def stop_requested(self, ask: bool = True) -> bool:
        """Whether any rank was told to stop. Every rank calls this at the same point.

        ask: whether several ranks ask one another now, which GPUs would wait for. Whoever calls it
        is alive, so it is a heartbeat for the watchdog, too.
        """
        self.watchdog.heartbeat()
        orphan.training_started.set()
        if orphan.orphaned():
            self.received = self.received or signal.SIGTERM
        if not self.agreed and (ask or self.world.size == 1):
            self.agreed = int(self.world.all_reduce_max(self.received))
        return self.agreed != 0

    def stop_requested_in_step(self) -> bool:
        """The same between the micro-steps of a step; but several GPUs finish one in seconds, and
        don't wait for one another: False."""
        if self.world.size > 1 and self.world.device.type == "cuda":
            self.watchdog.heartbeat()
            return False
        return self.stop_requested()

    @property
    def name(self) -> str:
        """The agreed signal's name, such as SIGTERM."""
        return signal.Signals(self.agreed).name

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as a shell expects; 0 for every other signal and for none."""
        return 130 if self.agreed == signal.SIGINT else 0

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def was_stopped(run: Path) -> bool:
    """Whether a signal stopped this run and it has not gone on since."""
    return (run / STOPPED_FILE).exists()


def record_stop(run: Any, step: int) -> None:
    """Says that a signal has stopped a run, train_gpt2.py's Run: here, in its metrics, in STOPPED.
    All ranks call it together."""
    reason = f"stopped by {run.signals.name} at step {step}"
    run.world.broadcast_from_rank0(write_stopped_file, run.path, reason)
    run.tracker.log_event(step, f"{reason}; the same command goes on from there")


def write_stopped_file(run: Path, reason: str) -> None:
    """Leaves word in the run folder that the run stopped on purpose.

    torchrun exits with 1 after a signal even when every rank saved and left with 0, so the exit
    code alone can't tell. On a full disk there is no such word, and the run ends as it would.
    """
    try:
        atomic_write(run / STOPPED_FILE, reason + "\n")
    except OSError as error:
        print(f"warning: can't write {run / STOPPED_FILE}: {error.strerror}", flush=True)


def remove_stopped_file(run: Path) -> None:
    """The run goes on."""
    (run / STOPPED_FILE).unlink(missing_ok=True)
