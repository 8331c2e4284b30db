"""Signals: asks the run to stop after the step it is in, once all ranks have agreed.

SIGINT (Ctrl-C), SIGTERM (torchrun, Slurm, Kubernetes) and SIGUSR1 (Slurm's early warning) only
raise a flag. The training loop reads it between steps, evaluation between batches, generation
between tokens; the run saves and leaves. A second signal changes nothing, for clusters send
SIGTERM twice.
"""

import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch import cli, orphan
from launch.files import atomic_write
from launch.spikes import Policy, Spikes
from launch.watchdog import Watchdog
from launch.world import World

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MARKER = "STOPPED"  # in the run folder: this run was stopped on purpose and can go on


@dataclass(frozen=True)
class GuardConfig:
    """What a run does about steps and ranks that go wrong."""

    on_spike: Policy = "skip"
    """A loss that is no number, or an exploding gradient: skip the step, rollback, stop, ignore."""
    max_spikes: int = 10
    """Bad steps in a row that are borne; one more ends the run."""
    hang_timeout: float = 600.0
    """Seconds without any progress after which a rank ends itself, and says where it stood."""

    def __post_init__(self) -> None:
        cli.within("max_spikes", self.max_spikes, 0)
        # 30 days; far above it the timers' own type overflows.
        cli.within("hang_timeout", self.hang_timeout, 1, 30 * 86_400, "seconds")


class Guard:
    """Remembers the signal that came, makes all ranks see the same one, and watches for hangs."""

    def __init__(self, world: World, folder: Path, config: GuardConfig) -> None:
        self.world = world
        self.spikes = Spikes(config.on_spike, config.max_spikes)
        self.watchdog = Watchdog(world, folder, config.hang_timeout)
        self.received = 0
        self.stop_signal = 0
        self._before = {number: signal.signal(number, self._remember) for number in HANDLED}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def asked_to_stop(self) -> bool:
        """Whether any rank was told to stop. Every rank calls this at the same point."""
        orphan.grown_up.set()
        if orphan.orphaned():
            self.received = self.received or signal.SIGTERM
        if not self.stop_signal:
            self.stop_signal = int(self.world.max(self.received))
        self.watchdog.alive()
        return self.stop_signal != 0

    def stop_name(self) -> str:
        """The agreed signal's name, such as SIGTERM."""
        return signal.Signals(self.stop_signal).name

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as a shell expects; 0 for every other signal and for none."""
        return 130 if self.stop_signal == signal.SIGINT else 0

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        self.watchdog.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)


def write_marker(run: Path, reason: str) -> None:
    """Leaves word in the run folder that the run stopped on purpose.

    torchrun exits with 1 after a signal even when every rank saved and left with 0, so the exit
    code alone can't tell.
    """
    atomic_write(run / MARKER, reason + "\n")


def clear_marker(run: Path) -> None:
    """The run goes on."""
    (run / MARKER).unlink(missing_ok=True)
