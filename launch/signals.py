"""Signals: asks the run to stop after the step it is in, once all ranks have agreed.

SIGINT (Ctrl-C), SIGTERM (torchrun, Slurm, Kubernetes) and SIGUSR1 (Slurm's early warning) only
raise a flag. The training loop reads it between steps, evaluation between batches, generation
between tokens; the run saves and leaves. A second signal changes nothing, for clusters send
SIGTERM twice.
"""

import signal
from pathlib import Path
from types import FrameType

from launch import orphan
from launch.files import atomic_write
from launch.world import World

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED_FILE = "STOPPED"  # in the run folder: this run was stopped on purpose and can go on


class DistributedSignalHandler:
    """Remembers the signal that came to this rank, and makes all ranks see the same one."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.received = 0  # by this rank
        self.agreed = 0  # by all ranks
        self._before = {number: signal.signal(number, self._remember) for number in HANDLED}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def stop_requested(self) -> bool:
        """Whether any rank was told to stop. Every rank calls this at the same point."""
        orphan.training_started.set()
        if orphan.orphaned():
            self.received = self.received or signal.SIGTERM
        if not self.agreed:
            self.agreed = int(self.world.all_reduce_max(self.received))
        return self.agreed != 0

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


def write_stopped_file(run: Path, reason: str) -> None:
    """Leaves word in the run folder that the run stopped on purpose.

    torchrun exits with 1 after a signal even when every rank saved and left with 0, so the exit
    code alone can't tell.
    """
    atomic_write(run / STOPPED_FILE, reason + "\n")


def remove_stopped_file(run: Path) -> None:
    """The run goes on."""
    (run / STOPPED_FILE).unlink(missing_ok=True)
