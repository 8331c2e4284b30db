"""GPT-2's byte-pair encoding through tiktoken, without a network.

    >>> encode("Hello, I'm a language model,")
    [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    >>> decode([15496, 11])
    'Hello,'

gpt2.tiktoken.xz holds the 50,256 ranks as OpenAI publishes them (MIT, see NOTICE), compressed.
"""

import base64
import functools
import hashlib
import lzma
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken

EOT = 50256  # <|endoftext|>, which begins every document
VOCAB = 50257  # 256 bytes, 50,000 merges, EOT
RANKS_FILE = Path(__file__).with_name("gpt2.tiktoken.xz")
# The hash that tiktoken itself expects of r50k_base.tiktoken (tiktoken_ext/openai_public.py).
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# GPT-2's split of text into words (encoder.py of openai/gpt-2), with possessive quantifiers as in
# tiktoken, so that a megabyte of spaces doesn't backtrack.
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)


def read_ranks() -> dict[bytes, int]:
    """The 50,256 tokens and their ranks. Raises RuntimeError on a damaged file."""
    content = lzma.decompress(RANKS_FILE.read_bytes())
    if hashlib.sha256(content).hexdigest() != RANKS_SHA256:
        raise RuntimeError(f"{RANKS_FILE.name} is damaged: its sha256 is not tiktoken's r50k_base")
    lines = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@functools.cache
def encoding() -> tiktoken.Encoding:
    """tiktoken's encoding, built once a process. Raises RuntimeError on a damaged ranks file."""
    return tiktoken.Encoding(
        "gpt2",
        pat_str=PATTERN,
        mergeable_ranks=read_ranks(),
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=VOCAB,
    )


@functools.cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id without EOT, and the merges in their order, spelled as Hugging Face does."""
    glyph, ranks = byte_glyphs(), read_ranks()
    text = {token: "".join(glyph[byte] for byte in token) for token in ranks}
    pairs = (parents(token, ranks) for token in sorted(ranks, key=lambda token: ranks[token])
             if len(token) > 1)
    merges = [(text[first], text[second]) for first, second in pairs]
    return {text[token]: rank for token, rank in ranks.items()}, merges


def byte_glyphs() -> list[str]:
    """The printable character that stands for each byte (bytes_to_unicode of openai/gpt-2).

    Printable Latin-1 stands for itself; the other 68 bytes take the code points from 256 on.
    """
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
             *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256)]


def parents(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge is this one: what is left of it when lower ranks are merged.

    OpenAI publishes the ranks of the results; Hugging Face's files list the merges.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, EOT) for a, b in pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def encode(text: str) -> list[int]:
    """Token ids of a text. `<|endoftext|>` in it is ordinary text: EOT is never emitted."""
    return encoding().encode_ordinary(text)


def decode(ids: Sequence[int]) -> str:
    """The text of token ids; bytes that are no UTF-8 become U+FFFD. EOT reads <|endoftext|>."""
    return encoding().decode(ids)


def encode_documents(texts: Sequence[str]) -> np.ndarray:
    """uint16 tokens of all documents one after the other, each begun by EOT."""
    encoded = encoding().encode_ordinary_batch(list(texts))
    return np.concatenate([np.array([EOT, *ids], dtype=np.uint16) for ids in encoded])
