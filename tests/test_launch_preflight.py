"""launch.preflight finds the faults that are planted: it is of no use if it only says ok."""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from launch import preflight, probes
from launch.preflight import Needs
from tests.running import ROOT, environment
from tests.slurm import free_ports

SMI = """#!/bin/sh
case "$*" in
  *compute-apps*) printf "{apps}" ;;
  *) echo "580.95, 1200, 1980, 84, {reasons}" ;;
esac
"""


def statuses(lines: list[probes.Line]) -> dict[str, str]:
    return {line.check: line.status for line in lines}


def last_json(printed: str) -> dict:
    return json.loads(printed.strip().splitlines()[-1])


def test_this_machine_is_looked_at(tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "one.bin").write_bytes(bytes(2**21))
    code = preflight.run(Needs(data=tmp_path / "shards", out_dir=tmp_path / "runs"))
    printed = capsys.readouterr().out
    result = last_json(printed)
    assert code == (0 if result["fit"] else 1) == 0, printed
    assert [row["check"] for row in result["checks"]] == [
        "device", "kernels", "matrix product", "data", "space", "writing", "versions", "open files",
    ]
    assert not [*(tmp_path / "runs").iterdir()]  # the probe's own file is gone


def test_a_system_that_tells_less_than_linux_is_looked_at_too(monkeypatch):
    """macOS has no sched_getaffinity."""
    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.setattr(os, "sysconf", unknown)
    (line,) = probes.gpu(torch.device("cpu"))
    assert (line.status, line.found) == ("ok", "no GPU: 10 CPU cores, memory unknown")


def test_too_little_room_for_the_run_fails(tmp_path):
    lines = probes.run_folder(tmp_path, checkpoint_bytes=2**60, keep=3)
    assert statuses(lines)["space"] == "fail"
    assert "4,611,686,018.43 GB will be written" in lines[0].found  # 4 x 2^60


