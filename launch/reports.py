"""What became of each step: heard at once on a CPU, and on GPUs a step late.

A GPU judges a step and applies it or leaves it out (launch/spikes.py); a host that waited for its
loss would leave it idle until the next kernels come. So the report of a step, six numbers, is
copied to pinned memory without waiting, and read when the step after it has been launched. Before
anything that needs the weights of this very step (an evaluation, a save) all reports are heard.

Between ranks one small sum goes with each step, of the losses and of two wishes: that some rank was
told to stop, and that some rank's data can't be read. Nobody waits for it either.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import verdict
from launch import recovery
from launch.errors import BadInput
from launch.spikes import Verdict
from launch.world import World


class Beginning(NamedTuple):
    """Of a step's time."""

    seconds: float  # of time.perf_counter()
    event: Any  # a CUDA event: where the GPU was ready for it, or ended the step before; or None


@dataclass
class Report:
    """Of one step, on its way to the host."""

    step: int  # finished steps before it
    numbers: Tensor  # fp64: kernels/verdict.py's six; ranks told to stop; fp16's scale
    arrived: Any  # a CUDA event behind the copy; None: the numbers are there
    lr: float
    began: Beginning


class StepReports:
    """The reports of the steps that the host hasn't heard of.

    late: steps by which the host hears of them, 1 where GPUs judge and leave out steps by
    themselves, else 0.
    """

    def __init__(self, world: World, late: int) -> None:
        self.world, self.late = world, late
        self.pending: deque[Report] = deque()
        self.heard_at = 0.0  # when the latest report was
        self.stop = False  # a rank was told to stop: the same on all ranks
        self.data_error: BadInput | None = None  # what this rank's data have in the latest step

    def judge(self, run: Any, loss: Tensor, norm: Tensor) -> Verdict:
        """Judges a step on the device, without waiting for it. loss: this rank's; norm: the
        gradient's. run: train_gpt2.py's Run."""
        scaler, clip = run.state.scaler, run.config.optim.clip
        loss, flags = self._over_ranks(loss, run.signals.received)
        if flags is None and not scaler.enabled:
            return run.spikes.judge(loss, norm, clip)
        judged_on = run.spikes.state.device  # the CPU, where a GPU doesn't decide
        if flags is None:
            flags = torch.zeros(3, dtype=torch.float64, device=judged_on)
        flags = flags.to(judged_on)
        if scaler.enabled:
            flags[1] = scaler.update(loss, norm)
        verdict = run.spikes.judge(loss, norm, clip, flags)
        scale = scaler.numbers().to(judged_on).double()
        return verdict._replace(report=torch.cat((verdict.report, flags[2:], scale)))

    def begin(self) -> Beginning:
        """A step begins. On a GPU its time is the GPU's: the host, which hears of it later and
        perhaps of two at once, can't say how long one was."""
        event = None
        if self.late and self.world.device.type == "cuda":
            event = self.pending[-1].arrived if self.pending else None
            if not event:
                event = torch.cuda.Event(enable_timing=True)
                event.record()
        return Beginning(time.perf_counter(), event)

    def put(self, step: int, verdict: Verdict, lr: float, began: Beginning) -> None:
        """Sends a step's report on its way. step: finished ones before it."""
        numbers, arrived = verdict.report, None
        if numbers.is_cuda:
            pinned = torch.empty(len(numbers), dtype=torch.float64, pin_memory=True)
            numbers = pinned.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event(enable_timing=True)
            arrived.record()
        self.pending.append(Report(step, numbers, arrived, lr, began))

    def settle(self, run: Any, step: int, everything: bool) -> tuple[int, bool]:
        """What became of the steps before `step`: (the step to go on with, whether to stop). A bad
        one is reported, or led to a rollback, or to Failed. All ranks call it together.

        everything: of all of them. Else a GPU's latest step may be heard of next time.
        """
        step = self._hear(run, step, everything)
        ask = everything or self.stop or not self.late
        if run.signals.stop_requested(ask):
            return self._hear(run, step, everything=True), True
        return step, False

    def _hear(self, run: Any, step: int, everything: bool) -> int:
        while len(self.pending) > (0 if everything else self.late):
            report = self.pending.popleft()
            next_step = self._follow(run, report)
            if next_step != report.step + 1:  # rolled back: those that were launched are void
                self.pending.clear()
                return next_step
        return step

    def _follow(self, run: Any, report: Report) -> int:
        """Does what a report asks for; returns the step to go on with."""
        if report.arrived:
            report.arrived.synchronize()  # the device has a step's work left
        step, numbers = report.step, report.numbers.tolist()
        code, loss, norm = numbers[:3]
        seconds = self._seconds(report)
        self.stop |= any(numbers[6:7])
        if code == verdict.FAULT:
            recovery.stop_for_data(run, step)
        if code == verdict.OVERFLOW:
            scale, _good_steps, in_a_row = numbers[-3:]
            line = run.state.scaler.describe_overflow(scale, in_a_row)
            run.tracker.log_event(step + 1, f"step {step + 1}: {line}")
        elif problem := run.spikes.hear(step, numbers[:6]):
            # --on_spike: step + 1, or a checkpoint's, without the batches since, or Failed.
            return recovery.after_bad_step(run, step, problem, loss, norm)
        else:
            run.tracker.log_step(step + 1, loss=loss, lr=report.lr, norm=norm, seconds=seconds,
                                 diagnosis=run.watch.take(step + 1))
        return step + 1

    def _seconds(self, report: Report) -> float:
        """How long a step took whose report is here."""
        now = time.perf_counter()
        before, self.heard_at = max(report.began.seconds, self.heard_at), now
        if report.arrived:
            return report.began.event.elapsed_time(report.arrived) / 1e3
        return now - before

    def _over_ranks(self, loss: Tensor, told_to_stop: int) -> tuple[Tensor, Tensor | None]:
        """(the mean loss over the ranks; whether any rank's data can't be read, room for fp16's
        overflow, and whether any was told to stop), on the device. One rank without a fault: None.
        """
        wishes = (0.0, float(self.data_error is not None), 0.0, float(told_to_stop > 0))
        if self.world.size == 1 and not self.data_error:
            return loss, None
        told = torch.tensor(wishes, dtype=torch.float64)
        if self.world.device.type == "cuda":  # from pinned memory it goes without a wait
            told = told.pin_memory().to(self.world.device, non_blocking=True)
        told[0] = loss
        self.world.add_over_ranks(told)
        return told[0] / self.world.size, told[1:]
