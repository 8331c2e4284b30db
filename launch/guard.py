"""Signals: asks the run to stop after the step it is in, once all ranks have agreed.

SIGINT (Ctrl-C), SIGTERM (torchrun, Slurm, Kubernetes) and SIGUSR1 (Slurm's early warning) only
raise a flag; the training loop reads it between steps, saves and leaves. A second signal changes
nothing, for clusters send SIGTERM twice.
"""

import math
import signal
from pathlib import Path
from types import FrameType

from launch.errors import Failed
from launch.files import atomic_write
from launch.world import World

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MARKER = "STOPPED"  # in the run folder: this run was stopped on purpose and can go on


class Guard:
    """Remembers the signal that came, and makes all ranks see the same one."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.received = 0
        self.stop_signal = 0
        self._before = {number: signal.signal(number, self._remember) for number in HANDLED}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def asked_to_stop(self) -> bool:
        """Whether any rank was told to stop. Every rank calls this at the same point."""
        if not self.stop_signal:
            self.stop_signal = int(self.world.max(self.received))
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
        for number, handler in self._before.items():
            signal.signal(number, handler)


def refuse_nonsense(step: int, loss: float, norm: float, skipped: bool) -> None:
    """Raises Failed where the loss or the gradient is no number, before that is saved.

    skipped: a loss scaler leaves out steps whose scaled gradient overflows, as it should.
    """
    if not math.isfinite(loss) or not (skipped or math.isfinite(norm)):
        raise Failed(f"step {step}: the loss is {loss} and the gradient's norm {norm}; nothing was "
                     "saved since. A lower --optim.lr or another --seed may get past it")


def write_marker(run: Path, reason: str) -> None:
    """Leaves word in the run folder that the run stopped on purpose.

    torchrun exits with 1 after a signal even when every rank saved and left with 0, so the exit
    code alone can't tell.
    """
    atomic_write(run / MARKER, reason + "\n")


def clear_marker(run: Path) -> None:
    """The run goes on."""
    (run / MARKER).unlink(missing_ok=True)
