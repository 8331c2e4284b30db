"""GPT-2's byte-pair encoding through tiktoken, without a network.

    >>> encode("Hello, I'm a language model,")
    [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    >>> decode([15496, 11])
    'Hello,'

vocab.bpe.xz holds the 50,000 merges as OpenAI publishes them (MIT, see NOTICE), compressed.
"""

import codecs
import functools
import hashlib
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from data.config import VOCAB

EOT = 50256  # <|endoftext|>, which begins every document
EOT_TEXT = "<|endoftext|>"  # as files spell it
MERGES_FILE = Path(__file__).with_name("vocab.bpe.xz")
# The hashes that tiktoken itself expects (tiktoken_ext/openai_public.py) of vocab.bpe, and of
# r50k_base.tiktoken, which says the same; manifests name the tokenizer by the second.
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# GPT-2's split of text into words, `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|
# \s+(?!\S)|\s+` (encoder.py of openai/gpt-2), as the same words without backtracking: possessive
# quantifiers as in tiktoken, and for `\s+(?!\S)`, all of a run of white space but its last, the
# white space that another follows. Taken by the thousand: tiktoken's regular expressions hold no
# more than a million places to return to, and a file may hold a million spaces.
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|"
    r"\s++$|(?>(?:\s(?=\s)){1,1000})++|\s"
)


def read_merges() -> list[tuple[str, str]]:
    """The 50,000 merges in their order. Raises RuntimeError on a damaged file."""
    content = lzma.decompress(MERGES_FILE.read_bytes())
    if hashlib.sha256(content).hexdigest() != MERGES_SHA256:
        raise RuntimeError(f"{MERGES_FILE.name} is damaged: its sha256 is not OpenAI's")
    lines = content.decode().split("\n")[1:-1]  # the first names a version
    return [(first, second) for first, second in map(str.split, lines)]


@functools.cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id without EOT, and the merges in their order, spelled as OpenAI does."""
    merges = read_merges()
    tokens = [*sorted(byte_glyphs()), *(first + second for first, second in merges)]
    return {token: rank for rank, token in enumerate(tokens)}, merges


@functools.cache
def encoding() -> tiktoken.Encoding:
    """tiktoken's encoding, built once a process. Raises RuntimeError on a damaged merges file."""
    bytes_of = {ord(glyph): byte for byte, glyph in enumerate(byte_glyphs())}
    return tiktoken.Encoding(
        "gpt2",
        pat_str=PATTERN,
        mergeable_ranks={token.translate(bytes_of).encode("latin-1"): rank
                         for token, rank in vocabulary()[0].items()},
        special_tokens={EOT_TEXT: EOT},
        explicit_n_vocab=VOCAB,
    )


def byte_glyphs() -> list[str]:
    """The printable character that stands for each byte (bytes_to_unicode of openai/gpt-2).

    Printable Latin-1 stands for itself; the other 68 bytes take the code points from 256 on.
    """
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
             *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256)]


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


def token_bytes(token: int) -> bytes:
    """The bytes of one token; they need not be whole characters."""
    return encoding().decode_single_token_bytes(token)


@dataclass(frozen=True)
class Tokenizer:
    """What a model's tokens stand for: GPT-2's, or the characters of a text (data/chars.py)."""

    n_vocab: int
    eot: int | None  # ends a text; None: nothing does
    first: int  # what a text begins with that has no token of its own yet
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    token_bytes: Callable[[int], bytes]
    characters: str = ""  # of which the vocabulary consists, in the order of their ids


GPT2 = Tokenizer(VOCAB, EOT, EOT, encode, decode, token_bytes)


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer = GPT2) -> Iterator[str]:
    """Text as its tokens come; bytes wait until their character is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(tokenizer.token_bytes(token))
    yield decoder.decode(b"", final=True)
