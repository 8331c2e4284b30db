"""A folder of shards: files of GPT-2 tokens that any reader of this field can use.

    python -m data.shards verify fineweb10B             # header, length, every token, sha256
    python -m data.shards info fineweb10B               # counts, longest document, first text
    python -m data.shards convert fineweb10B --to npy   # into fineweb10B-npy; or --to nanogpt

A shard is llm.c's format (data/shard_file.py); every document begins with 50256. A folder holds
NAME_val_000000.bin, then NAME_train_000001.bin and on, and manifest.json (dataset, revision,
tokenizer hash, and for each shard its tokens, documents and sha256). Folders of others have no
manifest, and are read too: llm.c's own (also NAME_train.bin and NAME_val.bin), build-nanogpt's
.npy, and nanoGPT's train.bin and val.bin (bare uint16).
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from data.shard_file import Shard, blocks, open_shard, shard_bytes
from data.tokenizer import EOT, RANKS_SHA256, decode
from launch import cli, flags
from launch.console import print0
from launch.errors import BadInput, Failed, run_command
from launch.files import atomic_write, free_bytes, fsync, human_size
from launch.progress import Bar, track

# train.bin, NAME_train.bin, NAME_train_000001.bin; where both words occur, the last one counts.
SHARD_NAME = re.compile(r"(?!\.)(?:.*_)?(train|val)(?:_.*)?\.(?:bin|npy)")
MOST_NESTED = 4  # datasets--OWNER--NAME/snapshots/COMMIT/FOLDER, as the Hub's client nests


def write_folder(
    folder: Path, name: str, train: list[np.ndarray], val: np.ndarray, dataset: str
) -> None:
    """Writes a validation shard, train shards and their manifest. Tokens are uint16."""
    entries = []
    for i, tokens in enumerate([val, *train]):
        file = f"{name}_{'train' if i else 'val'}_{i:06d}.bin"
        content = shard_bytes(tokens)
        atomic_write(folder / file, content)
        entries.append(
            {
                "file": file,
                "tokens": len(tokens),
                "documents": int((tokens == EOT).sum()),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    manifest = {
        "dataset": dataset,
        "revision": None,
        "tokenizer_sha256": RANKS_SHA256,
        "shards": entries,
    }
    atomic_write(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def open_folder(
    folder: Path, kinds: Sequence[str] = ("train", "val")
) -> tuple[list[Shard], list[Shard], str]:
    """(train shards, validation shards, the data set's name), in the order of their names.

    kinds: of which there must be some. Raises BadInput where the folder is missing or incomplete,
    or holds what can't be told apart.
    """
    where = find_shards(folder)
    manifest = read_manifest(where)
    entries = {entry["file"]: entry for entry in manifest.get("shards", [])}
    if problems := listing_problems(where, entries):
        raise BadInput(problems[0])
    shards: dict[str, list[Shard]] = {"train": [], "val": []}
    for path in shard_paths(where):
        shards[kind_of(path)].append(open_entry(path, entries.get(path.name)))
    for kind in kinds:
        if not shards[kind]:
            raise BadInput(f"{where} holds no {'validation' if kind == 'val' else kind} shard: "
                           f"expected NAME_{kind}_000001.bin or .npy, NAME_{kind}.bin or "
                           f"{kind}.bin")
    return shards["train"], shards["val"], manifest.get("dataset") or folder.name


def find_shards(folder: Path) -> Path:
    """The folder itself if there are shards in it, or the only one below it that has some.

    Raises BadInput where there is none, or more than one.
    """
    out = cli.quoted(folder)
    command = f"python -m data.fineweb --dataset fineweb --sample 10BT --out {out}"
    if folder.is_symlink() and not folder.exists():
        raise BadInput(f"{folder} is a link to {folder.readlink()}, and nothing is there")
    if folder.is_file():
        raise BadInput(f"{folder} is a file, and --data.dir takes a folder of shards; --data.text "
                       "takes a text")
    if not folder.is_dir():
        raise BadInput(f"no data in {folder}, for there is no such folder: --data.dir names "
                       f"another, or `{command}` makes it of FineWeb")
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise BadInput(f"can't read the folder {folder}: {error.strerror}") from None
    if ".progress.json" in names and "manifest.json" not in names:
        raise BadInput(f"{folder} is half made: the python -m data.fineweb that was making it goes "
                       "on where it stopped")
    if "manifest.json" in names or shard_paths(folder):
        return folder
    below = _folders_with_shards(folder)
    if len(below) == 1:
        print0(f"the shards of {folder} lie in {below[0]}")
        return below[0]
    if below:
        raise BadInput(f"{folder} has shards in {len(below)} folders below it, name one of them: "
                       + ", ".join(cli.quoted(path) for path in below))
    if not names:
        raise BadInput(f"{folder} is empty: `{command}` fills it")
    shown = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    raise BadInput(f"{folder} holds no shards (NAME_train_000001.bin, NAME_val_000000.bin), but "
                   f"{shown}. python -m data.fineweb makes shards, in a folder of their own")


def _folders_with_shards(folder: Path) -> list[Path]:
    """The folders below this one, not hidden and not too deep, that hold shards."""
    found = []
    for name, folders, _ in os.walk(folder):
        path = Path(name)
        folders[:] = sorted(below for below in folders if not below.startswith("."))
        if len(path.relative_to(folder).parts) == MOST_NESTED:
            folders.clear()
        if path != folder and shard_paths(path):
            found.append(path)
    return found


def shard_paths(folder: Path) -> list[Path]:
    """The shards in a folder by their names: train and validation, in alphabetical order."""
    return sorted(path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name))


def kind_of(path: Path) -> str:
    """"train" or "val", as a shard's name says."""
    match = SHARD_NAME.fullmatch(path.name)
    assert match is not None
    return match[1]


def listing_problems(folder: Path, entries: dict[str, dict]) -> list[str]:
    """What is wrong with a folder before any shard is opened, a line each."""
    paths = shard_paths(folder)
    names = {path.name for path in paths}
    problems = []
    for stem, count in Counter(path.stem for path in paths).items():
        if count > 1:
            problems.append(f"{folder} holds {stem}.bin and {stem}.npy, the same shard twice: move "
                            "one of them away")
    if entries:
        for name in sorted(names - entries.keys()):
            problems.append(f"{folder / name} is not in the manifest, so nobody knows its sha256: "
                            "move it away, or move manifest.json away to use all unchecked")
    for name in sorted(entries.keys() - names):
        if SHARD_NAME.fullmatch(name):
            problems.append(f"{folder / name} is in the manifest and not on the disk: get it from "
                            "where the others came from, or make them all again in another folder")
        else:
            problems.append(f"{name} is in the manifest of {folder}, and its name says neither "
                            "train nor val")
    return problems


def open_entry(path: Path, entry: dict | None) -> Shard:
    """A shard that agrees with its entry in the manifest, where it has one."""
    shard = open_shard(path, entry["sha256"] if entry else "")
    if entry and entry["tokens"] != len(shard.tokens):
        raise BadInput(f"{path} has {len(shard.tokens):,} tokens, the manifest "
                       f"{entry['tokens']:,}: make it again")
    return shard


def read_manifest(folder: Path) -> dict:
    """The folder's manifest.json; empty where there is none, as other projects have none."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    if not path.is_file():  # reading a pipe or a device may never end
        raise BadInput(f"{path} is no plain file")
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"can't read {path}: {error}") from None
    entries = manifest.get("shards") if isinstance(manifest, dict) else None
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise BadInput(f"{path} is no manifest: expected file, tokens and sha256 for each shard")
    return manifest


def _is_entry(entry: object) -> bool:
    """Whether this is a manifest's entry of a shard in the same folder."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and Path(entry["file"]).name == entry["file"]
        and isinstance(entry.get("tokens"), int)
        and re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))) is not None
    )


