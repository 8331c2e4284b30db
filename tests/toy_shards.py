"""A small folder of shards, and what damages one of them."""

import struct
from pathlib import Path

import numpy as np

from data.shards import write_folder

TOKENS = np.array([50256, 5, 6, 50256, 7, 0], dtype=np.uint16)


def write_toy(folder: Path) -> Path:
    """The folder of three shards that is made in this one."""
    path = folder / "toy"
    write_folder(path, "toy", [TOKENS, TOKENS[:3]], TOKENS[3:], "toy set")
    return path


def change(path: Path, **words: int) -> None:
    """Damages a shard: its magic number, version, last token or length."""
    content = bytearray(path.read_bytes())
    if "magic" in words:
        content[:4] = struct.pack("<i", words["magic"])
    if "version" in words:
        content[4:8] = struct.pack("<i", words["version"])
    if "last" in words:
        content[-2:] = struct.pack("<H", words["last"])
    path.write_bytes(content[: words.get("length", len(content))])
