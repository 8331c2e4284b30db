"""Steps that would do harm: a loss that is no number, a gradient that explodes, a poisoned batch.

Each step is judged before the weights change, on the norm of the whole gradient and the mean loss,
which are the same on every rank: so all ranks come to the same judgement without a word. A rank
that judged its own loss would leave the others waiting. Either is too much where it lies more than
7 standard deviations above its mean over the last 128 good steps (llm.c's outlier detector). The
norm alone isn't enough: noise instead of text raised a loss from 2.8 to 10.8 at a usual norm.
Before there are 128, losses and norms fall by nature: from the 10th good step on, ten times the
median of those there are is too much of either. Of large norms beside usual losses one is left
out: where the next batch has one, too, the weights have come to where gradients are large, and a
run that left all of them out would stand still. Up to ten times the mean the clip bears them.

A GPU judges by itself (kernels/verdict.py, in fp64) and leaves a bad step out, before this process
knows of it: launch/reports.py brings the verdict here a step later, and what follows then is what
would have followed at once. Where that is more than a skipped step, the GPU leaves out every step
after it until it has been done.

    --on_spike skip      the step's gradient is thrown away, and the run goes on
    --on_spike rollback  the run returns to its newest checkpoint, and the batches from there to
                         here are left out (PaLM, arXiv 2204.02311, section 5.1)
    --on_spike stop      the run ends, nothing saved since
    --on_spike ignore    explosions are applied; what is no number still ends the run
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import selfcheck, verdict
from launch.config import SpikeConfig

WINDOW = 128  # steps that make the normal range (llm.c, llmc/outlier_detector.h)
Z = 7.0  # standard deviations that are too many (llm.c, scripts/run_gpt3_125M.sh: -sl 7 -sg 7)
EARLY_STEPS = 10  # good steps from which on the first ones are judged, too
EARLY_TIMES = 10.0  # their median: norms of 99 and 161 were seen after a median near 2
NARROWEST = 0.01  # of the mean: a smaller deviation is taken for this, or a calm run would spike


class Verdict(NamedTuple):
    """What a step is, on the device that computed it."""

    report: Tensor  # (6,) fp64, kernels/verdict.py
    skip: Tensor  # fp32 scalar: 1 where the step must not be applied, else 0
    divisor: Tensor  # fp32 scalar: divides the gradients, for their norm to be at most the clip
    norm: Tensor  # of the whole gradient
    clip: float


class SpikeDetector:
    """Remembers losses and norms of good steps and says what is wrong with a bad one.

    device: where steps are judged. judge: kernels.verdict.judge_step, or the kernel that does it
    in one launch.
    """

    def __init__(
        self, config: SpikeConfig, device: torch.device | str = "cpu",
        judge: Any = verdict.judge_step,
    ) -> None:
        self.policy = config.on_spike
        self.max_in_a_row = config.max_spikes
        self.judge_step = judge
        self.limits = verdict.Limits(
            Z, NARROWEST, EARLY_STEPS, EARLY_TIMES, outliers=self.policy != "ignore",
            halts=self.policy != "skip",
        )
        # The windows of good steps and the streak, as kernels/verdict.py has them.
        self.state = torch.zeros(2 * WINDOW + 3, dtype=torch.float64, device=device)
        self.total = 0  # bad steps in the run
        self.in_a_row = 0  # bad steps since a good one, not counting the way back after a rollback
        self.streak = 0  # the latest steps that were all bad: the weights are as before them
        self.last = -1  # the last bad step

    def judge(
        self, loss: Tensor, norm: Tensor, clip: float = 0.0, flags: Tensor | None = None
    ) -> Verdict:
        """Judges a step by the mean loss and the norm, scalars; remembers a good one. Doesn't wait.

        clip: the largest norm, 0: any. flags: (2 or more,) fp64, not 0 where the step's data can't
        be read, and where fp16's scale was too large.
        """
        device, full_norm = self.state.device, norm
        if norm.device != device:  # waits, once
            loss, norm = torch.stack((loss.to(norm.device), norm)).to(device)
        self.state, report, skip, divisor = self.judge_step(
            self.state, loss, norm, flags, clip or math.inf, self.limits)
        return Verdict(report, skip, divisor, full_norm, clip)

    def hear(self, step: int, report: list[float]) -> str:
        """Takes note of a verdict's report, step by step in their order: what is wrong with the
        step, in a few words, or '' for a good one."""
        problem = _words(report)
        if problem:
            self.total += 1
            self.in_a_row += 1
            self.streak += 1
            self.last = step
        elif report[0] == verdict.GOOD:
            self.streak = 0
            if step > self.last:  # and not on the way back to it after a rollback
                self.in_a_row = 0
        return problem

    def check(self, step: int, loss: float, norm: float) -> str:
        """Judges a step and hears of it at once."""
        numbers = torch.tensor((loss, norm), dtype=torch.float64)
        return self.hear(step, self.judge(*numbers).report.tolist())

    def reason_to_end(self, step: int, problem: str, loss: float, norm: float) -> str:
        """Why the policy, or too many bad steps in a row, end the run; '' where they don't."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        if (
            self.policy == "stop"
            or self.policy == "ignore" and not finite
            or self.in_a_row > self.max_in_a_row
        ):
            return (f"step {step}: {problem}; the run ends (--on_spike {self.policy}, "
                    f"{self.in_a_row} in a row with --max_spikes {self.max_in_a_row}). A lower "
                    "--optim.lr or another --seed may get past it")
        return ""

    def state_dict(self) -> dict[str, Any]:
        """For state.json: a run that goes on judges as if it had never stopped."""
        state = self.state.tolist()
        count = int(state[2 * WINDOW + verdict.COUNT])
        losses, norms = state[:WINDOW], state[WINDOW : 2 * WINDOW]
        return {"losses": losses[WINDOW - count :], "norms": norms[WINDOW - count :],
                "spikes": self.total, "in_a_row": self.in_a_row, "last_spike": self.last,
                "streak": self.streak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what state_dict() gave."""
        self.rewind(state)
        self.total = state["spikes"]
        self.in_a_row = state["in_a_row"]
        self.last = state["last_spike"]

    def rewind(self, state: dict[str, Any]) -> None:
        """Puts back what belongs to the weights, and that alone: after a rollback the spikes still
        count. Steps are applied again."""
        self.streak = state.get("streak", 0)  # older runs didn't keep it
        count = len(state["losses"])
        missing = [0.0] * (WINDOW - count)
        windows = [*missing, *state["losses"], *missing, *state["norms"]]
        counts = [float(count), float(self.streak), 0.0]
        self.state.copy_(torch.tensor(windows + counts, dtype=torch.float64))


def spike_detector(config: SpikeConfig, device: torch.device) -> SpikeDetector:
    """A new one that judges on this device, by the kernel where that has the definition's bits."""
    judge, line = selfcheck.checked_judge(device)
    if line:
        print(line, flush=True)
    return SpikeDetector(config, device, judge)


def _words(report: list[float]) -> str:
    """What a report says of a bad step; '' of a good one, and of one that is no spike."""
    code, loss, norm, far, origin, count = report
    if code == verdict.LOSS_NOT_FINITE:
        return f"the loss is {loss}"
    if code == verdict.NORM_NOT_FINITE:
        return f"the gradient's norm is {norm}"
    if code not in (verdict.LOSS_HIGH, verdict.NORM_HIGH):
        return ""
    what, value = "the gradient's norm", norm
    if code == verdict.LOSS_HIGH:
        what, value = "the loss", loss
    if count < WINDOW:
        return (f"{what} {value:.4g} is {far:.0f} times {origin:.4g}, the median of "
                f"the first {count:.0f} steps")
    return (f"{what} {value:.4g} lies {math.sqrt(far):.1f} standard deviations above {origin:.4g}, "
            f"the mean of the last {WINDOW} steps")
