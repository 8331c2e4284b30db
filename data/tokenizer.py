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


def byte_characters() -> list[str]:
    """The printable character by which vocabulary files spell each of the 256 bytes.

    Bytes that print in Latin-1 are themselves, the 68 others U+0100 and on (encoder.py of
    openai/gpt-2).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


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
