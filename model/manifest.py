"""A checkpoint's manifest.json: size and sha256 of each file, written last; and its check.

Whoever made a checkpoint, checking it reads nothing but plain files inside its folder, and of each
no more than the manifest promises.
"""

import json
import stat
from pathlib import Path
from typing import Any

from launch.files import Progress, atomic_write, fsync, no_progress, sha256
from launch.progress import Bar

MANIFEST = "manifest.json"
WEIGHTS = ("model.safetensors", "config.json")  # every checkpoint has them
TRAINING = ("optimizer.safetensors", "state.json")  # a converted one has neither
LARGEST_MANIFEST = 1 << 20  # bytes; ours take less than a thousand


def write_manifest(folder: Path, progress: Progress = no_progress) -> None:
    """Flushes every file of a checkpoint and writes the manifest that makes it one."""
    files = {}
    for path in sorted(folder.iterdir()):
        fsync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path, progress)}
    atomic_write(folder / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")


def find_damage(folder: Path, progress: Progress = no_progress) -> str:
    """What is wrong with a checkpoint, in a few words; '' if every hash is right.

    progress: told of bytes as they are hashed.
    """
    try:
        return _damage(folder, progress)
    except (OSError, ValueError) as error:
        return f"it can't be read: {error}"


def _damage(folder: Path, progress: Progress) -> str:
    path = folder / MANIFEST
    problem = _no_plain_file(path)
    if problem:
        return problem
    if path.stat().st_size > LARGEST_MANIFEST:
        return f"{MANIFEST} has {path.stat().st_size:,} bytes"
    try:
        files = {str(name): _entry(entry) for name, entry in _files(path).items()}
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError,
            RecursionError) as error:
        return f"{MANIFEST} can't be read: {error}"
    problem = _wrong_names(folder, set(files))
    if problem:
        return problem
    for name, (size, _) in files.items():  # which costs nothing, before any hash
        problem = _no_plain_file(folder / name)
        if problem:
            return problem
        actual = (folder / name).stat().st_size
        if actual != size:
            return f"{name} has {actual:,} bytes, not {size:,}"
    total = sum(size for size, _ in files.values())
    with Bar(desc=f"checking {folder}", total=total, unit="B") as bar:

        def both(done: int) -> None:
            bar.update(done)
            progress(done)

        for name, (_, digest) in files.items():
            if sha256(folder / name, both) != digest:
                return f"{name} was altered (its sha256 differs)"
    return ""


def _files(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))["files"]


def _entry(entry: dict[str, Any]) -> tuple[int, str]:
    return int(entry["bytes"]), str(entry["sha256"])


def _wrong_names(folder: Path, names: set[str]) -> str:
    """What a manifest lists and mustn't, or should list and doesn't."""
    for name in sorted(names):
        if Path(name).name != name or name in ("", ".", "..", MANIFEST) or "\0" in name:
            return f"{MANIFEST} names {name!r}, which is no file of a checkpoint"
    needed = set(WEIGHTS)
    if any(name in names or (folder / name).exists() for name in TRAINING):
        needed |= set(TRAINING)
    for name in sorted(needed - names):
        there = (folder / name).exists()
        return f"{name} is not in {MANIFEST}" if there else f"{name} is missing"
    return ""


def _no_plain_file(path: Path) -> str:
    """Says so where there is no file, or a link, a device or a folder in its place."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return f"{path.name} is missing"
    return "" if stat.S_ISREG(kind) else f"{path.name} is no plain file"
