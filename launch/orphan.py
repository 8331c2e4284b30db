"""Ends a rank whose launcher has died before it could train.

torchrun killed by SIGKILL leaves its workers running (measured). One that trains saves and stops
(launch/signals.py). One that is still starting has nothing to save, and if a peer died as well it
would wait half an hour for it in init_process_group, with the GPU taken: a thread ends it.
"""

import os
import threading
from pathlib import Path

LAUNCHER = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
SECONDS = 0.5  # between two looks
training_started = threading.Event()  # the training loop looks for itself now


def orphaned() -> bool:
    """Whether torchrun started this process and is gone."""
    return LAUNCHER is not None and (os.getppid() != LAUNCHER or is_init(LAUNCHER))


def is_init(pid: int) -> bool:
    """Whether this is a machine's first process, which adopts orphans, and no torchrun.

    In a container torchrun may be the first process itself. Knowing nothing (no /proc): False.
    """
    if pid != 1:
        return False
    try:
        return "python" not in Path("/proc/1/exe").readlink().name
    except PermissionError:  # somebody else's process: it didn't start this one
        return True
    except OSError:
        return False


def exit_when_orphaned() -> None:
    """From now on, until training_started is set, this process ends soon after its launcher."""
    if LAUNCHER is not None:
        threading.Thread(target=_watch, name="orphan", daemon=True).start()


def _watch() -> None:
    while not training_started.wait(SECONDS):
        if orphaned():
            os._exit(1)
