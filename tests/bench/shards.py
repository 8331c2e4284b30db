"""Shards from FineWeb's parquet: megabytes of text a second, end to end.

    GPT2_TEST_DATA=DIR python -m tests.bench shards

DIR holds some of FineWeb's files, fineweb_sample_*.parquet. The plain way: a pool of workers that
read parquet, tiktoken for each document, np.save. tests/measure_data.py measures more: each stage,
memory, and text of any length in which nothing repeats.
"""

import glob
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tiktoken

from data.tokenizer import EOT, encoding
from tests.bench.pairs import Done, Row, Work
from tests.running import ROOT

WORKERS = 2


def rows(quick: bool = False) -> list[Row]:
    """The table's rows of shards: none where there are no documents."""
    pattern = str(Path(os.environ.get("GPT2_TEST_DATA", ".")) / "fineweb_sample_*.parquet")
    files = sorted(glob.glob(pattern))[: 1 if quick else None]
    if not files:
        print("shards: left out, for $GPT2_TEST_DATA holds no fineweb_sample_*.parquet")
        return []
    return [Row("shards from parquet", "MB", partial(usual, files), partial(ours, files),
                tolerance=0)]


def megabytes(files: list[str]) -> float:
    """Of text."""
    texts = (text for path in files for text in pq.read_table(path)["text"].to_pylist())
    return sum(len(text.encode()) for text in texts) / 1e6


def ours(files: list[str]) -> Work:
    """python -m data.fineweb; the value is the number of tokens."""
    size = megabytes(files)

    def work() -> Done:
        with tempfile.TemporaryDirectory() as made:
            out = Path(made) / "shards"
            source = os.path.commonprefix(files) + "*.parquet" if len(files) > 1 else files[0]
            subprocess.run(
                [sys.executable, "-m", "data.fineweb", "--source", source, "--out", str(out),
                 "--workers", str(WORKERS)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            tokens = sum((path.stat().st_size - 1024) // 2 for path in out.glob("*.bin"))
        return Done(size, tokens)

    return work


def usual(files: list[str]) -> Work:
    """The plain way."""
    size = megabytes(files)

    def work() -> Done:
        out = Path(tempfile.mkdtemp())
        try:
            return Done(size, make(files, out, WORKERS))
        finally:
            shutil.rmtree(out)

    return work


def encode_group(job: tuple[str, int]) -> list[np.ndarray]:
    """uint16 tokens of each document of a row group."""
    path, group = job
    texts = pq.ParquetFile(path).read_row_group(group, columns=["text"]).column("text").to_pylist()
    encoder: tiktoken.Encoding = encoding()
    return [np.array([EOT, *encoder.encode_ordinary(text)], dtype=np.uint16) for text in texts]


def make(files: list[str], out: Path, workers: int, shard_tokens: int = 100_000_000) -> int:
    """Writes shard_000000.npy and on; returns the number of tokens."""
    jobs = [(path, group) for path in files
            for group in range(pq.ParquetFile(path).num_row_groups)]
    out.mkdir(parents=True, exist_ok=True)
    shard, filled, shards = np.empty(shard_tokens, dtype=np.uint16), 0, 0
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for documents in pool.imap(encode_group, jobs):
            for tokens in documents:
                while len(tokens):
                    part = tokens[: shard_tokens - filled]
                    shard[filled : filled + len(part)] = part
                    filled, tokens = filled + len(part), tokens[len(part) :]
                    if filled == shard_tokens:
                        np.save(out / f"shard_{shards:06d}.npy", shard)
                        filled, shards = 0, shards + 1
    np.save(out / f"shard_{shards:06d}.npy", shard[:filled])
    return shards * shard_tokens + filled


if __name__ == "__main__":  # tests/measure_data.py runs it as a process
    print(make(sorted(glob.glob(sys.argv[1])), Path(sys.argv[2]), *map(int, sys.argv[3:])),
          "tokens")
