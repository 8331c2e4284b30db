"""Shards: files of GPT-2 tokens that any reader of this field can use.

    python -m data.shards verify fineweb10B             # header, length, every token, sha256
    python -m data.shards info fineweb10B               # counts, longest document, first text
    python -m data.shards convert fineweb10B --to npy   # into fineweb10B-npy; or --to nanogpt

A shard is llm.c's format: 256 little-endian int32 (20240520, 1, number of tokens, zeros), then
uint16 tokens; every document begins with 50256. A folder holds NAME_val_000000.bin, then
NAME_train_000001.bin and on, and manifest.json (dataset, revision, tokenizer hash, and for each
shard its tokens, documents and sha256). build-nanogpt's .npy and nanoGPT's train.bin and val.bin
(bare uint16) are read too.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import tyro

from data.tokenizer import EOT, RANKS_SHA256, decode
from launch.errors import BadInput, Failed, one_line_errors
from launch.files import atomic_write, free_bytes, fsync, sha256

MAGIC, VERSION = 20240520, 1  # dev/data/data_common.py of llm.c
HEADER = 256  # int32 values
HEADER_BYTES = 4 * HEADER
NANOGPT_NAMES = ("train.bin", "val.bin")
BLOCK = 1 << 24  # tokens read at a time from files of any size


@dataclass(frozen=True)
class Shard:
    """One file of tokens. tokens: uint16, memory-mapped; sha256: the manifest's, or empty."""

    path: Path
    tokens: np.ndarray
    sha256: str = ""

    def check(self) -> None:
        """Reads the whole file. Raises BadInput if its hash or a token in it is wrong."""
        if self.sha256 and sha256(self.path) != self.sha256:
            raise BadInput(
                f"{self.path} is not the file that manifest.json describes (its sha256 differs): "
                "make or download it again"
            )
        for start, part in blocks(self.tokens):
            if part.max() > EOT:
                at = start + int(np.argmax(part > EOT))
                raise BadInput(
                    f"{self.path} holds token {self.tokens[at]} at position {at:,}; "
                    f"GPT-2's largest is {EOT}: another tokenizer made it, or it is damaged"
                )


