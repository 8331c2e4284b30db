"""Steps that would do harm: a loss that is no number, a gradient that explodes, a poisoned batch.

Each step is judged before the weights change, on the norm of the whole gradient and the mean loss,
which are the same on every rank: so all ranks come to the same judgement without a word. A rank
that judged its own loss would leave the others waiting. Either is too much where it lies more than
7 standard deviations above its mean over the last 128 good steps (llm.c's outlier detector). The
norm alone isn't enough: noise instead of text raised a loss from 2.8 to 10.8 at a usual norm.
Before there are 128, losses and norms fall by nature: from the 10th good step on, ten times the
median of those there are is too much of either.

    --on_spike skip      the step's gradient is thrown away, and the run goes on
    --on_spike rollback  the run returns to its newest checkpoint, and the batches from there to
                         here are left out (PaLM, arXiv 2204.02311, section 5.1)
    --on_spike stop      the run ends, nothing saved since
    --on_spike ignore    explosions are applied; what is no number still ends the run
"""

import math
import statistics
from collections import deque
from typing import Any

from launch.config import SpikeConfig

WINDOW = 128  # steps that make the normal range (llm.c, llmc/outlier_detector.h)
Z = 7.0  # standard deviations that are too many (llm.c, scripts/run_gpt3_125M.sh: -sl 7 -sg 7)
EARLY_STEPS = 10  # good steps from which on the first ones are judged, too
EARLY_TIMES = 10.0  # their median: norms of 99 and 161 were seen after a median near 2
NARROWEST = 0.01  # of the mean: a smaller deviation is taken for this, or a calm run would spike


class SpikeDetector:
    """Remembers losses and norms of good steps and says what is wrong with a bad one."""

    def __init__(self, config: SpikeConfig) -> None:
        self.policy = config.on_spike
        self.max_in_a_row = config.max_spikes
        self.losses: deque[float] = deque(maxlen=WINDOW)  # of good steps
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.total = 0  # bad steps in the run
        self.in_a_row = 0  # bad steps since a good one, not counting the way back after a rollback
        self.streak = 0  # the latest steps that were all bad: the weights are as before them
        self.last = -1  # the last bad step

    def check(self, step: int, loss: float, norm: float) -> str:
        """What is wrong with a step, in a few words; '' for a good one, which is remembered."""
        problem = self._problem(loss, norm)
        if problem:
            self.total += 1
            self.in_a_row += 1
            self.streak += 1
            self.last = step
        else:
            self.losses.append(loss)
            self.norms.append(norm)
            self.streak = 0
            if step > self.last:  # and not on the way back to it after a rollback
                self.in_a_row = 0
        return problem

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
        return {"losses": list(self.losses), "norms": list(self.norms), "spikes": self.total,
                "in_a_row": self.in_a_row, "last_spike": self.last, "streak": self.streak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what state_dict() gave."""
        self.rewind(state)
        self.total = state["spikes"]
        self.in_a_row = state["in_a_row"]
        self.last = state["last_spike"]

    def rewind(self, state: dict[str, Any]) -> None:
        """Puts back what belongs to the weights, and that alone: after a rollback the spikes still
        count."""
        self.losses = deque(state["losses"], maxlen=WINDOW)
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.streak = state.get("streak", 0)  # older runs didn't keep it

    def _problem(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        if self.policy == "ignore":
            return ""
        problem = _outlier("the loss", loss, self.losses)
        if not problem and self.streak and len(self.norms) < WINDOW:
            # The first steps' norms jump, and the clip bears it. Where a step was just left out,
            # and the same weights have a large gradient in the next batch too, they would have it
            # in every batch: the step is taken.
            return ""
        return problem or _outlier("the gradient's norm", norm, self.norms)


def _outlier(what: str, value: float, window: deque[float]) -> str:
    """Says so where a value lies too far above the others."""
    if len(window) < EARLY_STEPS:
        return ""
    if len(window) < WINDOW:
        median = statistics.median(window)
        if value <= EARLY_TIMES * median:
            return ""
        return (f"{what} {value:.4g} is {value / median:.0f} times {median:.4g}, the median of "
                f"the first {len(window)} steps")
    mean, deviation = statistics.fmean(window), statistics.pstdev(window)
    z = (value - mean) / max(deviation, NARROWEST * mean)
    if z <= Z:
        return ""
    return (f"{what} {value:.4g} lies {z:.1f} standard deviations above {mean:.4g}, the mean of "
            f"the last {WINDOW} steps")
