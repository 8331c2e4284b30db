"""What counting reaches: the loss of pairs of tokens, for runs on a text or the embedded corpus.

A model above it hasn't learnt which token follows which. lessons/02_bigrams.py builds it up.
"""

from dataclasses import fields
from pathlib import Path

import numpy as np

from data.loader import DataConfig, fingerprint, open_data, validation_sequences
from eval.report.record import Record
from launch.errors import BadInput

PRIORS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def counted_floor(record: Record) -> dict[str, str]:
    """{its name: the floor of a run in a line}; nothing for shards, or where the text has changed
    or isn't here."""
    settings = record.settings("data")
    if settings.get("dir") or not (settings.get("text") == "" or is_file(settings.get("text"))):
        return {}
    names = {field.name for field in fields(DataConfig)}
    try:
        config = DataConfig(**{key: settings[key] for key in settings.keys() & names})
        data = open_data(config)
        T = int(record.settings("model")["n_ctx"])
        V = int(record.settings("model")["n_vocab"])
        wanted = int(record.settings("evaluation").get("val_tokens") or record.config["val_tokens"])
        trained_on = record.description["must_match"]["training data"]
        count = validation_sequences(data.val, T, wanted) * T
    except (BadInput, KeyError, TypeError, ValueError):  # anybody's config.json
        return {}
    if fingerprint(data.train) != trained_on:
        return {}
    loss = bigram_loss(data.train.read(0, len(data.train)), data.val.read(0, count + 1), V)
    return {"counted floor": f"{loss:.4f}, pairs of tokens counted in its training text"}


def is_file(path: object) -> bool:
    return isinstance(path, str) and Path(path).is_file()


def bigram_loss(train: np.ndarray, val: np.ndarray, V: int) -> float:
    """Nats a token on val (but its first), each predicted from the one before it, by counts.

    p(y | x) = (n(x y) + k p(y)) / (n(x) + k),   p(y) = (n(y) + 1) / (N + V)
    (Dirichlet smoothing: a token seen rarely leans on how frequent its successors are anywhere.)
    k is the best of PRIORS for these very tokens, which does the count a favour.

    train (N,), val (M,): tokens below V.
    """
    train, val = train.astype(np.int64), val.astype(np.int64)
    unigram = (np.bincount(train, minlength=V) + 1) / (len(train) + V)  # (V,)
    firsts = np.bincount(train[:-1], minlength=V)  # (V,): n(x)
    pairs, counts = np.unique(train[:-1] * V + train[1:], return_counts=True)
    x, y = val[:-1], val[1:]  # each (M - 1,)
    place = np.searchsorted(pairs, x * V + y).clip(max=len(pairs) - 1)
    seen = np.where(pairs[place] == x * V + y, counts[place], 0)  # n(x y)
    return min(float(-np.log((seen + k * unigram[y]) / (firsts[x] + k)).mean()) for k in PRIORS)
