"""One shard: a file of GPT-2 tokens, read and written.

    shard = open_shard(Path("fineweb10B/fineweb_val_000000.bin"))
    shard.tokens[:10]                         # (10,) uint16, read from the disk
    shard.check()                             # every token, and the sha256 where one is known

Three formats are read: llm.c's (256 little-endian int32: 20240520, 1, number of tokens, zeros; then
uint16 tokens), build-nanogpt's .npy, and nanoGPT's train.bin and val.bin (bare uint16). llm.c's is
written. Files are read by pread and never mapped into memory: where a disk fails or a file is cut
short, a read is an error with a message, and a memory map is a SIGBUS that ends the process.
"""

import hashlib
import os
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.tokenizer import EOT
from launch import console
from launch.console import print0
from launch.errors import BadInput
from launch.files import fsync, hashed, refuse_lfs_pointer, sha256
from launch.progress import track

MAGIC, VERSION = 20240520, 1  # dev/data/data_common.py of llm.c
HEADER = 256  # int32 values
HEADER_BYTES = 4 * HEADER
NANOGPT_NAMES = ("train.bin", "val.bin")
BLOCK = 1 << 24  # tokens read at a time from files of any size
# GPT-2's ids from 40,000 on are 1.2 to 2 % of English text, and the longest stretch without one was
# 1,782 tokens (in 2.4 million of Shakespeare, the Bible, FineWeb and names). Characters, and
# vocabularies of 32,000, never reach it.
USUAL_LARGEST = 40_000
ENOUGH_TO_TELL = 4_096  # tokens


class TokenFile:
    """The tokens of a file, read when they are asked for: len(tokens), tokens[a:b].

    Raises BadInput where they can't be read, also where the file was cut short meanwhile.
    """

    def __init__(self, path: Path, offset: int, count: int) -> None:
        """offset: bytes before the first token. count: tokens in the file."""
        self.path, self.offset, self.count = path, offset, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        """(tokens of the slice,) uint16. The slice has no step."""
        start, end, _ = part.indices(self.count)
        return self.rows(np.array([start]), max(0, end - start))[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """(len(self),) uint16: all of it, where NumPy needs an array."""
        return self[:].astype(dtype or np.uint16, copy=False)

    def rows(self, starts: np.ndarray, count: int) -> np.ndarray:
        """(len(starts), count) uint16: the `count` tokens from each of these positions on."""
        rows = np.empty((len(starts), count), dtype="<u2")
        try:
            with self.path.open("rb", buffering=0) as file:
                for row, start in zip(rows, starts.tolist(), strict=True):
                    self._fill(file.fileno(), row, self.offset + 2 * start)
        except OSError as error:
            raise BadInput(f"can't read {self.path}: {error.strerror}") from None
        return rows

    def check_size(self) -> None:
        """Raises BadInput where the file isn't as long any more as when it was opened."""
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise BadInput(f"can't read {self.path}: {error.strerror}") from None
        if size < self.offset + 2 * self.count:
            self._cut_short(size)

    def _fill(self, file: int, row: np.ndarray, position: int) -> None:
        """Reads a row of tokens; the kernel may give less at a time than was asked for."""
        left = row.data.cast("B")
        while left:
            count = os.preadv(file, [left], position)
            if count == 0:
                self._cut_short(position)
            left, position = left[count:], position + count

    def _cut_short(self, size: int) -> None:
        raise BadInput(f"{self.path} ends after {size:,} bytes and had "
                       f"{self.offset + 2 * self.count:,} when it was opened: it was cut short")


@dataclass(frozen=True)
class Shard:
    """One file of tokens. tokens: uint16, in the file or in memory; sha256: of the manifest, or
    empty."""

    path: Path
    tokens: np.ndarray | TokenFile
    sha256: str = ""

    def check(self) -> None:
        """Reads the whole file. Raises BadInput if its hash or a token in it is wrong.

        Tokens that don't look like GPT-2's are only a warning, from rank 0. Those in memory this
        program has made itself; a text's characters are no tokens of GPT-2's.
        """
        if isinstance(self.tokens, np.ndarray):
            return
        try:
            if self.sha256 and hashed(self.path) != self.sha256:
                raise BadInput(
                    f"{self.path} is not the file that manifest.json describes (its sha256 "
                    "differs): make or download it again"
                )
        except OSError as error:
            raise BadInput(f"can't read {self.path}: {error.strerror}") from None
        largest = 0
        starts = range(0, len(self.tokens), BLOCK)
        for start in track(starts, f"checking the tokens of {self.path.name}", "block"):
            part = self.tokens[start : start + BLOCK]
            largest = max(largest, int(part.max()))
            if largest > EOT:
                at = int(np.argmax(part > EOT))
                raise BadInput(
                    f"{self.path} holds token {part[at]} at position {start + at:,}; "
                    f"GPT-2's largest is {EOT}: another tokenizer made it, or it is damaged"
                )
        if len(self.tokens) >= ENOUGH_TO_TELL and largest < USUAL_LARGEST:
            print0(console.warning(
                f"the largest token in {self.path} is {largest:,}, and GPT-2's text reaches "
                f"{EOT:,}: another tokenizer may have made it", sys.stderr), error=True)


def blocks(tokens: np.ndarray | TokenFile) -> Iterator[tuple[int, np.ndarray]]:
    """(position, tokens from there on), piece by piece."""
    for start in range(0, len(tokens), BLOCK):
        yield start, tokens[start : start + BLOCK]


def open_shard(path: Path, expected_sha256: str = "") -> Shard:
    """A shard whose header and length are right. Raises BadInput where they are not."""
    if path.is_symlink() and not path.exists():
        raise BadInput(f"{path} is a link to {path.readlink()}, and nothing is there")
    if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
        raise BadInput(f"{path} is no plain file, and a shard is one")
    try:
        refuse_lfs_pointer(path)
        open_format = _open_npy if path.suffix == ".npy" else _open_bin
        return Shard(path, open_format(path), expected_sha256)
    except OSError as error:
        raise BadInput(f"can't read the shard {path}: {error.strerror}") from None


def _open_npy(path: Path) -> TokenFile:
    """build-nanogpt's format, NumPy's own."""
    npy = np.lib.format
    try:
        with path.open("rb") as file:
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0
            if version != (1, 0):
                read_header = npy.read_array_header_2_0
            shape, _, dtype = read_header(file)
            offset = file.tell()
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError) as error:
        # The header is a line of Python, and NumPy has Python read it.
        raise BadInput(f"can't read the .npy header of {path}: {error!r}") from None
    if dtype != np.dtype("<u2") or len(shape) != 1 or shape[0] == 0:
        raise BadInput(f"{path} holds {dtype} of shape {shape}; a shard is one row of uint16")
    size, expected = path.stat().st_size, offset + 2 * shape[0]
    if size != expected:
        raise BadInput(f"{path} should be {expected:,} bytes long, and is {size:,}: it was cut "
                       "short or written wrongly")
    return TokenFile(path, offset, shape[0])