Folder = Annotated[Path, tyro.conf.Positional]


def verify(folder: Folder) -> None:
    """Checks every shard of a folder and prints a line for each. Raises BadInput at the end if
    anything is wrong."""
    where = find_shards(folder)
    manifest = read_manifest(where)
    entries = {entry["file"]: entry for entry in manifest.get("shards", [])}
    problems = listing_problems(where, entries)
    for problem in problems:
        print(f"wrong: {problem}")
    total, paths = 0, shard_paths(where)
    for path in sorted(paths, key=lambda path: (kind_of(path) == "train", path)):
        try:
            shard = open_entry(path, entries.get(path.name))
            shard.check()
        except BadInput as error:
            problems.append(str(error))
            print(f"wrong: {error}")
            continue
        how = "sha256 and tokens right" if shard.sha256 else "tokens right, no manifest"
        print(f"{path.name}: {len(shard.tokens):,} tokens, {how}")
        total += len(shard.tokens)
    if problems:
        raise BadInput(f"{where}: {len(problems)} of these lines say what is wrong")
    open_folder(where)  # whether there are shards of both kinds
    dataset = manifest.get("dataset") or folder.name
    print(f"{dataset}: {len(paths)} shards, {total:,} tokens, all right")


def info(folder: Folder) -> None:
    """Prints what a folder holds: documents, tokens, the longest document, the first text."""
    train, val, dataset = open_folder(folder)
    documents = longest = carried = 0  # carried: tokens of the document that is open
    for shard in val + train:
        here = 0
        for _, part in blocks(shard.tokens):
            ends = np.flatnonzero(part == EOT)
            if len(ends):
                inside = int(np.diff(ends).max(initial=1)) - 1
                longest = max(longest, carried + int(ends[0]), inside)
                carried = len(part) - int(ends[-1]) - 1
            else:
                carried += len(part)
            here += len(ends)
        documents += here
        print(f"{shard.path.name}: {len(shard.tokens):,} tokens, {here:,} documents begin in it")
    longest = max(longest, carried)
    total = sum(len(shard.tokens) for shard in val + train)
    print(f"{dataset}: {total:,} tokens in {documents:,} documents, "
          f"{total / max(1, documents):,.1f} tokens each, the longest {longest:,}")
    manifest = read_manifest(train[0].path.parent)
    if manifest.get("revision"):
        print(f"revision {manifest['revision']}")
    statistics = manifest.get("statistics")
    for key, value in statistics.items() if isinstance(statistics, dict) else []:
        print(f"{key}: {value:,}" if isinstance(value, int | float) else f"{key}: {value}")
    beginning = decode((val + train)[0].tokens[:1024].tolist())
    text = next((text for text in beginning.split("<|endoftext|>") if text), "")
    print(f"it begins: {text[:400]!r}")


