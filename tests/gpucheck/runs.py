"""Parts that run the program, as it is, and read what it leaves.

Each takes the check's settings and a folder of its own, and returns what it measured by name.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.errors import Failed
from launch.tracker import read_rows
from tests.gpucheck import trace
from tests.gpucheck.settings import Settings
from tests.running import ROOT, losses

LOSSES = 20  # steps that are compared
# Between losses of the same step, in bf16 on the GPU and in fp32 on the CPU. Tried on a CPU, with
# steps of 256 tokens: where all that the products take and give was rounded to bf16, losses were
# off by 0.0007 at most; where one block's attention had no gradient, by 0.039. This is 14 times the
# one and a quarter of the other.
TOLERANCE = 0.01
WARM = 20  # steps that aren't timed: among them what compiles, and those that are recorded
TIMED = 60
RECORDED = 5  # steps in the profiler's trace


def program(
    settings: Settings, folder: Path, *flags: str, name: str = "run", ranks: int = 1, **more: str
) -> Path:
    """A run of the program in a process of its own, or one a rank: its folder. more: of the
    environment. Raises Failed."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*start, str(ROOT / "train_gpt2.py"), *settings.flags(), "--out_dir", str(folder),
               "--name", name, *flags]
    with (folder / f"{name}.log").open("w+") as log:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | more, stdout=log,
                              stderr=subprocess.STDOUT)
        log.seek(0)
        last = log.read().strip().splitlines()[-1:]
    if done.returncode:
        raise Failed(f"train_gpt2.py, {name}: {''.join(last)}")
    shutil.rmtree(folder / name / "checkpoints")  # 1.5 GB each
    return folder / name


def first_losses(settings: Settings, folder: Path) -> dict[str, Any]:
    """The first losses of training, on the GPU and on the CPU in fp32: on the same batches, for
    they follow from the seed. One sequence a step: what a CPU computes in a second or a few."""
    T = str(settings.model.n_ctx)
    flags = ("--steps", str(LOSSES), "--batch_tokens", T, "--micro_batch", "1", "--val_tokens", T,
             "--eval_every", str(LOSSES), "--save_every", str(LOSSES))
    on_gpu = [loss for _, loss in losses(program(settings, folder, *flags, name="gpu"))]
    on_cpu = [loss for _, loss in losses(program(
        settings, folder, *flags, "--dtype", "fp32", name="cpu",
        CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES=""))]
    return compare_losses(on_gpu, on_cpu)


def compare_losses(on_gpu: list[float], on_cpu: list[float]) -> dict[str, Any]:
    """How far they are apart at most. Raises Failed where one is missing."""
    if not len(on_gpu) == len(on_cpu) == LOSSES:
        raise Failed(f"{len(on_gpu)} losses on the GPU and {len(on_cpu)} on the CPU, expected "
                         f"{LOSSES} each")
    differences = [abs(a - b) for a, b in zip(on_gpu, on_cpu, strict=True)]
    difference = max(differences, key=lambda x: (math.isnan(x), x))  # a NaN is the farthest
    found: dict[str, Any] = {"difference": difference, "gpu": on_gpu, "cpu": on_cpu}
    if not difference <= TOLERANCE:
        found["fault"] = (f"losses of a step differ by {difference:.3f} from the CPU's, and "
                          f"{TOLERANCE} at most is right")
    return found


def steps(settings: Settings, folder: Path, ranks: int = 1) -> dict[str, Any]:
    """The speed of training on `ranks` GPUs, its memory, and what a trace says of some steps."""
    total, batch_tokens = WARM + TIMED, settings.batch * settings.model.n_ctx * ranks
    run = program(settings, folder, "--steps", str(total), "--batch_tokens", str(batch_tokens),
                  "--micro_batch", str(settings.batch), "--profile", str(RECORDED),
                  "--eval_every", str(total), "--save_every", str(total),
                  "--val_tokens", str(settings.model.n_ctx * settings.batch), ranks=ranks)
    found = speed([row for row in read_rows(run / "metrics.jsonl") if "step_ms" in row],
                  batch_tokens)
    found["said"] = what_was_chosen((folder / "run.log").read_text())
    try:
        events = trace.read(run / "profile" / "trace.json")
    except (OSError, ValueError) as problem:
        return found | {"fault": f"no trace: {problem}"}
    return found | {"idle": trace.idle_share(events),
                    "launches": trace.launches(events, RECORDED),
                    "times": trace.milliseconds(events, RECORDED)}


def steps_on_all(settings: Settings, folder: Path) -> dict[str, Any]:
    """The same on every GPU, under torchrun."""
    return steps(settings, folder, settings.gpus)


def speed(rows: list[dict[str, Any]], batch_tokens: int) -> dict[str, Any]:
    """Of the last TIMED steps of a run's metrics.jsonl. Raises Failed where some are missing.
    """
    timed = rows[-TIMED:]
    if len(timed) < TIMED:
        raise Failed(f"{len(timed)} steps are on record, expected {TIMED}")
    seconds = sum(row["step_ms"] for row in timed) / 1e3 / TIMED
    found = {"step_ms": 1e3 * seconds, "tokens_per_second": batch_tokens / seconds}
    if "mfu" in timed[0]:
        found["mfu"] = sum(row["mfu"] * row["step_ms"] for row in timed) / 1e3 / (TIMED * seconds)
    if "memory_mib" in timed[0]:
        found["peak_mib"] = timed[-1]["memory_mib"]
    return found


def what_was_chosen(log: str) -> list[str]:
    """The lines in which a run says who computes its operators."""
    return [line for line in log.splitlines()
            if line.startswith(("kernels:", "tiles:", "attention:", "blocks:", "warning:"))]

