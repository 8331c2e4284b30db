"""What a stopped job has done, and whether a folder's shards are those that are asked for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.counts import Counts
from data.documents import File
from launch.errors import BadInput

PROGRESS = ".progress.json"
Position = tuple[int, int, int]  # file, document in it, tokens of that document written


@dataclass
class Progress:
    """What .progress.json holds after each finished shard."""

    settings: dict[str, Any]
    files: list[tuple[str, int]]
    shards: list[dict[str, Any]]
    position: Position
    counts: Counts
    skipped_files: list[str]

    @classmethod
    def start(cls, settings: dict[str, Any], files: list[File]) -> "Progress":
        """Of a job that has done nothing yet."""
        return cls(settings, names(files), [], (0, 0, 0), Counts(), [])


def names(files: list[File]) -> list[tuple[str, int]]:
    """(name, bytes) of each file: by these a source is known again."""
    return [(file.name, file.size) for file in files]


def read_progress(out: Path) -> Progress | None:
    """Of the job that was stopped in this folder. Raises BadInput where it can't be read."""
    path = out / PROGRESS
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Progress(**content | {
            "counts": Counts(**content["counts"]), "position": tuple(content["position"]),
            "files": [tuple(file) for file in content["files"]],
        })
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"can't read {path} ({error}): remove the shards and start again") from None


def refuse_shards_of_others(out: Path, done: dict, before: Progress | None) -> None:
    """Raises BadInput if `out` holds shards that data.fineweb hasn't made."""
    if done and not (before or "settings" in done):
        raise BadInput(f"{out} already holds shards that weren't made here: choose another --out")
    if not done and before is None and any(out.glob("*.bin")):
        raise BadInput(f"{out} already holds .bin files, without a manifest: choose another --out")


def refuse_changes(
    out: Path, done: dict, before: Progress | None, settings: dict[str, Any], files: list[File]
) -> None:
    """Raises BadInput, with all that differs, if `out` holds shards of another job."""
    if not done and before is None:
        return
    old = done.get("settings") or (before.settings if before else {})
    # Settings that jobs of earlier versions don't name.
    old = {"split_text": True, "val_tokens": old.get("shard_tokens")} | old
    changes = [f"{key} was {old.get(key)!r} and is {value!r}"
               for key, value in settings.items() if old.get(key) != value]
    old_files = [tuple(file) for file in done.get("files") or (before.files if before else [])]
    new_files = names(files)
    if old_files != new_files:
        changes.append(f"the source had {len(old_files):,} files and has {len(new_files):,}, "
                       f"first difference: {_first_difference(old_files, new_files)}")
    if changes:
        raise BadInput(f"{out} holds shards of another job: {'; '.join(changes)}. "
                       "Choose another --out, or empty the folder")


def _first_difference(old: list[tuple], new: list[tuple]) -> str:
    for name, size in [*new, *old]:
        if ((name, size) in new) != ((name, size) in old):
            return f"{name} ({size:,} bytes)"
    return "their order"
