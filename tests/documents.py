"""Documents to make shards of, and jobs that make them."""

import json
import random
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.fineweb import FineWebConfig, make
from data.tokenizer import EOT, decode
from launch.errors import BadInput, Failed
from tests.running import ROOT, environment

WORDS = ["spirit", "of", "god", "hovering", "over", "the", "deep", "—", "and", "it's", "¿señor?"]


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 0 to 60 words; every 50th is empty, every 7th repeats the one before it."""
    rng = random.Random(seed)
    made: list[str] = []
    for i in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randrange(1, 60)))
        made.append("" if i % 50 == 49 else made[-1] if i % 7 == 6 else text)
    return made


def write_parquet(path: Path, documents: list[str | None], rows: int = 30) -> None:
    table = pa.table({"id": range(len(documents)), "text": pa.array(documents, pa.string())})
    pq.write_table(table, path, row_group_size=rows)


def run(source: str, out: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(source, out, *arguments), env=environment(**env), cwd=ROOT,
                          capture_output=True, text=True, timeout=120)


def command(source: str, out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "data.fineweb", "--source", source, "--out", str(out),
            "--shard_tokens", "1000", *arguments]


def read_independently(out: Path) -> list[int]:
    """All tokens of a folder, from llm.c's description of the format and not from our code."""
    stream: list[int] = []
    for number, path in enumerate(sorted(out.glob("*.bin"), key=lambda path: path.stem[-6:])):
        assert path.name == f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"
        content = path.read_bytes()
        magic, version, count, *rest = struct.unpack("<256i", content[:1024])
        assert (magic, version, any(rest)) == (20240520, 1, False)
        stream += struct.unpack(f"<{count}H", content[1024:])
    return stream


def documents_of(out: Path) -> list[str]:
    """The documents that a folder's shards hold."""
    stream = read_independently(out)
    starts = [i for i, token in enumerate(stream) if token == EOT]
    assert starts[0] == 0
    return [decode(stream[a + 1 : b]) for a, b in pairwise([*starts, len(stream)])]


def made(source: Path | str, out: Path, **settings) -> tuple[list[str], dict]:
    """(the documents in the shards of a source, their manifest)."""
    make(FineWebConfig(out, source=str(source), **({"shard_tokens": 1000} | settings)))
    return documents_of(out), json.loads((out / "manifest.json").read_text())


def failing(call, after: int):
    calls = iter(range(after))

    def maybe(*args):
        if next(calls, None) is None:
            raise Failed("on purpose")
        return call(*args)

    return maybe


def refused(line: str, error: type[BadInput] = BadInput, **settings) -> None:
    with pytest.raises(error, match=line):
        make(FineWebConfig(**({"shard_tokens": 1000} | settings)))