@pytest.fixture
def full_disk(tmp_path):
    """A real disk of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_fails(full_disk, capsys):
    code = preflight.run(Needs(out_dir=full_disk))
    assert code == 1
    printed = capsys.readouterr().out
    assert f"fail  writing         {full_disk}: No space left on device" in printed
    assert not last_json(printed)["fit"]
    assert not [*full_disk.iterdir()]


def test_a_folder_that_cannot_be_written_fails(tmp_path):
    (tmp_path / "runs").write_text("a file")
    lines = probes.run_folder(tmp_path / "runs", 0, keep=3)
    assert statuses(lines) == {"writing": "fail"}


@pytest.fixture
def slow(monkeypatch):
    """Whatever is timed takes ten seconds."""
    ticks = itertools.count(step=10.0)
    monkeypatch.setattr(probes, "clock", lambda: next(ticks))


def test_a_slow_data_folder_is_warned_of(tmp_path, slow):
    (tmp_path / "shard.bin").write_bytes(bytes(2**22))
    (line,) = probes.data_folder(tmp_path)
    assert (line.status, line.found[:9]) == ("warn", "419.43 kB")  # 4 MiB in 10 s
    assert "local disk" in line.advice


def test_a_slow_run_folder_is_warned_of(tmp_path, slow):
    lines = probes.run_folder(tmp_path, checkpoint_bytes=2**30, keep=3)  # 160 s at 64 MiB in 10 s
    assert statuses(lines) == {"space": "ok", "writing": "warn"}
    assert "160 s a save" in lines[1].found


def test_missing_data_fails(tmp_path):
    assert statuses(probes.data_folder(tmp_path / "nowhere")) == {"data": "fail"}
    (tmp_path / "empty").mkdir()
    assert statuses(probes.data_folder(tmp_path / "empty")) == {"data": "fail"}


def test_a_wrong_version_is_warned_of(tmp_path):
    constraints = tmp_path / "constraints.txt"
    ours = torch.__version__.split("+")[0]
    constraints.write_text(f'torch=={ours}; platform_system == "Linux"\nnumpy==1.0.1\nabsent==1\n')
    (line,) = probes.versions(constraints)
    assert line.status == "warn"
    assert "numpy" in line.found
    assert "(tested with 1.0.1)" in line.found
    assert "torch" not in line.found
    constraints.write_text(f"torch=={ours}\n")
    assert probes.versions(constraints)[0].status == "ok"


def test_few_open_files_are_warned_of(monkeypatch):
    monkeypatch.setattr(probes.resource, "getrlimit", lambda which: (256, 4096))
    (line,) = probes.open_files()
    assert (line.status, line.advice) == ("warn", "ulimit -n 4096")


def test_wandb_without_a_key_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert probes.wandb_login("disabled") == []
    assert statuses(probes.wandb_login("online")) == {"wandb": "fail"}
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 0123\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert statuses(probes.wandb_login("online")) == {"wandb": "ok"}


@pytest.mark.parametrize(
    ("reasons", "apps", "expected"),
    [
        ("0x0000000000000001", "77\\n", {"clocks": "ok", "GPU processes": "ok"}),  # idle
        ("0x0000000000000048", "77\\n", {"clocks": "fail", "GPU processes": "ok"}),
        ("0x0000000000000004", "77\\n4242\\n", {"clocks": "ok", "GPU processes": "warn"}),
    ],
    ids=["sound", "hot", "shared"],
)
def test_what_nvidia_smi_says_is_understood(tmp_path, monkeypatch, reasons, apps, expected):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI.format(reasons=reasons, apps=apps))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    lines = probes.driver("GPU-0", own=77)
    assert statuses(lines) == {"driver": "ok"} | expected
    hot = next(line for line in lines if line.check == "clocks")
    assert ("hardware slowdown, heat" in hot.found) == (expected["clocks"] == "fail")


def everyone(**changes) -> list[dict]:
    """Four nodes of one rank in a ring, as they report; rank 2 differs by `changes`."""
    ring = [[((r + 1) % 4, 10e9), ((r - 1) % 4, 10e9)] for r in range(4)]
    all_of_them = [{"node": f"n{r}", "now": 0.0, "links": ring[r], "flops": 1e12, "torch": "2.13.0"}
                   for r in range(4)]
    all_of_them[2] |= changes
    return all_of_them


@pytest.mark.parametrize(
    ("changes", "check", "status", "found"),
    [
        ({}, "links", "ok", "none stands out"),
        ({"flops": 5e11}, "speed of ranks", "warn", "slow: rank 2 (n2)"),
        ({"now": 3.0}, "clock skew", "warn", "3.000 s"),
        ({"torch": "2.12.0"}, "same torch", "fail", "2.12.0, 2.13.0"),
    ],
    ids=["sound", "slow GPU", "clock", "version"],
)
def test_the_rank_that_differs_is_named(changes, check, status, found):
    line = next(x for x in preflight.comparisons(everyone(**changes)) if x.check == check)
    assert (line.status, line.found) == (status, found)


def test_the_node_with_a_slow_cable_is_named_and_its_neighbours_are_not():
    nodes = everyone()
    for r, neighbour in ((1, 2), (2, 1), (2, 3), (3, 2)):  # both links of rank 2
        links = nodes[r]["links"]
        links[[other for other, _ in links].index(neighbour)] = (neighbour, 2e9)
    line = next(x for x in preflight.comparisons(nodes) if x.check == "links")
    assert (line.status, line.found) == ("warn", "slow: n2")


def rank_0_of_two(monkeypatch) -> int:
    """This process waits for a second rank, but not for long. Returns the port it waits at."""
    (port,) = free_ports(1)
    for key, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(preflight, "ANSWER", timedelta(seconds=2))
    monkeypatch.setattr(preflight, "PROBE", timedelta(seconds=1))
    return port


def test_a_rank_that_never_comes_is_named(monkeypatch, tmp_path, capsys):
    rank_0_of_two(monkeypatch)
    assert preflight.run(Needs(out_dir=tmp_path)) == 1
    (row,) = last_json(capsys.readouterr().out)["checks"]
    assert (row["status"], row["found"]) == ("fail", "no answer from rank 1 of 2")
    assert "node 1" in row["advice"]


def test_a_rank_that_stops_answering_is_named(monkeypatch, tmp_path, capsys):
    port = rank_0_of_two(monkeypatch)

    def come_and_hang() -> None:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        store.set("here/1", "elsewhere")

    other = threading.Thread(target=come_and_hang)
    other.start()
    assert preflight.run(Needs(out_dir=tmp_path)) == 1
    other.join()
    rows = {row["check"]: row for row in last_json(capsys.readouterr().out)["checks"]}
    assert rows["all-reduce"]["status"] == "fail"
    assert rows["ranks"]["found"] == "no answer from rank 1 of 2"


@pytest.mark.parametrize(("data", "code"), [(__file__, 0), ("missing.txt", 1)])
def test_every_node_has_the_exit_code_of_all(tmp_path, data, code):
    """A script on each of two nodes: whether the run is started there hangs on it."""
    (port,) = free_ports(1)
    both = [subprocess.Popen(
        [sys.executable, "-m", "launch.preflight", "--out_dir", str(tmp_path), "--data", data],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment() | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                             "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                             "MASTER_PORT": str(port)},
    ) for rank in (0, 1)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [code, code], said
    assert last_json(said[0][0])["fit"] is (code == 0)
    assert said[1] == ("", "")


def test_three_ranks_under_torchrun(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3",
         "-m", "launch.preflight", "--out_dir", str(tmp_path / "runs"), "--data", __file__],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = last_json(done.stdout)
    assert (result["fit"], result["ranks"]) == (True, 3)
    found = {row["check"]: row["found"] for row in result["checks"]}
    assert re.fullmatch(r"[\d.]+ [kMG]B/s a rank, 3 ranks, .*", found["all-reduce"])
    assert found["same torch"] == torch.__version__
