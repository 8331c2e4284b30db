"""Which of several runs is better, by how much, and is that more than noise?

Compared are validation losses: of the same text, after the same number of tokens, at the newest
evaluation that all the runs share. Runs that differ in the seed alone are one setting, and stand
for it with their mean. Noise is how far two equally good settings may be apart: 95 % of such
differences are smaller. It comes from the first of these that there is:

    seeds        Several seeds of a setting: s is their standard deviation, pooled over settings,
                 with as many degrees of freedom as there are runs beyond the first of each. Means
                 of n and m runs differ by less than t s sqrt(1/n + 1/m), t being Student's.
    published    One run of each, of a size and on data for which curves.py knows what seeds do.
    evaluations  One run of each, and nothing known of seeds: the scatter of the two runs'
                 difference from one evaluation to the next. It is a part of the noise alone, for
                 a seed also moves a curve as a whole: within it a difference is nothing, beyond it
                 it may be something.

Of more than two settings all pairs might have been the one looked at: their share of 5 % each
(Bonferroni).
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eval.report.charts import Entry
from eval.report.curves import curve_of_shape, seed_noise
from eval.report.record import Record
from launch.folder import flatten

LEVEL = 0.05
# What makes a setting; what else is in config.json names, watches, saves or evaluates.
SETTINGS = ("model", "optim", "steps", "batch_tokens", "init", "compute", "spikes")
NEWEST = 8  # evaluations, whose scatter is taken: the fall before them is another matter
MORE_SEEDS = "Each setting run again with another --seed, and all of them given to this command, " \
             "would tell."

Source = Literal["seeds", "published", "evaluations", ""]


@dataclass(frozen=True)
class Setting:
    """Runs that differ in the seed alone.

    places: theirs among the runs that were named. losses: one of each, where they are compared.
    differs: in which settings it isn't like the others, "" where nothing is known to be different.
    """

    places: list[int]
    names: list[str]
    losses: list[float]
    differs: str

    @property
    def loss(self) -> float:
        """Their mean."""
        return float(np.mean(self.losses))

    @property
    def title(self) -> str:
        """'a', or 'a (3 seeds)'."""
        return self.names[0] + (f" ({len(self.names)} seeds)" if len(self.names) > 1 else "")


@dataclass(frozen=True)
class Ranking:
    """The settings, the best first, and what their differences are worth.

    noise[i]: of settings[i]'s distance to the best, either way; None for the best and where it is
    unknown. better: whether the best is so by more than the noise of seeds.
    """

    headline: str
    better: bool
    settings: list[Setting]
    noise: list[float | None]
    source: Source
    notes: list[str]


def rank(entries: list[Entry]) -> Ranking | None:
    """Compares the runs with each other; None where there is only one."""
    if len(entries) < 2:
        return None
    records = [entry.record for entry in entries]
    tables = [_losses(record) for record in records]
    shared = sorted(set(tables[0]).intersection(*tables[1:]))
    if not shared:
        return Ranking("not compared with each other: no validation loss of all of them after the "
                       "same number of tokens (--eval_every)", False, [], [], "", [])
    end = shared[-1]
    settings = _settings(records, [table[end] for table in tables])
    notes = [f"Validation loss on {records[0].val_set}, after {end:,} tokens.",
             *_unequal(records, tables, end)]
    if len(settings) == 1:
        losses = settings[0].losses
        headline = (f"these runs differ in the seed alone: mean {np.mean(losses):.4f}, standard "
                    f"deviation {np.std(losses, ddof=1):.4f}")
        return Ranking(headline, False, settings, [None], "seeds", notes)
    source, noise, how = _noise(entries, settings, tables, shared)
    headline, better = _headline(settings, noise[1], source)
    return Ranking(headline, better, settings, noise, source, [*notes, *how])


def _losses(record: Record) -> dict[int, float]:
    """{tokens: validation loss}; an untrained model's says nothing."""
    series = record.series("val_loss")
    pairs = zip(series.tokens.astype(int).tolist(), series.values.tolist(), strict=True)
    return {tokens: loss for tokens, loss in pairs if tokens > 0}


