"""A real Slurm of two virtual nodes on this machine: loopback only, no systemd, nothing in /etc.

    with cluster(folder) as slurm:
        job = slurm.submit("--nodes=2", arguments=["demo"])

Debian's slurmctld, slurmd (built with multiple-slurmd) and munge, as root. Every daemon runs in the
foreground as a child that dies with this process.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.running import ROOT, environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "setpriv")
NODES, CPUS = 2, 2
CONFIGURATION = """\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
ReturnToService=2
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=2000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=2000
PartitionName=main Nodes=n[1-2] Default=YES State=UP PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE
PartitionName=urgent Nodes=n[1-2] State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no Slurm here; an empty string where there can."""
    lacking = [name for name in PROGRAMS if not shutil.which(name)]
    if lacking:
        return f"no {', '.join(lacking)} (apt-get install slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons want root"


def wait_for(condition: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    """Returns as soon as condition() holds; after so many seconds fails with what()."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Slurm:
    """The cluster's commands."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """Runs one of Slurm's commands; returns what it prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def submit(self, *options: str, arguments: list[str]) -> str:
        """launch/slurm.sbatch with sbatch's options, on CPUs; returns the job's number."""
        log = f"--output={self.folder}/%j.log"
        script = str(ROOT / "launch" / "slurm.sbatch")
        common = ("sbatch", "--parsable", f"--chdir={ROOT}", "--gpus-per-node=0", log)
        return self.run(*common, *options, script, *arguments)

    def log(self, job: str) -> str:
        """What the job has printed so far."""
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def show(self, job: str, key: str) -> str:
        """A field of scontrol's, such as JobState or Restarts."""
        return re.search(rf"\b{key}=(\S*)", self.run("scontrol", "show", "job", "-o", job))[1]

    def wait(self, job: str, *states: str, seconds: float = 180) -> None:
        """Returns when the job is in one of the states."""
        seen = ""

        def reached() -> bool:
            nonlocal seen
            seen = self.show(job, "JobState")
            return seen in states

        wait_for(reached, seconds, lambda: f"job {job} is {seen}: {self.log(job)[-3000:]}")

    def requeued(self, job: str, *changes: str) -> None:
        """Returns when the job was back in the queue and runs again, spared the two minutes there.

        They are there for a reason: a node refuses credentials as old as the order to end the
        job's first run, and their clock counts seconds. squeue says when that run is gone
        (COMPLETING until then), and three seconds more are enough.
        """
        state = ("squeue", "-h", "-j", job, "-o", "%T %r")
        wait_for(lambda: self.run(*state) == "PENDING BeginTime", 90,
                 lambda: f"{job} is {self.run(*state)}: {self.log(job)[-3000:]}")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3", *changes)
        self.wait(job, "RUNNING", "COMPLETED")


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Two idle nodes of two CPUs; nothing of them is left behind."""
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir(mode=0o755)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(folder=folder, ports=free_ports(1 + NODES), cpus=CPUS)
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # Virtual nodes have names that don't resolve, so addresses stand in for them.
    here = dict(MASTER_ADDR="127.0.0.1", PET_LOCAL_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    slurm = Slurm(folder, environment(
        SLURM_CONF=str(configuration), PATH=path, PET_LOG_DIR=str(folder / "ranks"), **here))
    munge = [f"--{kind}={folder}/munge.{kind.removesuffix('-file')}"
             for kind in ("key-file", "socket", "pid-file", "log-file", "seed-file")]
    daemons = []

    def start(*command: str) -> None:
        with (folder / "daemons.log").open("ab") as log:
            daemons.append(subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command], env=slurm.environment, stdout=log,
                stderr=log, cwd=folder,
            ))

    try:
        start("munged", "--foreground", "--force", *munge)
        wait_for((folder / "munge.socket").exists, 20, lambda: "munged does not start")
        start("slurmctld", "-D", "-c")
        for node in range(1, 1 + NODES):
            start("slurmd", "-D", "-c", "-N", f"n{node}")
        idle = ("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D")
        wait_for(lambda: slurm.run(*idle) == str(NODES), 30,
                 lambda: (folder / "daemons.log").read_text()[-3000:])
        yield slurm
    finally:
        for daemon in reversed(daemons):
            daemon.kill()
            daemon.wait()
        end_processes_of(configuration)


def end_processes_of(configuration: Path) -> None:
    """Kills whatever still runs in a job of this cluster, known by its SLURM_CONF."""
    mark = f"SLURM_CONF={configuration}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        pid = int(entry.parent.name)
        try:
            if pid != os.getpid() and mark in entry.read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue
