"""launch/torchrun.sh: the exact command in each environment, and what really happens to it."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from model.gpt2 import GPTConfig
from tests.running import ROOT, environment, flags, losses
from tests.scripts import AWKWARD, ENGINES, tool
from train_gpt2 import train

SCRIPT = ROOT / "launch" / "torchrun.sh"
# Real rendezvous between agents on this machine, whose name may not resolve to an interface.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "PET_LOCAL_ADDR": "127.0.0.1"}
# A step of this model takes 0.1 to 0.3 s on two ranks, most of it in the vocabulary.
SMALL = GPTConfig(n_layer=1, n_head=1, n_embd=16, n_ctx=16)


@pytest.fixture
def commands(tmp_path):
    """A PATH on which torchrun tells what it was asked, and the check finds no fault and 4 GPUs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tell = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    tool(folder, "torchrun", f"#!{sys.executable}\n{tell}\n")
    tool(folder, "python", "#!/bin/sh\necho 4 ${PREFLIGHT:-False} >&3\n")
    tool(folder, "scontrol", '#!/bin/sh\n[ "$3" = "gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n')
    tool(folder, "nproc", "#!/bin/sh\necho 30\n")
    return folder


def asked(commands: Path, *arguments: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    """(torchrun's flags, its environment) for these variables; train_gpt2.py's part is checked."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(ENGINES)}
    path = {"PATH": f"{commands}:{os.environ['PATH']}"}
    done = subprocess.run(
        [SCRIPT, "demo", *arguments], env=clean | path | variables,
        capture_output=True, text=True, check=True, cwd="/",
    )
    argv, seen = json.loads(done.stdout)
    at = argv.index("train_gpt2.py")
    assert argv[at + 1 :] == ["demo", *arguments]
    common = ["--signals-to-handle=SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGHUP", "--shutdown-timeout=120"]
    assert argv[at - 2 : at] == common
    assert seen["PWD"] == str(ROOT)
    return argv[: at - 2], seen


SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NODEID": "1", "SLURM_JOB_ID": "123456",
}
SKYPILOT = {
    "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_TASK_ID": "sky-7",
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
}
PODS = {
    "PET_MASTER_ADDR": "run-node-0-0.run", "PET_MASTER_PORT": "29400", "PET_NODE_RANK": "0",
    "PET_NNODES": "2", "PET_NPROC_PER_NODE": "8",
}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param({}, "--standalone --nproc-per-node=4 --max-restarts=3", id="one machine"),
        pytest.param(
            SLURM, "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=gpu07:23456 --rdzv-id=123456.0 "
            "--rdzv-conf=is_host=0 --nproc-per-node=4 --max-restarts=3", id="Slurm step",
        ),
        pytest.param(
            SLURM | {"SLURM_RESTART_COUNT": "2", "SLURM_NODEID": "0", "MASTER_ADDR": "10.1.1.1"},
            "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=10.1.1.1:23456 --rdzv-id=123456.2 "
            "--rdzv-conf=is_host=1 --nproc-per-node=4 --max-restarts=3", id="Slurm requeued",
        ),
        pytest.param(
            {"SLURM_JOB_ID": "9", "SLURM_NNODES": "2", "SLURM_NODEID": "0"},
            "--standalone --nproc-per-node=4 --max-restarts=3", id="Slurm batch script alone",
        ),
        pytest.param(
            SKYPILOT | {"SLURM_STEP_ID": "0"},  # SkyPilot can stand on Slurm
            "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=10.0.0.4:29400 --rdzv-id=sky-7 "
            "--rdzv-conf=is_host=0 --nproc-per-node=4 --max-restarts=3", id="SkyPilot",
        ),
        pytest.param(
            SKYPILOT | {"SKYPILOT_NODE_IPS": "10.0.0.4", "SKYPILOT_NODE_RANK": "0"},
            "--standalone --nproc-per-node=4 --max-restarts=3", id="SkyPilot, one node",
        ),
        pytest.param(
            PODS, "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=run-node-0-0.run:29400 "
            "--rdzv-id=gpt2 --rdzv-conf=is_host=1 --nproc-per-node=8 --max-restarts=3",
            id="Kubernetes",
        ),
        pytest.param(
            {"PET_MAX_RESTARTS": "0", "PET_NPROC_PER_NODE": "2"},
            "--standalone --nproc-per-node=2 --max-restarts=0", id="torchrun's own variables",
        ),
    ],
)
def test_the_command_of_each_environment(commands, variables, expected):
    argv, seen = asked(commands, **variables)
    assert argv == expected.split(" ")
    assert seen["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_defaults_give_way_to_what_is_set(commands):
    _, seen = asked(commands)
    assert {key: seen[key] for key in ("NCCL_DEBUG", "OMP_NUM_THREADS")} == {
        "NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "7",  # 30 cores, 4 ranks
    }
    _, seen = asked(commands, NCCL_DEBUG="INFO", OMP_NUM_THREADS="3")
    assert (seen["NCCL_DEBUG"], seen["OMP_NUM_THREADS"]) == ("INFO", "3")


def test_addresses_stand_in_for_names_on_skypilot(commands):
    _, seen = asked(commands, **SKYPILOT)
    assert seen["PET_LOCAL_ADDR"] == "10.0.0.5"


def test_logs_of_each_rank_lie_by_node(commands, tmp_path):
    _, seen = asked(commands, **SLURM, PET_LOG_DIR=str(tmp_path / "logs"))
    assert (seen["PET_LOG_DIR"], seen["PET_TEE"]) == (str(tmp_path / "logs" / "node1"), "3")
    assert (tmp_path / "logs" / "node1").is_dir()


def test_a_preflight_that_fails_is_not_repeated(commands):
    argv, _ = asked(commands, "--preflight=True", PREFLIGHT="True")
    assert argv[-1] == "--max-restarts=0"
    argv, _ = asked(commands, "--name", "a --preflight True of mine")
    assert argv[-1] == "--max-restarts=3"


def test_awkward_paths_arrive_as_they_are(commands, tmp_path):
    """In every argument (`asked` compares them), in the folder of logs, and on paper."""
    logs = tmp_path / AWKWARD
    arguments = ("--data.dir", AWKWARD, f"--out_dir=/{AWKWARD}/%a", "--name", "")
    _, seen = asked(commands, *arguments, PET_LOG_DIR=str(logs))
    assert seen["PET_LOG_DIR"] == str(logs / "node0")
    assert (logs / "node0").is_dir()
    logs = tmp_path / "not made"
    printed = subprocess.run(
        [SCRIPT, "demo", *arguments], check=True, capture_output=True, text=True,
        env=environment(PATH=f"{commands}:{os.environ['PATH']}", DRY_RUN="1",
                        PET_LOG_DIR=str(logs)),
    ).stdout
    assert not logs.exists()
    assert printed.startswith("torchrun --standalone --nproc-per-node=4 --max-restarts=3 --signals")
    assert shlex.split(printed)[-len(arguments) - 2 :] == ["train_gpt2.py", "demo", *arguments]


def refused(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """torchrun.sh with the real check, and a torchrun that must not be reached."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [SCRIPT, *arguments], env=environment(PATH=path, **variables),
        capture_output=True, text=True, timeout=60,
    )


