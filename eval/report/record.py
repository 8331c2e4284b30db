"""A run as it lies in its folder: config.json and metrics.jsonl, whole, cut short or half written.

Both files may be somebody else's: whatever isn't a finite number or a text where one belongs is
left out.
"""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from launch.errors import BadInput
from launch.tracker import read_rows

# llm.c's outlier detector (llmc/outlier_detector.h) and the threshold of its run_gpt3_125M.sh.
SPIKE_WINDOW, SPIKE_Z = 128, 7.0
SPIKE_BEGIN = 32  # steps: the first windows are shorter, so that early spikes are seen

Kind = Literal["spike", "restart", "stop", "other"]


class Series(NamedTuple):
    """One column of metrics.jsonl, where it was written."""

    steps: np.ndarray
    tokens: np.ndarray
    values: np.ndarray


class Event(NamedTuple):
    """Something that happened to a run. text is the run's own, or says what was found here."""

    step: int
    tokens: int
    kind: Kind
    text: str


@dataclass(frozen=True)
class Record:
    """What a run has written. description is config.json, {} where there is none."""

    path: Path
    name: str
    description: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration."""
        return _mapping(self.description.get("config"))

    def settings(self, group: str) -> dict[str, Any]:
        """One group of the configuration, such as "model"; {} where it isn't there."""
        return _mapping(self.config.get(group))

    @property
    def val_set(self) -> str:
        """What the validation losses are of: the newest row's word, else config.json's; or ''."""
        for row in reversed(self.rows):
            if "val_loss" in row and isinstance(row.get("val_set"), str):
                return row["val_set"]
        return str(_mapping(self.description.get("resolved")).get("val_set", ""))

    def series(self, key: str) -> Series:
        """A column. Validation losses of another set than val_set are left out."""
        rows = [row for row in self.rows if _is_number(row.get(key))]
        if key == "val_loss":
            val_set = self.val_set
            rows = [row for row in rows if row.get("val_set", val_set) == val_set]
        table = [(row["step"], row["tokens"], row[key]) for row in rows]
        columns = np.array(table, dtype=float).reshape(-1, 3)  # (rows, 3), also where none is left
        return Series(*columns.T)

    def samples(self) -> list[tuple[int, int, str]]:
        """(step, tokens, text) of every sample."""
        rows = [row for row in self.rows if isinstance(row.get("sample"), str)]
        return [(row["step"], row["tokens"], row["sample"]) for row in rows]

    def events(self) -> list[Event]:
        """What the run says has happened, and spikes that are found in its figures."""
        events = []
        for row in self.rows:
            text = row.get("event")
            if isinstance(text, str):
                events.append(Event(row["step"], row["tokens"], _kind(text), text))
        reported = {event.step for event in events if event.kind == "spike"}
        for key, name in (("train_loss", "loss"), ("grad_norm", "gradient norm")):
            for step, tokens, value, z in find_spikes(self.series(key)):
                if reported & {step - 1, step, step + 1}:
                    continue
                reported.add(step)
                text = (f"spike: {name} {value:.4g}, {z:.0f} standard deviations above the "
                        "steps before")
                events.append(Event(step, tokens, "spike", text))
        return sorted(events, key=lambda event: event.step)

    def state(self) -> str:
        """Finished, stopped, or neither (running, or killed)."""
        if not self.rows:
            return "nothing recorded yet"
        last, planned = self.rows[-1]["step"], self.config.get("steps")
        event = str(self.rows[-1].get("event", ""))
        if _kind(event) == "stop":
            return event
        if last == planned:
            return "finished"
        of = f" of {planned:,}" if isinstance(planned, int) else ""
        return f"at step {last:,}{of}: running, or killed"


def read_record(path: Path) -> Record:
    """A run from its folder. Raises BadInput where there is none, or not one row."""
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise BadInput(f"{path} is no run: looked for {metrics}")
    try:
        rows = [row for row in read_rows(metrics) if _is_row(row)]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"can't read {metrics}: {error}") from None
    if not rows:
        raise BadInput(f"{metrics} holds no row with a step and tokens: nothing to report yet")
    try:
        description = json.loads((path / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):  # the metrics speak for themselves
        description = {}
    return Record(path, readable(path.resolve().name), _mapping(description), rows)


def read_records(paths: list[Path]) -> list[Record]:
    """Several runs, each under a name of its own.

    Raises BadInput unless all are validated on the same set: else their losses mean different
    things.
    """
    records = [read_record(path) for path in paths]
    if len({record.path.resolve() for record in records}) < len(records):
        raise BadInput("a run is named twice")
    first = records[0]
    for record in records[1:]:
        if record.val_set != first.val_set or not first.val_set:
            raise BadInput(
                f"losses on different data can't be compared: {first.path} is validated on "
                f"{first.val_set or 'nothing that it names'}, {record.path} on "
                f"{record.val_set or 'nothing that it names'}"
            )
    names = [record.name for record in records]
    for i, record in enumerate(records):
        if names.count(record.name) > 1:
            records[i] = replace(record, name=readable(record.path))
    return records


def readable(path: Path | str) -> str:
    """A path for titles: the UTF-8 that the disk holds, also where the locale is ASCII."""
    return os.fsencode(path).decode("utf-8", "replace")


def find_spikes(series: Series) -> list[tuple[int, int, float, float]]:
    """(step, tokens, value, z): values SPIKE_Z standard deviations above the window before them."""
    values = series.values
    if len(values) <= SPIKE_BEGIN:
        return []
    end = np.arange(SPIKE_BEGIN, len(values))  # the window before value `end` is [start, end)
    start = np.maximum(0, end - SPIKE_WINDOW)
    median = np.median(values)  # taken off, so that the sums keep their digits
    sums = np.concatenate([[0.0], np.cumsum(values - median)])
    squares = np.concatenate([[0.0], np.cumsum((values - median) ** 2)])
    mean = (sums[end] - sums[start]) / (end - start)
    variance = (squares[end] - squares[start]) / (end - start) - mean**2
    # Never below 1 %: a window of equal values would call any change a spike.
    floor = (0.01 * (mean + median)) ** 2
    deviation = np.sqrt(np.maximum(variance, floor)) + 1e-9
    z = (values[end] - median - mean) / deviation
    found = []
    for i, z_i in zip(end[z > SPIKE_Z], z[z > SPIKE_Z], strict=True):
        found.append((int(series.steps[i]), int(series.tokens[i]), float(values[i]), float(z_i)))
    return found


def _kind(event: str) -> Kind:
    """The sort of an event, by the words that launch/ and train_gpt2.py write."""
    if event.startswith("resumed"):
        return "restart"
    if event.startswith("stopped"):
        return "stop"
    if "spike" in event or event.startswith(("skipped", "rolled back")):
        return "spike"
    return "other"


def _is_row(row: dict) -> bool:
    return all(_is_count(row.get(key)) for key in ("step", "tokens"))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300 and math.isfinite(value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
