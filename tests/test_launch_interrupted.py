"""Signals, suspension, hangs, and an output that nobody takes: none of them costs a run."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from data.shards import write_folder
from launch import lifeline, signals
from launch.signals import DistributedSignalHandler
from launch.watchdog import SET_UP_SECONDS, Watchdog, WatchdogConfig
from model.parallel import ParallelModel
from tests.running import ALONE, ROOT, environment, flags, losses, weights
from train_gpt2 import train


@pytest.fixture
def handler(tmp_path):
    made = DistributedSignalHandler(ALONE, Watchdog(ALONE, tmp_path, WatchdogConfig()))
    yield made
    made.close()
    made.watchdog.close()


# ---- signals ----


@pytest.mark.parametrize("name", ["SIGHUP", "SIGQUIT", "SIGTERM", "SIGUSR1"])
def test_every_signal_that_ends_a_program_asks_for_a_save(handler, capfd, name):
    signal.raise_signal(getattr(signal, name))
    assert handler.stop_requested()
    assert handler.name == name
    assert handler.exit_code == 0
    assert capfd.readouterr().err == f"{name}: saving after this step\n"


def test_under_nohup_a_closed_terminal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        watchdog = Watchdog(ALONE, tmp_path, WatchdogConfig())
        handler = DistributedSignalHandler(ALONE, watchdog)
        signal.raise_signal(signal.SIGHUP)
        assert not handler.stop_requested()
        handler.close()
        watchdog.close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Left(BaseException):
    """In the place of a process that ends."""


def leave(code: int) -> None:
    raise Left(code)


def test_ctrl_c_says_what_it_does_and_a_second_one_leaves_at_once(handler, monkeypatch, capfd):
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(signals.os, "_exit", leave)
    signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "SIGINT: saving after this step, once more to leave now\n"
    clock[0] += 5
    with pytest.raises(Left, match="130"):
        signal.raise_signal(signal.SIGINT)
    assert "left at once" in capfd.readouterr().err


def test_torchruns_copy_of_a_ctrl_c_counts_for_nothing_and_the_third_leaves(handler, monkeypatch):
    monkeypatch.setattr(signals.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(signals.os, "_exit", leave)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(Left, match="130"):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_between_micro_steps_leaves_the_step_unapplied(tiny, tmp_path, monkeypatch):
    """12 micro-steps a step: the signal comes in the third one of step 5."""
    train(tiny(name="whole", micro_batch=1))
    call, calls = ParallelModel.__call__, []

    def signalled(self, *batch):
        calls.append(1)
        if len(calls) == 4 * 12 + 3:
            signal.raise_signal(signal.SIGTERM)
        return call(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(ParallelModel, "__call__", signalled)
        assert train(tiny(micro_batch=1)) == 0
    assert len(calls) == 4 * 12 + 3
    stopped = (tmp_path / "tiny" / "STOPPED").read_text()
    assert stopped == "stopped by SIGTERM at step 4\n"
    assert train(tiny(micro_batch=1)) == 0
    assert losses(tmp_path / "tiny") == losses(tmp_path / "whole")
    one, two = weights(tmp_path / "tiny", 6), weights(tmp_path / "whole", 6)
    assert all((one[name] == two[name]).all() for name in one)


# ---- hangs and suspensions ----


class Ticks:
    """In the place of an Event that is waited on: so many ticks, each as long as it likes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def wait(self, seconds: float) -> bool:
        self.count -= 1
        return self.count < 0


@pytest.mark.parametrize(("ticks", "hung"), [(9, False), (10, True)])
def test_only_the_watchdogs_own_ticks_count(tmp_path, monkeypatch, ticks, hung):
    """However long a tick has lasted, for the process was stopped, it is one: 10 of 1 s hang."""
    watchdog, ended = Watchdog(ALONE, tmp_path, WatchdogConfig(hang_timeout=10.0)), []
    monkeypatch.setattr(watchdog, "closed", Ticks(ticks))
    monkeypatch.setattr(watchdog, "_end", lambda: ended.append(1))
    watchdog._watch()
    assert bool(ended) == hung