def convert(folder: Folder, to: Literal["npy", "nanogpt"]) -> None:
    """Copies checked shards into FOLDER-npy (build-nanogpt) or FOLDER-nanogpt (two bare files)."""
    train, val, _ = open_folder(folder)
    target = folder.resolve().with_name(f"{folder.resolve().name}-{to}")
    needed = sum(2 * len(shard.tokens) for shard in val + train)
    if needed > free_bytes(target):
        raise BadInput(f"not enough disk: {human_size(needed)} are needed for {target}")
    if to == "npy":
        parts = [(f"{shard.path.stem}.npy", [shard]) for shard in val + train]
    else:
        parts = [("val.bin", val), ("train.bin", train)]
    target.mkdir(exist_ok=True)
    for name, group in parts:
        for shard in track(group, f"checking what goes into {name}", "shard"):
            shard.check()
        tokens = sum(len(shard.tokens) for shard in group)
        temporary = target / f".{name}.tmp"
        try:
            temporary.unlink(missing_ok=True)
            bar = Bar(desc=f"writing {name}", total=2 * tokens, unit="B")
            with temporary.open("xb") as file, bar:  # a new file, and not where a link points
                if to == "npy":
                    np.lib.format.write_array_header_1_0(
                        file, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
                    )
                for shard in group:
                    for _, part in blocks(shard.tokens):
                        bar.update(file.write(part.astype("<u2", copy=False).tobytes()))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target / name)
        except OSError as error:
            raise Failed(f"can't write {target / name}: {error.strerror}") from None
        finally:
            temporary.unlink(missing_ok=True)
        fsync(target)
        print(f"{target / name}: {tokens:,} tokens")


def main(arguments: Sequence[str] | None = None) -> None:
    flags.parse_subcommand({"verify": verify, "info": info, "convert": convert}, arguments)


if __name__ == "__main__":
    run_command(main)
