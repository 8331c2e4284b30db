"""How shards are usually made: workers that read parquet, tiktoken per document, np.save.

    python -m tests.baseline 'DIR/*.parquet' OUT WORKERS [SHARD_TOKENS]
"""

import glob
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tiktoken

from data.tokenizer import EOT, encoding


def encode_group(job: tuple[str, int]) -> list[np.ndarray]:
    """uint16 tokens of each document of a row group."""
    path, group = job
    texts = pq.ParquetFile(path).read_row_group(group, columns=["text"]).column("text").to_pylist()
    encoder: tiktoken.Encoding = encoding()
    return [np.array([EOT, *encoder.encode_ordinary(text)], dtype=np.uint16) for text in texts]


def make(pattern: str, out: Path, workers: int, shard_tokens: int = 100_000_000) -> int:
    """Writes shard_000000.npy and on; returns the number of tokens."""
    jobs = [(path, group) for path in sorted(glob.glob(pattern))
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


if __name__ == "__main__":
    print(make(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])), "tokens")