def blocks(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(position, tokens from there on), piece by piece."""
    for start in range(0, len(tokens), BLOCK):
        yield start, tokens[start : start + BLOCK]


def shard_bytes(tokens: np.ndarray) -> bytes:
    """A whole shard file. tokens: uint16, none above 50256."""
    if tokens.dtype != np.uint16 or len(tokens) == 0 or tokens.max() > EOT:
        raise ValueError(f"a shard takes uint16 tokens up to {EOT}, at least one")
    return header(len(tokens)) + tokens.astype("<u2").tobytes()


def header(tokens: int) -> bytes:
    """The 1,024 bytes before a shard's tokens."""
    numbers = np.zeros(HEADER, dtype="<i4")
    numbers[:3] = MAGIC, VERSION, tokens
    return numbers.tobytes()


class ShardWriter:
    """A shard written bit by bit under a hidden name; finish() gives it its own."""

    def __init__(self, path: Path, size: int) -> None:
        """size: tokens that it takes at most."""
        self.path, self.size, self.room, self.documents = path, size, size, 0
        self.temporary = path.with_name(f".{path.name}.tmp")
        self.file: BinaryIO = self.temporary.open("wb")
        self.digest = hashlib.sha256()
        self._write(header(size))

    def append(self, tokens: np.ndarray) -> None:
        """tokens: uint16, none above 50256, no more than there is room for."""
        if tokens.dtype != np.uint16 or len(tokens) > self.room or tokens.max(initial=0) > EOT:
            raise ValueError(f"a shard takes up to {self.size:,} uint16 tokens up to {EOT}")
        self._write(tokens.astype("<u2", copy=False).data.cast("B"))
        self.room -= len(tokens)
        self.documents += int((tokens == EOT).sum())

    def finish(self) -> dict[str, Any]:
        """Flushes and renames the file; returns its entry in the manifest."""
        tokens = self.size - self.room
        if self.room:  # the last shard of a stream
            self.file.seek(0)
            self.file.write(header(tokens))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        digest = sha256(self.temporary) if self.room else self.digest.hexdigest()
        self.temporary.replace(self.path)
        fsync(self.path.parent)
        return {"file": self.path.name, "tokens": tokens, "documents": self.documents,
                "sha256": digest}

    def abandon(self) -> None:
        """Removes what has been written."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def _write(self, content: bytes | memoryview) -> None:
        self.file.write(content)
        self.digest.update(content)


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


def open_shard(path: Path, expected_sha256: str = "") -> Shard:
    """Maps a shard into memory. Raises BadInput where header or length are wrong."""
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BadInput(f"can't read {path}: {error}") from None
        if tokens.dtype != np.uint16 or tokens.ndim != 1 or len(tokens) == 0:
            raise BadInput(f"{path} holds {tokens.dtype} of shape {tokens.shape}; "
                           "a shard is one row of uint16")
        return Shard(path, tokens, expected_sha256)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
    except OSError as error:
        raise BadInput(f"can't read the shard {path}: {error.strerror}") from None
    numbers = header[: len(header) // 4 * 4].view("<i4")
    if len(numbers) < 3 or numbers[0] != MAGIC:
        if path.name in NANOGPT_NAMES and size > 0 and size % 2 == 0:
            return Shard(path, np.memmap(path, dtype="<u2", mode="r"), expected_sha256)
        found = numbers[0] if len(numbers) else "nothing"
        raise BadInput(f"{path} is no shard: it begins with {found}, and a shard with {MAGIC}")
    if numbers[1] != VERSION:
        raise BadInput(f"{path} is a shard of version {numbers[1]}; version {VERSION} is read here")
    count = int(numbers[2])
    if count < 1 or size != HEADER_BYTES + 2 * count:
        raise BadInput(
            f"{path} should be {HEADER_BYTES + 2 * count:,} bytes long for the {count:,} tokens "
            f"of its header, and is {size:,}: it was cut short or written wrongly"
        )
    return Shard(path, np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES), expected_sha256)


def open_folder(folder: Path) -> tuple[list[Shard], list[Shard], str]:
    """(train shards, validation shards, the data set's name), in the order of their names.

    Raises BadInput where the folder is missing or incomplete.
    """
    make = f"python -m data.fineweb --dataset fineweb --sample 10BT --out {folder}"
    if not folder.is_dir():
        raise BadInput(f"no data in {folder}: `{make}` makes it, --data.dir names another folder")
    manifest = read_manifest(folder)
    listed = {entry["file"]: entry for entry in manifest.get("shards", [])}
    for file in listed:
        if not (folder / file).exists():
            raise BadInput(f"{folder / file} is in the manifest and not on the disk: `{make}`")
    files = sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".npy"))
    train: list[Shard] = []
    val: list[Shard] = []
    for path in files:
        kind = "val" if path.name == "val.bin" or "_val_" in path.name else "train"
        if kind == "train" and path.name != "train.bin" and "_train_" not in path.name:
            continue
        entry = listed.get(path.name, {})
        shard = open_shard(path, entry.get("sha256", ""))
        if entry and entry["tokens"] != len(shard.tokens):
            raise BadInput(f"{path} has {len(shard.tokens):,} tokens, the manifest "
                           f"{entry['tokens']:,}: make it again")
        (val if kind == "val" else train).append(shard)
    if not train or not val:
        missing = "train" if not train else "validation"
        raise BadInput(f"{folder} holds no {missing} shard (NAME_train_000001.bin, "
                       f"NAME_val_000000.bin): `{make}`")
    return train, val, manifest.get("dataset") or folder.name


def read_manifest(folder: Path) -> dict:
    """The folder's manifest.json; empty where there is none, as other projects have none."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"can't read {path}: {error}") from None
    entries = manifest.get("shards") if isinstance(manifest, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and {"file", "tokens", "sha256"} <= e.keys() for e in entries
    ):
        raise BadInput(f"{path} is no manifest: expected file, tokens and sha256 for each shard")
    return manifest


Folder = Annotated[Path, tyro.conf.Positional]


def verify(folder: Folder) -> None:
    """Checks every shard of a folder and prints a line for each."""
    train, val, dataset = open_folder(folder)
    for shard in val + train:
        shard.check()
        how = "sha256 and tokens right" if shard.sha256 else "tokens right, no manifest"
        print(f"{shard.path.name}: {len(shard.tokens):,} tokens, {how}")
    total = sum(len(shard.tokens) for shard in val + train)
    print(f"{dataset}: {len(val) + len(train)} shards, {total:,} tokens, all right")


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
    manifest = read_manifest(folder)
    if manifest.get("revision"):
        print(f"revision {manifest['revision']}")
    for key, value in manifest.get("statistics", {}).items():
        print(f"{key}: {value:,}")
    beginning = decode((val + train)[0].tokens[:1024].tolist())
    text = next((text for text in beginning.split("<|endoftext|>") if text), "")
    print(f"it begins: {text[:400]!r}")


def convert(folder: Folder, to: Literal["npy", "nanogpt"]) -> None:
    """Copies checked shards into FOLDER-npy (build-nanogpt) or FOLDER-nanogpt (two bare files)."""
    train, val, _ = open_folder(folder)
    target = folder.resolve().with_name(f"{folder.resolve().name}-{to}")
    needed = sum(2 * len(shard.tokens) for shard in val + train)
    if needed > free_bytes(target):
        raise BadInput(f"not enough disk: {needed / 1e9:,.2f} GB are needed for {target}")
    if to == "npy":
        parts = [(f"{shard.path.stem}.npy", [shard]) for shard in val + train]
    else:
        parts = [("val.bin", val), ("train.bin", train)]
    target.mkdir(exist_ok=True)
    for name, group in parts:
        for shard in group:
            shard.check()
        tokens = sum(len(shard.tokens) for shard in group)
        temporary = target / f".{name}.tmp"
        try:
            with temporary.open("wb") as file:
                if to == "npy":
                    np.lib.format.write_array_header_1_0(
                        file, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
                    )
                for shard in group:
                    for _, part in blocks(shard.tokens):
                        file.write(part.astype("<u2", copy=False).tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise Failed(f"can't write {target / name}: {error.strerror}") from None
        temporary.replace(target / name)
        fsync(target)
        print(f"{target / name}: {tokens:,} tokens")


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"verify": verify, "info": info, "convert": convert},
        args=arguments, prog="python -m data.shards",
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