def test_before_the_first_step_ranks_have_more_time(tmp_path):
    watchdog = Watchdog(ALONE, tmp_path, WatchdogConfig(hang_timeout=10.0))
    watchdog.heartbeat(setting_up=True)
    assert watchdog.left > SET_UP_SECONDS - 60
    watchdog.heartbeat()
    assert watchdog.left <= 10.0
    watchdog.close()


def test_a_thread_that_hangs_with_pythons_lock_is_ended_from_outside():
    """ctypes.PyDLL keeps Python's lock during the call, so no thread of the process can run."""
    script = """
        import ctypes, os, threading, time
        from launch.watchdog import start_lifeline
        lifeline = start_lifeline(2)
        def feed():
            while True:
                lifeline.stdin.write(b".")
                time.sleep(0.2)
        threading.Thread(target=feed, daemon=True).start()
        time.sleep(1)
        ctypes.PyDLL(None).sleep(60)
        print("never reached")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, timeout=50,
                          env=environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert "Python has not run for 2 s" in done.stderr
    assert "Fatal Python error: Aborted" in done.stderr  # and the stacks
    assert "never reached" not in done.stdout


def test_a_suspended_parent_is_not_ended():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert not lifeline.is_stopped(child.pid)
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        assert lifeline.is_stopped(child.pid)
    finally:
        child.kill()
        child.communicate()


def test_the_lifeline_ends_with_its_parent():
    """The pipe it reads from is closed: nothing is left behind."""
    done = subprocess.run([sys.executable, str(ROOT / "launch" / "lifeline.py"), "30"],
                          stdin=subprocess.DEVNULL, timeout=20)
    assert done.returncode == 0


# ---- an output that nobody takes ----


def start(config, *shell: str) -> subprocess.Popen:
    """The run, with its streams as the shell words say."""
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *flags(config)]
    return subprocess.Popen(
        ["bash", "-c", f'exec "$@" {" ".join(shell)}', "bash", *command], cwd=ROOT, text=True,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("shell", ["> /dev/full", ">&- <&-", "> /dev/full 2>&1", "2>&- <&-"])
def test_a_run_goes_on_without_its_output(tiny, tmp_path, shell):
    process = start(tiny(steps=2), shell)
    _, complaints = process.communicate(timeout=120)
    assert process.returncode == 0, complaints
    assert (tmp_path / "tiny" / "checkpoints" / "step_00000002").is_dir()
    assert "Traceback" not in complaints


def test_a_run_goes_on_when_nobody_reads_it_any_more(tiny, tmp_path):
    process = start(tiny(steps=2))
    assert process.stdout and process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    _, complaints = process.communicate(timeout=120)
    assert process.returncode == 0
    assert complaints == ""
    assert (tmp_path / "tiny" / "checkpoints" / "step_00000002").is_dir()


def test_another_command_leaves_quietly(tmp_path):
    """`info` prints a line a shard: more than a pipe holds, and the reader takes one."""
    import numpy as np

    tokens = np.array([50256, 1, 2, 3], dtype=np.uint16)
    write_folder(tmp_path / "many", "x", [tokens] * 1500, tokens, "x")
    for command in ("info", "verify"):
        process = subprocess.Popen(
            [sys.executable, "-m", "data.shards", command, str(tmp_path / "many")], cwd=ROOT,
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        assert process.stdout and process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 1


def test_a_missing_stream_takes_no_files_number(tmp_path):
    script = ("from launch import console; console.open_closed_streams(); "
              f"file = open({str(tmp_path / 'x')!r}, 'w'); import os; os.write(1, b'lost'); "
              "file.write('kept'); file.close()")
    subprocess.run(["bash", "-c", 'exec "$@" >&-', "bash", sys.executable, "-c", script], cwd=ROOT,
                   check=True)
    assert Path(tmp_path / "x").read_text() == "kept"