def _settings(records: list[Record], losses: list[float]) -> list[Setting]:
    """The runs, gathered by what they were told but for the seed; the lowest mean first."""
    told = [settings_but_seed(record) for record in records]
    groups: dict[str, list[int]] = {}
    seen: dict[str, int] = {}  # a seed that was run twice is no further seed
    for i, record in enumerate(records):
        key = json.dumps(told[i], sort_keys=True, default=str)
        if not told[i]:
            key = f"no config.json: {i}"
        with_seed = f"{key} {record.config.get('seed')}"
        seen[with_seed] = seen.get(with_seed, 0) + 1
        groups.setdefault(f"{key} {seen[with_seed]}", []).append(i)
    names = set().union(*told)
    different = [name for name in sorted(names) if len({str(t.get(name)) for t in told}) > 1]
    settings = []
    for places in groups.values():
        values = told[places[0]]
        differs = ", ".join(f"{name} {values.get(name, 'unknown')}" for name in different)
        settings.append(Setting(places, [records[i].name for i in places],
                                [losses[i] for i in places], differs))
    return sorted(settings, key=lambda setting: setting.loss)


def settings_but_seed(record: Record) -> dict[str, object]:
    """What may make a run better or worse, flat, without the seed: {"optim.lr": 0.0006, ...}."""
    if not record.config:
        return {}
    found = flatten({key: record.config.get(key) for key in SETTINGS})
    must_match = record.description.get("must_match")
    if isinstance(must_match, dict):
        found["training data"] = must_match.get("training data")
    # A commit's 40 digits are more than anybody compares.
    code = str(record.description.get("code"))
    found["code"] = re.sub(r"([0-9a-f]{7})[0-9a-f]{33}", r"\1", code)
    return found


def _unequal(records: list[Record], tables: list[dict[int, float]], end: int) -> list[str]:
    """What is not alike at `end` tokens, where the runs are compared."""
    notes = []
    last = [max(table) for table in tables]
    if max(last) > end:
        ended = [record.name for record, tokens in zip(records, last, strict=True) if tokens == end]
        because = f": {', '.join(ended)} ended there" if ended else ""
        notes.append(f"Later evaluations are not shared by all runs{because}.")
    shares = []
    for record in records:
        steps, batch_tokens = record.config.get("steps"), record.config.get("batch_tokens")
        if isinstance(steps, int) and isinstance(batch_tokens, int) and steps * batch_tokens > 0:
            shares.append(end / (steps * batch_tokens))
    if shares and max(shares) - min(shares) > 0.05:
        notes.append(f"There the least far has run {100 * min(shares):.0f} % of its steps and the "
                     f"farthest {100 * max(shares):.0f} %: under a learning rate that falls, the "
                     "last steps gain.")
    return notes


