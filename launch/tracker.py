"""What a run says about itself: a console line a step, metrics.jsonl, and on request TensorBoard
and Weights & Biases.

metrics.jsonl holds one JSON object a line, each with `step` (finished updates) and `tokens`
(trained on until then), and any of train_loss lr grad_norm tokens_per_second mfu step_ms
memory_mib val_loss val_set hellaswag_acc hellaswag_acc_norm sample event diagnosis.
"""

import contextlib
import json
import math
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from launch import console
from launch.config import Tracking
from launch.errors import BadInput, Failed
from launch.files import atomic_write
from launch.world import World, peak_flops, peak_memory_mib

SKIPPED = 3  # steps before those that a profile records; in the last of them the profiler warms up


class Tracker:
    """Keeps the record of a run on rank 0; on the other ranks every call does nothing.

    description: what config.json holds. evaluations: the rows on record that have a validation
    loss, known on every rank. The MFU is left out where the card's peak isn't known.
    """

    def __init__(
        self, run: Path, world: World, description: dict[str, Any],
        evaluations: Iterable[dict[str, Any]] = (),
    ) -> None:
        config, resolved = description["config"], description["resolved"]
        peak = peak_flops(world.device, resolved["dtype"])
        self.world = world
        self.steps = config["steps"]
        self.batch_tokens = config["batch_tokens"]
        self.flops_per_token = resolved["flops_per_token"]
        self.peak_flops = peak * world.size if peak else None  # of all ranks
        evaluations = list(evaluations)
        self.evaluated_steps = {row["step"] for row in evaluations}
        # Step -> validation loss. A resumed run may have another validation set than before, and
        # losses of the two can't be compared.
        val_set = resolved.get("val_set")
        self.val_losses: dict[int, float] = {
            row["step"]: row["val_loss"] for row in evaluations if row.get("val_set") == val_set}
        self.last_seconds = 0.0  # of the latest step
        self.smooth_seconds = 0.0  # a step, for the first ones are slow
        self.eval_every = config.get("evaluation", {}).get("eval_every", self.steps)
        self.evaluation_seconds = 0.0  # of the latest evaluation; 0: there was none yet
        self.file: Any = None
        self.wandb: Any = None
        self.tensorboard: Any = None
        self.profiler: Any = None
        if world.is_rank0:
            self.path = run / "metrics.jsonl"
            self.file = self.path.open("a", buffering=1, encoding="utf-8")
            extra = config["tracker"]
            if extra["wandb"] != "disabled":
                self.wandb = _start_wandb(run, extra["wandb"], description)
            if extra.get("tensorboard"):
                last_step = max((row["step"] for row in read_rows(self.path)), default=-1)
                self.tensorboard = _start_tensorboard(run, last_step)
            if extra["profile"]:
                self.profiled = extra["profile"]  # steps
                self.profiler = _start_profiler(run, self.profiled)

    def log(self, step: int, **values: Any) -> None:
        """Appends a row; values that are None are left out."""
        if "val_loss" in values:
            self.evaluated_steps.add(step)
            self.val_losses[step] = values["val_loss"]
        if not self.file:
            return
        row = {"step": step, "tokens": step * self.batch_tokens}
        row |= {key: value for key, value in values.items() if _can_be_written(value)}
        try:
            self.file.write(json.dumps(row, allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:  # a row is not worth a run
            self.world.print0(console.warning(
                f"metrics.jsonl misses step {step}: {error.strerror}"))
        if self.wandb:
            self.wandb.log(row)  # its own step only ever grows: a rollback's rows would be lost
        if self.tensorboard:
            self._log_to_tensorboard(row)

    def _log_to_tensorboard(self, row: dict[str, Any]) -> None:
        try:
            for key, value in row.items():
                if isinstance(value, str):
                    self.tensorboard.add_text(key, value, row["step"])
                elif key not in ("step", "diagnosis"):  # hundreds of figures: eval.report's
                    self.tensorboard.add_scalar(key, value, row["step"])
        except OSError as error:
            self.world.print0(f"warning: TensorBoard gets no more rows: {error.strerror}")
            self.tensorboard = None

    def log_event(self, step: int, text: str, **values: Any) -> None:
        """Prints what happened, and logs it with these values."""
        self.world.print0(text)
        self.log(step, event=text, **values)

    def log_step(
        self, step: int, *, loss: float, lr: float, norm: float, seconds: float,
        diagnosis: dict[str, Any] | None = None,
    ) -> None:
        """Logs a training step and prints its line. seconds: of this step alone.

        diagnosis: what model/diagnostics.py found in it, if it was recorded.
        """
        self.last_seconds = seconds
        if self.smooth_seconds:
            self.smooth_seconds = 0.8 * self.smooth_seconds + 0.2 * seconds
        else:
            self.smooth_seconds = seconds
        rate = self.batch_tokens / seconds
        mfu = None
        if self.peak_flops:
            mfu = rate * self.flops_per_token / self.peak_flops
        self.log(
            step, train_loss=loss, lr=lr, grad_norm=norm, tokens_per_second=round(rate, 1),
            mfu=mfu and round(mfu, 4), step_ms=round(seconds * 1e3, 2),
            memory_mib=peak_memory_mib(self.world.device), diagnosis=diagnosis,
        )
        eta = clock(self.seconds_left(step))
        share = "n/a" if mfu is None else f"{mfu:.1%}"
        self.world.print0(
            f"step {step:6d}/{self.steps} | loss {loss:7.4f} | lr {lr:.2e} | norm {norm:6.2f} | "
            f"{seconds * 1e3:7.0f} ms | {rate:9,.0f} tok/s | mfu {share:>5} | eta {eta}"
        )

    def step_launched(self) -> None:
        """All of a step has been asked of the device: for a profile, which has whole steps."""
        if self.profiler:
            _next_step(self.profiler, self.profiled, self.world.device)

    def best_step(self) -> int | None:
        """The step of the lowest validation loss on record, the first of equal ones."""
        return min(sorted(self.val_losses), key=self.val_losses.__getitem__, default=None)

    def seconds_left(self, step: int) -> float:
        """What the run takes from here to its end: its steps, and the evaluations after `step`, in
        between and at the end."""
        first = math.ceil(step / self.eval_every) * self.eval_every
        evaluations = len(range(first, self.steps, self.eval_every)) + 1
        steps = self.steps - step
        return steps * self.smooth_seconds + evaluations * self.evaluation_seconds

    def drop_after(self, step: int) -> None:
        """Drops the rows past `step`, to which the run has returned."""
        self.evaluated_steps = {s for s in self.evaluated_steps if s <= step}
        self.val_losses = {s: loss for s, loss in self.val_losses.items() if s <= step}
        if self.file:
            try:
                self.file.close()
                cut_after(self.path, step)
            except OSError as error:  # a row too many is not worth a run
                self.world.print0(f"warning: metrics.jsonl keeps rows past step {step}: "
                                  f"{error.strerror}")
            self.file = self.path.open("a", buffering=1, encoding="utf-8")
        if self.tensorboard:
            self.tensorboard.close()
            self.tensorboard = _start_tensorboard(self.path.parent, step)

    def close(self) -> None:
        """Closes the file, and the wandb run."""
        if not self.file:
            return
        with contextlib.suppress(OSError):
            self.file.close()
        if self.profiler:
            self.profiler.stop()
            if not (self.path.parent / "profile" / "trace.json").exists():
                self.world.print0("no profile: it takes three steps more than --profile says")
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            with contextlib.suppress(OSError):
                self.tensorboard.close()


def _can_be_written(value: Any) -> bool:
    """None is left out, and so are infinities and NaN, which JSON doesn't have."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def clock(seconds: float) -> str:
    """4210 -> '1h10m'; 75 -> '1m15s'."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s"


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a half-written last line (the power went) is left out."""
    rows = []
    for line in path.read_text("utf-8-sig").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def cut_after(path: Path, step: int) -> None:
    """Drops rows past `step`: a resumed run writes them again."""
    rows = read_rows(path)
    if rows:
        kept = [row for row in rows if row["step"] <= step]
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept))


def _start_wandb(run: Path, mode: Tracking, config: dict) -> Any:
    """A new wandb run, or the one that this folder has had since its first start."""
    try:
        import wandb
    except ImportError:
        raise BadInput("--wandb needs the wandb package: pip install wandb") from None
    id_file = run / "wandb_id"
    if not id_file.exists():
        # wandb refuses / \ # ? % : in an id.
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", run.name)
        atomic_write(id_file, f"{name}-{time.time_ns():x}")
    try:
        started = wandb.init(
            project="gpt2", name=run.name, id=id_file.read_text(encoding="utf-8"),
            resume="allow", mode=mode, dir=str(run), config=config,
        )
        started.define_metric("step")
        started.define_metric("*", step_metric="step")
        return started
    except wandb.errors.AuthenticationError as error:
        raise Failed(f"wandb: {error}; `wandb login` first, or --wandb offline") from None
    except (wandb.errors.Error, ValueError) as error:
        raise Failed(f"wandb: {error}; --wandb disabled goes without") from None


def _start_tensorboard(run: Path, last_step: int) -> Any:
    """A writer into the run folder's tensorboard/.

    Whatever earlier writers put there past last_step, TensorBoard hides: it's trained again.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput("--tensorboard needs the tensorboard package: pip install -c "
                       "constraints.txt -e '.[tensorboard]'") from None
    folder = str(run / "tensorboard")
    return SummaryWriter(folder, purge_step=last_step + 1, flush_secs=10)


def _start_profiler(run: Path, steps: int) -> Any:
    """A torch.profiler that skips some steps, warms up in the last of them and records `steps`.

    The trace (open it in ui.perfetto.dev) is written to the run folder's profile/trace.json.
    """
    from torch import profiler

    def write(finished: profiler.profile) -> None:
        path = run / "profile" / "trace.json"
        path.parent.mkdir(exist_ok=True)
        finished.export_chrome_trace(str(path))
        print(f"profile of {steps} steps: {path}", flush=True)

    schedule = profiler.schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
    started = profiler.profile(schedule=schedule, on_trace_ready=write)
    started.start()
    return started


def _next_step(profiler: Any, steps: int, device: torch.device) -> None:
    """Tells the profiler that a step has been launched. A GPU is behind: where the record begins
    and ends it is waited for, or there would be a part of one step too many in it."""
    if device.type == "cuda" and profiler.step_num + 1 in (SKIPPED, SKIPPED + steps):
        torch.cuda.synchronize(device)
    profiler.step()
