"""Streams of numbered tokens, and loaders that take batches of them."""

from pathlib import Path

import numpy as np
import torch

from data.loader import Loader, Stream
from data.shard_file import Shard
from data.tokenizer import EOT

T = 4


def stream(*lengths: int, documents: tuple[int, ...] = ()) -> Stream:
    """Shards whose tokens number the stream, so that a token says where it stood.

    Where documents of these lengths begin stands EOT, and the stream is aligned with them.
    """
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    begins = np.cumsum(documents, dtype=np.int64)
    tokens[begins[begins < len(tokens)]] = EOT
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    return Stream([Shard(Path(f"shard{i}"), part) for i, part in enumerate(parts)],
                  "documents" if documents else "stream")


def batches(loader: Loader, steps: range) -> list[torch.Tensor]:
    with_all = [loader.get_batch(step).reshape(-1, loader.T + 1) for step in steps]
    loader.close()
    return with_all


def make(source: Stream, sequences: int, **settings) -> Loader:
    return Loader(source, T=T, batch_tokens=sequences * T,
                  **({"micro_batch": 1, "seed": 3} | settings))
