"""llm.c's published runs, as curves to compare with, and what may be compared with them.

llmc/*.csv hold the curves; each file names its source. A loss is compared only with losses of the
same text: these curves are FineWeb's (not FineWeb-Edu's), validated on the first 10,485,760 tokens
of sample-10BT. That is the validation set of shards made from the Hub's sample-10BT
("fineweb sample-10BT"), of the ready-made ones ("fineweb 10BT"), and of a folder fineweb10B as
llm.c and modded-nanogpt leave it, without a manifest (or of documents that data.fineweb was told
to call so). "fineweb from local files" may hold anything: it counts only where --against says so.
All else is refused. The training loss may be FineWeb's of any sample.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from launch.errors import BadInput

FOLDER = Path(__file__).parent / "llmc"
VAL_TOKENS = 10_485_760
SAME_DATA = ("fineweb sample-10BT", "fineweb 10BT", "fineweb10B")  # as data/ names them
LOCAL_FILES = "fineweb from local files"
BATCH_TOKENS = 524_288  # of both runs; the bands below are given in its steps

# Runs that differ in nothing but the seed end within 0.001 to 0.004 (one standard deviation) of
# each other, and within 0.013 at step 125: several of these make a fair band.
EARLY_BAND, BAND = 0.05, 0.015  # nats; the first up to step 1000
EARLY_UNTIL = 1000 * BATCH_TOKENS  # tokens
TRAIN_WINDOW = 50 * BATCH_TOKENS  # a point of the train curve is the mean over so many tokens
# Such a mean scatters about its trend by 0.0063 (one standard deviation, from second differences
# of the curve after step 1000): other batches. Two of them, and three sigma.
TRAIN_NOISE = 3 * 2**0.5 * 0.0063


class Points(NamedTuple):
    """A line: values at increasing tokens."""

    tokens: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Curve:
    """A published run. lr, warmup_steps and weight_decay are those of llm.c's script for it."""

    key: str
    title: str
    model: dict[str, int]
    steps: int
    lr: float
    warmup_steps: int = 700
    weight_decay: float = 0.1
    batch_tokens: int = BATCH_TOKENS

    @cached_property
    def val(self) -> Points:
        """Validation loss."""
        return _read(f"{self.key}-val.csv", 1)

    @cached_property
    def train(self) -> Points | None:
        """Training loss, means over TRAIN_WINDOW; None where none was published."""
        file = f"{self.key}-train.csv"
        return _read(file, 1) if (FOLDER / file).exists() else None

    @cached_property
    def grad_norm(self) -> Points | None:
        """The gradient's norm before clipping, in the same windows."""
        file = f"{self.key}-train.csv"
        return _read(file, 2) if (FOLDER / file).exists() else None


def _shape(n_layer: int, n_head: int, n_embd: int) -> dict[str, int]:
    return dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_ctx=1024)


# Steps are the logs'; the settings are those of llm.c's scripts/run_gpt2_124M.sh and _350M.sh.
CURVES = {
    "llmc-124m": Curve("llmc-124m", "llm.c GPT-2 124M", _shape(12, 12, 768), 19_560, 6e-4),
    "llmc-350m": Curve("llmc-350m", "llm.c GPT-2 350M", _shape(24, 16, 1024), 60_000, 3e-4),
}


def _read(file: str, column: int) -> Points:
    lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    _names, *rows = [line for line in lines if not line.startswith("#")]
    table = np.array([row.split(",") for row in rows], dtype=float)  # (points, columns)
    return Points(table[:, 0], table[:, column])


def interpolate(points: Points, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, how wrong each may be) at any tokens; NaN before the first point and past the last.

    Straight lines over log(tokens), where these curves bend less than over tokens. The error of a
    straight line is f''/2 times the distances to both ends; for f'' the largest second difference
    at the four points around is taken. A point at 0 tokens has no logarithm, and is left out.
    """
    positive = points.tokens > 0
    x, y = np.log(points.tokens[positive]), points.values[positive]
    slopes = np.diff(y) / np.diff(x)
    curvature = np.abs(2 * np.diff(slopes) / (x[2:] - x[:-2]))  # |f''| at the inner points
    curvature = np.concatenate([curvature[:1], curvature, curvature[-1:]])  # and at both ends
    tokens = np.asarray(tokens, dtype=float)
    at = np.log(np.where(tokens > 0, tokens, np.nan))
    at = np.where((at >= x[0]) & (at <= x[-1]), at, np.nan)
    # The point to the left of each place.
    left = np.searchsorted(x, at, side="right") - 1
    left = np.clip(left, 0, len(x) - 2)
    values = y[left] + slopes[left] * (at - x[left])
    # The four points around each place: (..., 4).
    around = np.clip(left[..., None] + [-1, 0, 1, 2], 0, len(x) - 1)
    largest = curvature[around].max(axis=-1)
    error = largest / 2 * (at - x[left]) * (x[left + 1] - at)
    return values, error


def seed_noise(tokens: np.ndarray) -> np.ndarray:
    """The expected noise of a validation loss: nats, either way."""
    return np.where(np.asarray(tokens) <= EARLY_UNTIL, EARLY_BAND, BAND)


def data_name(val_set: str) -> str:
    """'fineweb 10BT, 10,485,760 tokens' -> 'fineweb 10BT'."""
    return val_set.removesuffix(" tokens").split(", ")[0] if val_set else ""


def same_val_set(val_set: str, trust_local_files: bool) -> bool:
    """Whether a validation loss of this name is one of the curves' validation set."""
    names = (*SAME_DATA, LOCAL_FILES) if trust_local_files else SAME_DATA
    return val_set in [f"{name}, {VAL_TOKENS:,} tokens" for name in names]


def same_train_data(val_set: str, trust_local_files: bool) -> bool:
    """Whether the training loss is FineWeb's, of any sample: validation and training data share
    the name."""
    name = data_name(val_set)
    if name == LOCAL_FILES:
        return trust_local_files
    return name in SAME_DATA or name.startswith("fineweb ")


def named_curve(key: str) -> Curve:
    """The curve of this name. Raises BadInput where there is none."""
    if key not in CURVES:
        raise BadInput(f"no published curve is called {key!r}: there are {', '.join(CURVES)}")
    return CURVES[key]


def curve_of_shape(model: dict) -> Curve | None:
    """The published run of exactly this model, if there is one."""
    for curve in CURVES.values():
        if all(model.get(key) == value for key, value in curve.model.items()):
            return curve
    return None
