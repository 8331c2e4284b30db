"""Documents to tokens, on every core: fastokens where it's installed, tiktoken where not.

fastokens (Apache-2.0) takes less than a fifth of tiktoken's CPU time, and is built here from the
same merges. tiktoken stays the definition: a sample of every piece is encoded again with it, and a
difference stops the job.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data.tokenizer import EOT, EOT_TEXT, encoding, vocabulary
from launch.errors import Failed

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE_EVERY = 1_000_000  # tokens from one checked document to the next: 150 in a shard of 10^8

# Texts -> (ids of all of them one after the other, where each begins and the last ends).
Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Tokens:
    """Tokens of some documents, each begun by EOT, and what there is to count about them."""

    ids: np.ndarray  # (tokens,) uint16
    starts: np.ndarray  # (documents + 1,) int64: where each begins, and the number of tokens
    text_bytes: np.ndarray  # (documents,) int64, of UTF-8
    non_ascii: np.ndarray  # (documents,) int64: how many of these bytes are above 127
    end_of_text: np.ndarray  # (documents,) int64: how often `<|endoftext|>` is text in them
    hashes: np.ndarray  # (documents,) uint64: equal for equal documents


def encoder(workers: int) -> tuple[str, Encode]:
    """(name, function) of the fastest tokenizer that is installed, on this many threads.

    fastokens fixes its number of threads when it's first used in a process.
    """
    os.environ.setdefault("RAYON_NUM_THREADS", str(workers))
    try:
        import fastokens
    except ImportError:
        return "tiktoken", _tiktoken(workers)
    fast = fastokens.Tokenizer.from_json_str(tokenizer_json())

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        content, bounds = fast.encode_batch_flat(list(texts))
        return np.frombuffer(content, "<u4"), np.frombuffer(bounds, "<u8").astype(np.int64)

    return "fastokens", encode


@functools.cache
def tokenizer_json() -> str:
    """GPT-2's tokenizer as Hugging Face's tokenizer.json, without special tokens.

    Built like this and not by from_tiktoken, fastokens 0.3.5 splits words by a program of its own
    for GPT-2 and not by a regular expression: measured on FineWeb, less than half the CPU time.
    """
    vocab, merges = vocabulary()
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "dropout": None, "unk_token": None,
             "fuse_unk": False, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
                       "normalizer": None, "pre_tokenizer": split, "post_processor": None,
                       "decoder": split, "model": model})


def _tiktoken(workers: int) -> Encode:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tiktoken")

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return _joined(list(pool.map(encode_exactly, texts)))

    return encode


def _joined(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
    return np.concatenate([*parts, np.empty(0, np.uint32)]), offsets


def encode_exactly(text: str) -> np.ndarray:
    """(tokens,) uint32 of tiktoken: the definition. Other threads run meanwhile."""
    return encoding().encode_to_numpy(text, disallowed_special=())


def tokenise(texts: "pa.Array", encode: Encode, sample_every: int = SAMPLE_EVERY) -> Tokens:
    """Tokens of an Arrow array of strings. Raises Failed if tiktoken sees one of them otherwise.

    Every document is checked that holds one of the tokens 0, sample_every, 2 sample_every, ... or
    the last: a shard of sample_every tokens or more holds at least one.
    """
    if len(texts) == 0:
        none = np.zeros(0, np.int64)
        return Tokens(none.astype(np.uint16), np.zeros(1, np.int64), none, none, none,
                      none.astype(np.uint64))
    strings = texts.to_pylist()
    ids, offsets = encode(strings)
    starts = offsets + np.arange(len(offsets))  # an EOT before each document
    with_eot = np.insert(ids.astype(np.uint16), offsets[:-1], EOT)
    at = np.append(np.arange(0, len(with_eot), sample_every), len(with_eot) - 1)
    for i in np.unique(np.searchsorted(starts, at, side="right") - 1):
        in_document = ids[offsets[i] : offsets[i + 1]]
        if not np.array_equal(in_document, encode_exactly(strings[i])):
            raise Failed(f"tiktoken encodes otherwise a document that begins with "
                         f"{strings[i][:60]!r}: report it, and `pip uninstall fastokens` to "
                         "go on without")
    content, ends = _content(texts)
    return Tokens(
        ids=with_eot,
        starts=starts,
        text_bytes=np.diff(ends),
        non_ascii=_per_document(np.flatnonzero(content > 127), ends),
        end_of_text=_per_document(_end_of_text(content, ends), ends),
        hashes=_hashes(with_eot, starts),
    )


def _content(texts: "pa.Array") -> tuple[np.ndarray, np.ndarray]:
    """(bytes of all texts, (documents + 1,) where each begins in them and the last ends)."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset :][: len(texts) + 1]
    content = np.frombuffer(data if data else b"", np.uint8)
    return content[ends[0] : ends[-1]], ends - ends[0]


def _per_document(positions: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many of these positions, which rise, lie in each document."""
    return np.diff(np.searchsorted(positions, ends))


def _end_of_text(content: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Where each `<|endoftext|>` begins; one that two documents make together is none.

    Bars are rare, and numpy finds them several times faster than Python the whole string.
    """
    begins = np.flatnonzero(content[1:] == ord("|"))
    begins = begins[content[begins] == ord("<")]
    document_ends = ends[np.searchsorted(ends, begins, side="right")]
    begins = begins[begins + len(EOT_TEXT) <= document_ends]
    found = [begin for begin in begins.tolist()
             if bytes(content[begin : begin + len(EOT_TEXT)]) == EOT_TEXT.encode()]
    return np.array(found, dtype=np.int64)


def _hashes(ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Equal tokens are equal texts. Among 10^9 documents two hashes of 64 bits meet by chance
    with probability 0.03."""
    content = ids.data.cast("B")
    bounds = (2 * starts).tolist()
    return np.frombuffer(
        b"".join(
            hashlib.blake2b(content[a:b], digest_size=8).digest()
            for a, b in zip(bounds, bounds[1:], strict=False)
        ),
        "<u8",
    )
