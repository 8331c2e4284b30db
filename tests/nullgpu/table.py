"""The committed table, counted.json, and how a new count differs from it."""

import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "counted.json"
MEMORY = 0.01  # share by which peak memory may differ; everything else has to be equal

Counts = dict[str, Any]  # of a row: numbers, and dictionaries of the same


def read() -> dict[str, Counts]:
    """Row -> its counts. {} before there is a table."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write(rows: dict[str, Counts]) -> None:
    """A line for each number, so that a change shows as a diff."""
    TABLE.write_text(json.dumps(rows, indent=1) + "\n")


def flat(counts: Counts, above: str = "") -> dict[str, Any]:
    """{"step: launches: ATen": 66, ...}: every number by its path."""
    numbers: dict[str, Any] = {}
    for name, value in counts.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{above}{name}: ")
        else:
            numbers[above + name] = value
    return numbers


def same(name: str, before: Any, now: Any) -> bool:
    """Whether two numbers agree."""
    if name.endswith("peak MiB") and before is not None and now is not None:
        return abs(now - before) <= MEMORY * before
    return before == now


def differences(before: Counts, now: Counts) -> list[str]:
    """A line for each number that isn't the table's; of one that is in one of the two alone too."""
    old, new = flat(before), flat(now)
    lines = []
    for name in dict.fromkeys([*old, *new]):
        if not same(name, old.get(name), new.get(name)):
            lines.append(f"{name}: {shown(old.get(name))} in the table, {shown(new.get(name))} now")
    return lines


def shown(value: int | None) -> str:
    """A number as a line says it."""
    return "none" if value is None else f"{value:,}"


def summary(counts: Counts) -> str:
    """A row in a line."""
    parts = []
    for name, part in counts.items():
        if name == "sequences":
            parts.append(f"{part} sequences")
        elif isinstance(part, dict) and "launches" in part:
            waits = sum(part["waits"].values())
            collectives = sum(times for operation, times in part["collectives"].items()
                              if not operation.endswith("bytes"))
            parts.append(f"{name} {part['launches']['all']:,} launches, {waits} waits, "
                         f"{collectives} collectives, {part['peak MiB']:,} MiB")
    return "; ".join(parts)
