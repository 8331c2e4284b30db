"""Is a run on track? Its losses against a published curve's at the same number of tokens.

A validation loss is judged where the curve has one: from its first point after 0 tokens (step 250)
to its end. It is off where it differs by more than the expected noise: that of seeds
(curves.py) and what the interpolation between published points may be wrong by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from eval.report.causes import different_settings, usual_causes
from eval.report.curves import (
    CURVES,
    LOCAL_FILES,
    SAME_DATA,
    TRAIN_NOISE,
    TRAIN_WINDOW,
    VAL_TOKENS,
    Curve,
    curve_of_shape,
    data_name,
    interpolate,
    named_curve,
    same_train_data,
    same_val_set,
    seed_noise,
)
from eval.report.record import Record
from launch.errors import BadInput

Status = Literal["on track", "off", "too early", "not compared"]


class Comparison(NamedTuple):
    """One loss beside the published one, at the same tokens."""

    what: str
    step: int
    tokens: int
    loss: float
    published: float
    noise: float  # expected, either way

    @property
    def difference(self) -> float:
        """Above 0: worse than the published run."""
        return self.loss - self.published


@dataclass(frozen=True)
class Verdict:
    """What can be said of a run, and why.

    val_curve and train_curve are the published run whose losses may be drawn beside this one's, or
    None.
    """

    status: Status
    headline: str
    val_curve: Curve | None
    train_curve: Curve | None
    comparisons: list[Comparison]
    notes: list[str]
    causes: list[str]


def judge(record: Record, against: str = "") -> Verdict:
    """Compares a run with a published curve: the one of this name, or of its model's shape.

    Raises BadInput for an unknown name, and where the named curve is of other data than the run.
    """
    curve = named_curve(against) if against else curve_of_shape(record.settings("model"))
    if curve is None:
        headline = (f"not compared with a published curve: none is of its shape (there are "
                    f"{_names()})")
        return Verdict("not compared", headline, None, None, [], [], [])
    reason = other_data(record, curve, bool(against))
    if reason and against:
        raise BadInput(f"{record.path} can't be compared with {against}: {reason}; what counts is "
                       f"{', '.join((*SAME_DATA, LOCAL_FILES))}, {VAL_TOKENS:,} tokens")
    train_curve, comparisons = None, []
    if curve.train and same_train_data(record.val_set, bool(against)):
        train_curve = curve
        comparisons = compare_training(record, curve)
    notes = different_settings(record, curve)
    if data_name(record.val_set) == LOCAL_FILES and not reason:
        notes.insert(0, "The data set is taken at its word: nothing tells which files they were.")
    if reason:
        headline = f"not compared with a published curve: {reason}"
        return Verdict("not compared", headline, None, train_curve, comparisons, notes, [])
    return _judge_validation(record, curve, train_curve, comparisons, notes)


def quiet_lines(entries: Sequence[tuple[Record, Verdict | None]]) -> list[str]:
    """Why runs were not judged by a published curve: a line a reason, with names if not all's."""
    names: dict[str, list[str]] = {}
    for record, verdict in entries:
        if verdict and not verdict.comparisons:
            names.setdefault(verdict.headline, []).append(record.name)
    lines = []
    for headline, of in names.items():
        if len(of) == len(entries):
            lines.append(headline[0].upper() + headline[1:])
        else:
            lines.append(f"{', '.join(of)}: {headline}")
    return lines


def other_data(record: Record, curve: Curve, named: bool) -> str:
    """Why the validation losses can't be compared; "" where they can."""
    val_set = record.val_set
    if same_val_set(val_set, trust_local_files=named):
        return ""
    reason = "this run names no validation set"
    if val_set:
        reason = f"this run is validated on {val_set}"
    reason += f", and {curve.key} on the first {VAL_TOKENS:,} tokens of FineWeb's sample-10BT"
    if same_val_set(val_set, trust_local_files=True):
        reason += f" (if that is what the local files hold: --against {curve.key})"
    return reason


def expected(curve: Curve, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the published validation loss, the expected noise) at any tokens, NaN where unknown."""
    published, error = interpolate(curve.val, tokens)
    return published, seed_noise(tokens) + error


def compare_training(record: Record, curve: Curve) -> list[Comparison]:
    """The mean of the newest TRAIN_WINDOW of training losses, where there are enough of them."""
    series, batch_tokens = record.series("train_loss"), record.config.get("batch_tokens")
    if curve.train is None or not isinstance(batch_tokens, int):
        return []
    inside = series.tokens <= curve.train.tokens[-1]
    end = series.tokens[inside].max(initial=0)
    window = inside & (series.tokens > end - TRAIN_WINDOW)
    published, error = interpolate(curve.train, end)
    if window.sum() * batch_tokens < TRAIN_WINDOW or not np.isfinite(published):
        return []
    return [Comparison(
        what="training loss, mean of 50 steps",
        step=int(series.steps[inside].max()),
        tokens=int(end),
        loss=float(series.values[window].mean()),
        published=float(published),
        noise=float(seed_noise(end) + error + TRAIN_NOISE),
    )]


def _judge_validation(
    record: Record, curve: Curve, train_curve: Curve | None, comparisons: list[Comparison],
    notes: list[str],
) -> Verdict:
    """The verdict on a run whose validation set is the curve's."""
    series = record.series("val_loss")
    published, noise = expected(curve, series.tokens)
    known = np.isfinite(published)
    if not known.any():
        start, end = curve.val.tokens[curve.val.tokens > 0][[0, -1]]
        headline = (f"too early to say: no validation loss between {int(start):,} and "
                    f"{int(end):,} tokens, where {curve.title}'s are known")
        return Verdict("too early", headline, curve, train_curve, comparisons, notes, [])
    if not known[-1]:
        notes.append(f"The curve ends at {int(curve.val.tokens[-1]):,} tokens; what came later is "
                     "not judged.")
    steps, tokens, losses = series.steps[known], series.tokens[known], series.values[known]
    published, noise = published[known], noise[known]
    difference = losses - published
    off = np.abs(difference) > noise
    newest = Comparison("validation loss", int(steps[-1]), int(tokens[-1]), float(losses[-1]),
                        float(published[-1]), float(noise[-1]))
    comparisons = [newest, *comparisons]
    first = _start_of_last_stretch(off)
    if off[:first].any():
        blips = [f"{int(step):,}" for step in steps[:first][off[:first]]]
        more = " and more" if len(blips) > 5 else ""
        notes.append(f"It was off before, and came back: at step {', '.join(blips[:5])}{more}.")
    if not off[-1]:
        return Verdict("on track", "on track", curve, train_curve, comparisons, notes, [])
    better = ", lower than the published run" if newest.difference < 0 else ""
    headline = f"off by {newest.difference:+.4f}{better}, first at step {int(steps[first]):,}"
    step_before, difference_before = 0, 0.0
    if first > 0:
        step_before, difference_before = int(steps[first - 1]), difference[first - 1]
    jump = abs(difference[first] - difference_before)
    causes = usual_causes(
        record, step_before, int(steps[first]), tokens=float(tokens[first]),
        difference=newest.difference, sudden=bool(jump > 2 * noise[first]),
    )
    return Verdict("off", headline, curve, train_curve, comparisons, notes, causes)


def _start_of_last_stretch(off: np.ndarray) -> int:
    """Where the run left the curve for good: [0, 1, 0, 1, 1] -> 3; its length if it came back."""
    first = len(off)
    while first > 0 and off[first - 1]:
        first -= 1
    return first


def _names() -> str:
    return ", ".join(CURVES)