def test_one_task_a_node_is_asked_for():
    done = refused("demo", **SLURM | {"SLURM_STEP_NUM_TASKS": "16", "MASTER_ADDR": "gpu07"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: 16 tasks on 2 nodes: one task a node is right")


def test_a_wrong_flag_is_reported_once_and_by_node_0(tmp_path):
    done = refused("demo", "--stepz", "3")
    assert done.returncode == 2
    assert done.stderr.count("Unrecognized options: --stepz") == 1
    assert "torchrun" not in done.stdout + done.stderr
    done = refused("demo", "--stepz", "3", **SLURM | {"MASTER_ADDR": "gpu07"})
    assert (done.returncode, done.stdout + done.stderr) == (2, "")


def test_missing_data_is_reported_by_the_node_that_misses_it(tmp_path):
    missing = str(tmp_path / "nowhere")
    done = refused("demo", "--data.dir", missing, **SLURM | {"MASTER_ADDR": "gpu07"})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no data in {missing}")
    assert done.stderr.count("\n") == 1


def test_an_awkward_path_reaches_the_check(tmp_path):
    missing = str(tmp_path / AWKWARD)
    done = refused("demo", "--data.dir", missing)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no data in {missing}")


# What stands in for train_gpt2.py: it tells which signals it ignores, and which one ends it.
RANK = """\
import signal, sys
from pathlib import Path

def end(number, frame):
    Path("ended").write_text(signal.Signals(number).name)
    sys.exit()

ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
for name in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1") + (() if ignored else ("SIGHUP",)):
    signal.signal(getattr(signal, name), end)
signal.alarm(60)  # nothing outlives its test
Path(".started").write_text(str(ignored))
Path(".started").rename("started")
while True:
    signal.pause()
"""


@contextmanager
def launched(folder: Path, *before: str):
    """torchrun.sh with the real torchrun and one such rank, once that rank waits for a signal."""
    for name, text in {"launch/torchrun.sh": SCRIPT.read_text(), "train_gpt2.py": RANK}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tool(path.parent, path.name, text)
    tool(folder, "python", "#!/bin/sh\necho 0 False >&3\n")
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [*before, folder / "launch" / "torchrun.sh"], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(PATH=path),
    )
    try:
        wait_for((folder / "started").exists, 60, "no rank started")
        yield process
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
            process.communicate()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGQUIT"])
def test_a_closed_terminal_and_quit_reach_the_rank(tmp_path, name):
    with launched(tmp_path) as process:
        process.send_signal(getattr(signal, name))
    assert (tmp_path / "started").read_text() == "False"
    assert (tmp_path / "ended").read_text() == name


def test_under_nohup_a_closed_terminal_reaches_nobody(tmp_path):
    """SIGTERM follows SIGHUP: had torchrun heard the first one, it would have handed that on."""
    with launched(tmp_path, "nohup") as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
    assert (tmp_path / "started").read_text() == "True"
    assert (tmp_path / "ended").read_text() == "SIGTERM"


def wait_for(condition, seconds: float, what: str) -> None:
    """Returns as soon as condition() holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def kill_tree(pid: int) -> None:
    """What a power cut does to a process and all its descendants."""
    os.kill(pid, signal.SIGSTOP)  # so that it starts no new ones
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        kill_tree(int(child))
    os.kill(pid, signal.SIGKILL)


@contextmanager
def agent(config, port: int, node: int, log: Path):
    """torchrun.sh as one of two nodes; nothing of it outlives the block."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    pods = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port), "PET_NNODES": "2"}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [SCRIPT, *flags(config)], stdout=file, stderr=file,
            env=environment(PATH=path, PET_NODE_RANK=str(node), **pods, **LOOPBACK),
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
            process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_node_that_dies_and_comes_back_changes_nothing(tiny, tmp_path):
    """Two agents, one killed with all its ranks and started again: the run ends as if nothing had
    been. fp64: two ranks add in another order than one process, see test_tiny."""
    start = dict(steps=24, dtype="fp64", eval_every=24, save_every=6, model=SMALL)
    two, port, logs = tiny(name="two", micro_batch=6, **start), free_port(), tmp_path / "log"
    run = tmp_path / "two"
    record = run / "metrics.jsonl"
    with agent(two, port, 0, logs) as first:
        with agent(two, port, 1, logs) as second:
            wait_for(lambda: record.exists() and len(losses(run)) > 8, 60, "no step 9")
            assert second.poll() is None
            kill_tree(second.pid)
        with agent(two, port, 1, logs) as second:
            wait_for(lambda: first.poll() is not None, 150, "end of the first agent")
            assert first.returncode == 0, logs.read_text()
            assert second.wait(timeout=30) == 0, logs.read_text()
    assert f"from {run / 'checkpoints'}" in logs.read_text()
    train(tiny(name="one", **start))
    for (step, one), (same, other) in zip(losses(tmp_path / "one"), losses(run), strict=True):
        assert step == same
        assert other == pytest.approx(one, abs=1e-9)


def test_shellcheck_finds_nothing():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (it's in the dev extra)")
    scripts = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")]
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
