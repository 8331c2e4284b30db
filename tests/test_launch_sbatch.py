"""launch/slurm.sbatch by hand and in a job, where sbatch and srun tell what they were asked.

What a real Slurm makes of it: test_launch_slurm.py.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT, environment
from tests.scripts import AWKWARD, ENGINES, tool

TELL = f"#!{sys.executable}\nimport json, sys; print(json.dumps(sys.argv[1:]))\n"
CHECK = """#!/bin/sh
shift 2 # -c and the check itself
printf '%s\\n' "$@" >> "$CHECKED"
echo 0 False >&3
"""
SAME_RUN = "error: every task of this array would be the same run: --seed %a --name seed-%a\n"


def by_hand(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """launch/slurm.sbatch on a login node, where sbatch tells what it was asked."""
    tool(folder, "sbatch", TELL)
    tool(folder, "python", CHECK)
    clean = {key: value for key, value in environment().items() if not key.startswith(ENGINES)}
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "CHECKED": str(folder / "checked")}
    return subprocess.run(
        ["bash", "launch/slurm.sbatch", *arguments], env=clean | path | variables,
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )


def test_by_hand_the_job_is_submitted_with_awkward_paths_as_they_are(tmp_path):
    arguments = ["demo", "--data.dir", AWKWARD, f"--out_dir=/{AWKWARD}/100%another", "--name", ""]
    done = by_hand(tmp_path, "--nodes=4", "--comment", "a -- b", "--", *arguments)
    assert done.returncode == 0, done.stderr
    script = ["--nodes=4", "--comment", "a -- b", "launch/slurm.sbatch"]
    assert json.loads(done.stdout) == [*script, *arguments]
    assert (tmp_path / "checked").read_text().split("\n")[:-1] == arguments
    assert json.loads(by_hand(tmp_path, *arguments).stdout) == ["launch/slurm.sbatch", *arguments]


def test_in_the_job_awkward_paths_stay_as_they_are(tmp_path):
    tool(tmp_path, "srun", TELL)
    tool(tmp_path, "scontrol", "#!/bin/sh\n")
    done = by_hand(tmp_path, "demo", "--data.dir", f"{AWKWARD}%a", SLURM_JOB_ID="7")
    expected = ["--kill-on-bad-exit=1", "launch/torchrun.sh", "demo", "--data.dir", f"{AWKWARD}%a"]
    assert json.loads(done.stdout.splitlines()[0]) == expected
    done = by_hand(tmp_path, "demo", "--out_dir", f"{AWKWARD}%a", SLURM_JOB_ID="7",
                   SLURM_ARRAY_TASK_ID="12")
    expected = [*expected[:3], "--out_dir", f"{AWKWARD}12"]
    assert json.loads(done.stdout.splitlines()[0]) == expected


def test_a_dry_run_prints_the_line_and_submits_nothing(tmp_path):
    arguments = ["--nodes=4", "--", "gpt2-124m", "--data.dir", AWKWARD]
    done = by_hand(tmp_path, *arguments, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sbatch --nodes=4 launch/slurm.sbatch gpt2-124m --data.dir ")
    line = ["sbatch", "--nodes=4", "launch/slurm.sbatch", *arguments[2:]]
    assert shlex.split(done.stdout) == line


@pytest.mark.parametrize("options", [["--array=1-3"], ["--array", "1-3"], ["-a", "1-3"], ["-a1-3"]])
def test_an_array_of_one_run_is_not_submitted(tmp_path, options):
    done = by_hand(tmp_path, *options, "--", "demo", "--seed", "1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", SAME_RUN)


def test_the_environment_can_ask_for_an_array_too(tmp_path):
    done = by_hand(tmp_path, "demo", SBATCH_ARRAY_INX="1-3")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", SAME_RUN)


def test_an_array_is_checked_as_its_first_task(tmp_path):
    done = by_hand(tmp_path, "--array=1-3", "--", "demo", "--seed", "%a")
    assert json.loads(done.stdout) == ["--array=1-3", "launch/slurm.sbatch", "demo", "--seed", "%a"]
    assert (tmp_path / "checked").read_text().split() == ["demo", "--seed", "1"]


def test_requeues_are_bounded(tmp_path):
    """launch/slurm.sbatch inside a job that is stopped for the third time."""
    tool(tmp_path, "srun", "#!/bin/sh\nexit 143\n")
    tool(tmp_path, "scontrol", '#!/bin/sh\necho "$1 JobState=RUNNING PreemptTime=None"\n')
    done = subprocess.run(
        ["bash", "launch/slurm.sbatch", "demo"], capture_output=True, text=True, cwd=ROOT,
        timeout=60, env=environment(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7",
                                    SLURM_RESTART_COUNT="2", MAX_REQUEUES="2"),
    )
    assert done.returncode == 2
    assert done.stderr == "error: requeued 2 times: MAX_REQUEUES allows no more\n"
    assert "requeue JobState" not in done.stdout