def _open_bin(path: Path) -> TokenFile:
    """llm.c's format, or nanoGPT's where the file has its name and no header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(HEADER_BYTES)
    numbers = np.frombuffer(first[: len(first) // 4 * 4], dtype="<i4")
    if len(numbers) == 0 or numbers[0] != MAGIC:
        if path.name in NANOGPT_NAMES:
            return _open_bare(path, size)
        found = numbers[0] if len(numbers) else "nothing"
        raise BadInput(f"{path} is no shard: it begins with {found}, and a shard with {MAGIC}")
    if len(numbers) < HEADER:
        raise BadInput(f"{path} ends within its header of {HEADER_BYTES:,} bytes: it was cut short")
    if numbers[1] != VERSION:
        raise BadInput(f"{path} is a shard of version {numbers[1]}; version {VERSION} is read here")
    count = int(numbers[2])
    if count < 1 or size != HEADER_BYTES + 2 * count:
        raise BadInput(
            f"{path} should be {HEADER_BYTES + 2 * count:,} bytes long for the {count:,} tokens "
            f"of its header, and is {size:,}: it was cut short or written wrongly"
        )
    return TokenFile(path, HEADER_BYTES, count)


def _open_bare(path: Path, size: int) -> TokenFile:
    """nanoGPT's format: tokens and nothing else."""
    if size == 0:
        raise BadInput(f"{path} is empty")
    if size % 2:
        raise BadInput(f"{path} is {size:,} bytes long, an odd number, and nanoGPT's tokens take "
                       "two bytes each: it was cut short, or it is something else")
    if path.with_name("meta.pkl").exists():
        raise BadInput(_foreign_vocabulary(path.parent))
    file = TokenFile(path, 0, size // 2)
    beginning = file[:ENOUGH_TO_TELL]
    if len(beginning) == ENOUGH_TO_TELL and not beginning[1::2].any():
        raise BadInput(f"{path} holds numbers of 32 bits (every second one of 16 is zero), and "
                       "nanoGPT's tokens for GPT-2 take 16: write them as np.uint16")
    return file


def _foreign_vocabulary(folder: Path) -> str:
    """nanoGPT's prepare.py writes meta.pkl where the vocabulary is the data's own, as of
    characters. It's a pickle, which could run anything, so nobody looks into it."""
    return (f"{folder} has a meta.pkl, so its tokens are numbers of nanoGPT's own vocabulary "
            "(characters) and not of GPT-2's. Train on the text that they were made of: "
            "--data.text input.txt")


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
