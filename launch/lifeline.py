"""Ends its parent, a rank, when the rank's Python stops running: see launch/watchdog.py.

The parent's watchdog thread sends a byte a second through standard input. A thread that hangs with
Python's lock held stops that thread too, and no timer inside the process can tell such a hang from
a process that was suspended: this one can, for it counts only its own seconds, and none in which
its parent is stopped.

Imports the standard library alone, for it is started for every rank.
"""

import os
import select
import signal
import sys
import time

STACKS = 5.0  # seconds that faulthandler has to print the parent's stacks


def is_stopped(pid: int) -> bool:
    """Whether a process is suspended (T) or traced (t), or nothing is known of it."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return True


def watch(parent: int, seconds: int) -> None:
    """Returns when the parent has closed the pipe; ends it after seconds without a byte."""
    silent = 0  # seconds
    while silent < seconds:
        if select.select([0], [], [], 1.0)[0]:
            if not os.read(0, 4096):
                return
            silent = 0
        elif not is_stopped(parent):
            silent += 1
    print(f"error: Python has not run for {seconds} s in process {parent}: a thread hangs with its "
          "lock held", file=sys.stderr, flush=True)
    os.kill(parent, signal.SIGABRT)  # faulthandler prints the stacks
    time.sleep(STACKS)
    os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the end of the pipe is this process's end
    try:
        watch(os.getppid(), int(sys.argv[1]))
    except ProcessLookupError:  # it has gone by itself
        pass
