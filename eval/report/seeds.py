"""Runs that differ in the seed alone: their mean, their deviation, and whether it beats a target.

    python -m eval.report --seeds runs/a runs/b runs/c --target 3.28

Of every run the validation loss after its last step counts. Two tests say whether the mean is below
the target by more than chance, and both are modded-nanogpt's for its records:

    p-value    Student's t-test of one sample, one-sided: how often losses whose true mean is the
               target would give a mean as low as this (a record of its track 1 needs p < 0.01)
    track 3    (target - mean) * sqrt(n) >= 0.004: three standard errors at the deviation of 0.0013
               that was measured there, so for GPT-2 124M on FineWeb alone
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.report.better import probability_within, settings_but_seed
from eval.report.curves import same_val_set
from eval.report.record import Record, read_records
from launch.errors import BadInput

FINEWEB_TARGET = 3.28  # GPT-2 124M's on FineWeb's validation set: modded-nanogpt's, after llm.c
TRACK_3 = 0.004  # nats; modded-nanogpt, rules of track 3


@dataclass(frozen=True)
class Seeds:
    """Finished runs of one setting. losses: the last validation loss of each, in nats."""

    seeds: list[int]
    losses: list[float]
    val_set: str

    @property
    def mean(self) -> float:
        """Of the losses."""
        return float(np.mean(self.losses))

    @property
    def deviation(self) -> float:
        """Their standard deviation, of n - 1 degrees of freedom."""
        return float(np.std(self.losses, ddof=1))

    def p_value(self, target: float) -> float:
        """The probability of a mean as low as this, were the true mean the target (t-test)."""
        gap = target - self.mean
        if self.deviation == 0:  # every loss the same: no chance in it
            return float(gap <= 0)
        freedom = len(self.losses) - 1
        t = gap / self.deviation * math.sqrt(len(self.losses))
        tail = (1 - probability_within(math.atan(abs(t) / math.sqrt(freedom)), freedom)) / 2
        return tail if t > 0 else 1 - tail

    def track_3(self, target: float) -> float:
        """(target - mean) * sqrt(n), in nats: a record from TRACK_3 on."""
        return (target - self.mean) * math.sqrt(len(self.losses))


def read_seeds(paths: list[Path]) -> Seeds:
    """The runs in these folders. Raises BadInput, and names the difference, unless they are
    finished, of one setting, and each of another seed."""
    if len(paths) < 2:
        raise BadInput("--seeds takes two runs or more: one has no deviation")
    records = read_records(paths)  # of one validation set, none twice
    for record in records:
        _require_finished(record)
    _require_one_setting(records)
    seeds = [record.config["seed"] for record in records]
    for i, seed in enumerate(seeds):
        if seed in seeds[:i]:
            raise BadInput(f"{records[seeds.index(seed)].path} and {records[i].path} have the same "
                           f"--seed {seed}: one more run of it tells nothing of chance")
    losses = [float(record.series("val_loss").values[-1]) for record in records]
    return Seeds(seeds, losses, records[0].val_set)


def describe(seeds: Seeds, target: float) -> list[str]:
    """What is printed, a line each. target: a loss, or 0: FineWeb's, if that is what was judged."""
    lines = [f"{len(seeds.losses)} seeds ({', '.join(map(str, seeds.seeds))}): mean "
             f"{seeds.mean:.4f}, standard deviation {seeds.deviation:.4f} ({seeds.val_set})"]
    if not target and not same_val_set(seeds.val_set, trust_local_files=False):
        return [*lines, "no target is known for this validation set: --target LOSS"]
    target = target or FINEWEB_TARGET
    p = seeds.p_value(target)
    said = f"p = {p:.2g}" if p > 1e-12 else "p < 1e-12"  # less is lost in rounding
    margin = seeds.track_3(target)
    verdict = f"not met, {TRACK_3} is asked"
    if margin >= TRACK_3 - 1e-9:  # 3.28 - 3.276 is less than 0.004 by a rounding
        verdict = f">= {TRACK_3}, met"
    return [*lines,
            f"below {target:g}: {said}, Student's t-test, one-sided, {len(seeds.losses) - 1} "
            f"degree{'s' * (len(seeds.losses) > 2)} of freedom",
            f"modded-nanogpt's rule (track 3, 124M on FineWeb): ({target:g} - mean) * sqrt(n) = "
            f"{margin:.4f}, {verdict}"]


def _require_finished(record: Record) -> None:
    """Raises BadInput for a run without config.json or without a loss after its last step."""
    steps = record.config.get("steps")
    if not isinstance(steps, int) or not isinstance(record.config.get("seed"), int):
        raise BadInput(f"{record.path} says nothing of its seed and steps: looked for "
                       f"{record.path / 'config.json'}")
    evaluated = record.series("val_loss").steps
    if len(evaluated) == 0 or evaluated[-1] != steps:
        raise BadInput(f"{record.path} isn't finished, it has no validation loss after its last "
                       f"step of {steps:,}: {record.state()}")


def _require_one_setting(records: list[Record]) -> None:
    """Raises BadInput that names the first two runs which differ in more than the seed."""
    first = settings_but_seed(records[0])
    for record in records[1:]:
        other = settings_but_seed(record)
        different = [f"{name} {first.get(name)} and {other.get(name)}"
                     for name in sorted(first.keys() | other.keys())
                     if first.get(name) != other.get(name)]
        if different:
            raise BadInput(f"{records[0].path} and {record.path} differ in more than the seed: "
                           f"{'; '.join(different)}")
