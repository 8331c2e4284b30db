"""launch/slurm.sbatch on a real Slurm of two virtual nodes, brought up in seconds."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from model.gpt2 import GPTConfig
from tests.running import ROOT, flags, losses
from tests.slurm import Slurm, cluster, missing, wait_for
from train_gpt2 import train

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "Slurm is here")
SMALL = dict(steps=8, eval_every=8, save_every=8, dtype="fp64",
             model=GPTConfig(n_layer=1, n_head=1, n_embd=16, n_ctx=16))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def hold(run: Path, job: str, slurm: Slurm, step: int = 3) -> None:
    """Stops rank 0, named in the run folder's lock, once a step is done; SIGCONT lets it go on.

    So a run of a second is in its middle whenever Slurm gets round to its signal.
    """
    record = run / "metrics.jsonl"
    wait_for(lambda: record.exists() and len(losses(run)) >= step, 120, lambda: slurm.log(job))
    os.kill(rank_0(run), signal.SIGSTOP)


def rank_0(run: Path) -> int:
    return int((run / ".lock").read_text().split()[1])


def same_losses(one: Path, two: Path) -> None:
    """fp64: sums of another order, see test_tiny; zip also wants the same steps."""
    for (step, a), (same, b) in zip(losses(one), losses(two), strict=True):
        assert step == same
        assert a == pytest.approx(b, abs=1e-9)


def test_two_nodes_train_what_one_process_trains(slurm, tiny, tmp_path):
    config = tiny(name="two", micro_batch=6, **SMALL)
    job = slurm.submit("--nodes=2", arguments=flags(config))
    slurm.wait(job, "COMPLETED")
    log = slurm.log(job)
    assert "on 2 x CPU" in log
    train(tiny(name="one", **SMALL))
    same_losses(tmp_path / "two", tmp_path / "one")
    for node in ("node0", "node1"):
        assert [*(slurm.folder / "ranks" / node).glob("*/attempt_0/*/stdout.log")]


def test_preempted_it_saves_goes_back_to_the_queue_and_ends_the_same(slurm, tiny, tmp_path):
    run = tmp_path / "tiny"
    job = slurm.submit("--nodes=2", arguments=flags(tiny(micro_batch=6, **SMALL)))
    hold(run, job, slurm)
    urgent = slurm.run("sbatch", "--parsable", "-p", "urgent", "--nodes=2", "--exclusive",
                       f"--output={slurm.folder}/%j.log", "--wrap=true")
    slurm.wait(urgent, "COMPLETED")  # SIGCONT and SIGTERM came from Slurm
    assert (run / "STOPPED").read_text().startswith("stopped by SIGTERM at step")
    slurm.requeued(job)
    slurm.wait(job, "COMPLETED")
    assert slurm.show(job, "Restarts") == "1"
    assert f"from {run / 'checkpoints'}" in slurm.log(job)
    train(tiny(name="never stopped", **SMALL))
    same_losses(run, tmp_path / "never stopped")


def test_before_the_time_limit_it_saves_goes_back_and_ends_the_same(slurm, tiny, tmp_path):
    run = tmp_path / "tiny"
    job = slurm.submit("--time=60", arguments=flags(tiny(**SMALL)))
    hold(run, job, slurm)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=5")  # less than 300 s are left
    wait_for(lambda: "time is nearly up" in slurm.log(job), 90, lambda: slurm.log(job))
    os.kill(rank_0(run), signal.SIGCONT)
    wait_for((run / "STOPPED").exists, 60, lambda: slurm.log(job))
    assert (run / "STOPPED").read_text().startswith("stopped by SIGUSR1 at step")
    slurm.requeued(job, "TimeLimit=60")
    slurm.wait(job, "COMPLETED")
    assert slurm.show(job, "Restarts") == "1"
    train(tiny(name="never stopped", **SMALL))
    same_losses(run, tmp_path / "never stopped")


@pytest.mark.parametrize("name", ["HUP", "QUIT"])
def test_a_signal_to_the_batch_script_reaches_the_ranks(slurm, tiny, tmp_path, name):
    run = tmp_path / "tiny"
    job = slurm.submit(arguments=flags(tiny(**SMALL)))
    hold(run, job, slurm)
    slurm.run("scancel", "--batch", f"--signal={name}", job)
    os.kill(rank_0(run), signal.SIGCONT)
    wait_for((run / "STOPPED").exists, 60, lambda: slurm.log(job))
    assert (run / "STOPPED").read_text().startswith("stopped by SIGUSR1 at step")


def test_a_cancelled_job_stays_cancelled(slurm, tiny, tmp_path):
    run = tmp_path / "tiny"
    job = slurm.submit(arguments=flags(tiny(**SMALL)))
    hold(run, job, slurm)
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED")
    wait_for(lambda: not slurm.run("squeue", "-h", "-j", job), 60, lambda: slurm.log(job))
    assert slurm.show(job, "JobState") == "CANCELLED"
    assert (run / "STOPPED").exists()


def test_an_array_trains_two_seeds(slurm, tiny, tmp_path):
    config = flags(tiny(**SMALL))
    job = slurm.submit("--array=1-2", arguments=[*config, "--seed", "%a", "--name", "seed-%a"])
    slurm.wait(f"{job}_1", "COMPLETED")
    slurm.wait(f"{job}_2", "COMPLETED")
    one, two = losses(tmp_path / "seed-1"), losses(tmp_path / "seed-2")
    assert len(one) == len(two) == SMALL["steps"]
    assert one != two


def test_an_array_of_one_run_is_refused(slurm, tiny):
    job = slurm.submit("--array=1-2", arguments=flags(tiny(**SMALL)))
    slurm.wait(f"{job}_1", "FAILED")
    assert "every task of this array would be the same run" in slurm.log(str(int(job) + 1))


def test_flags_and_data_are_checked_before_the_queue(slurm, tmp_path):
    missing_data = ["demo", "--data.dir", str(tmp_path / "nowhere")]
    done = subprocess.run(
        ["bash", "launch/slurm.sbatch", "--nodes=2", "--", *missing_data],
        env=slurm.environment, capture_output=True, text=True, cwd=ROOT, timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no data in")
    assert slurm.run("squeue", "-h") == ""