def _noise(
    entries: list[Entry], settings: list[Setting], tables: list[dict[int, float]], shared: list[int]
) -> tuple[Source, list[float | None], list[str]]:
    """(where it is from, each setting's against the best, how it was judged in words)."""
    best, *others = settings
    level = LEVEL / math.comb(len(settings), 2)
    confidence = f"{100 * (1 - LEVEL):g} %"
    if len(settings) > 2:
        confidence += f" over all {math.comb(len(settings), 2)} pairs"
    freedom = sum(len(setting.losses) - 1 for setting in settings)
    if freedom:
        squares = [((np.array(s.losses) - s.loss) ** 2).sum() for s in settings]
        deviation = math.sqrt(sum(squares) / freedom)
        t = student_t(level, freedom)
        sizes = [1 / len(best.losses) + 1 / len(s.losses) for s in others]
        how = (f"Noise is judged from seeds: they differ by {deviation:.4f} within a setting (one "
               f"standard deviation, {freedom} degree{'s' * (freedom > 1)} of freedom), times "
               f"Student's t of {t:.2f} for {confidence}. More seeds make t smaller.")
        return "seeds", [None, *(t * deviation * math.sqrt(size) for size in sizes)], [how]
    if all(_seeds_are_known(entry) for entry in entries):
        band = float(seed_noise(np.array(shared[-1])))
        how = (f"Noise is judged from published runs of this size on this data: those that differ "
               f"in the seed alone are less than {band:g} apart.")
        return "published", [None, *(band for _ in others)], [how]
    noise: list[float | None] = [None]
    for setting in others:
        pair = [tables[best.places[0]], tables[setting.places[0]]]
        differences = [pair[1][tokens] - pair[0][tokens] for tokens in shared[-NEWEST:]]
        noise.append(evaluation_noise(np.array(shared[-NEWEST:]), np.array(differences), level))
    if noise[1] is None:
        return "", noise, [f"One run of each setting, and {len(shared)} evaluation"
                           f"{'s' * (len(shared) > 1)} in common where four are needed to see a "
                           f"scatter: nothing tells what is noise. {MORE_SEEDS}"]
    how = (f"One run of each setting: what another seed would change can't be known from them. The "
           f"noise given is a part of it, how the difference of two runs scatters from one of the "
           f"last {len(differences)} evaluations to the next ({confidence}). {MORE_SEEDS}")
    return "evaluations", noise, [how]


def _seeds_are_known(entry: Entry) -> bool:
    """Whether curves.py's seed_noise is of runs like this one."""
    known = entry.verdict is not None and entry.verdict.val_curve is not None
    return known and curve_of_shape(entry.record.settings("model")) is not None


def _headline(settings: list[Setting], noise: float | None, source: Source) -> tuple[str, bool]:
    """(the answer in a sentence, whether it is that the best is better by more than noise)."""
    best, second = settings[:2]
    gap = second.loss - best.loss
    lower = f"{best.title} is lower than {second.title} by {gap:.4f}"
    if noise is None:
        return f"{lower}: whether that is noise can't be told", False
    if gap <= noise:
        return f"no difference that is more than noise: {lower}, noise ± {noise:.4f}", False
    if source == "evaluations":
        return (f"{lower}, more than the evaluations' scatter of ± {noise:.4f}: whether another "
                "seed would change that can't be told"), False
    return (f"{best.title} is better than {second.title} by {gap:.4f}, more than noise "
            f"(± {noise:.4f})"), True


def evaluation_noise(tokens: np.ndarray, differences: np.ndarray, level: float) -> float | None:
    """How far from 0 two runs' difference may be by the scatter of their evaluations alone.

    Each inner evaluation is held against the straight line, over log(tokens), between its
    neighbours, which takes away what changes slowly. With weights a and b of the neighbours the
    variance of that is 1 + a^2 + b^2 times one evaluation's. Neighbouring ones share evaluations,
    so that n of them are worth 18 n / 35 degrees of freedom (von Neumann et al. 1941, "The mean
    square successive difference", for second differences). None for fewer than two.
    """
    x = np.log(tokens.astype(float))
    a = (x[2:] - x[1:-1]) / (x[2:] - x[:-2])  # the left neighbour's weight
    b = 1 - a
    off = differences[1:-1] - (a * differences[:-2] + b * differences[2:])
    if len(off) < 2:
        return None
    deviation = math.sqrt(np.mean(off**2 / (1 + a**2 + b**2)))
    return student_t(level, max(1, 18 * len(off) // 35)) * deviation


def student_t(level: float, freedom: int) -> float:
    """The t that Student's distribution passes, either way, with probability `level`.

    By halving the interval in which it lies. With t = sqrt(freedom) tan(angle) the probability to
    be within it is a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if probability_within(angle, freedom) < 1 - level:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan(low)


def probability_within(angle: float, freedom: int) -> float:
    """The probability that |T| is below sqrt(freedom) tan(angle)."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
