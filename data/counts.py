"""What there is to know of documents before anyone trains on them, counted as they are written.

Empty and over-long documents, exact duplicates, the share of bytes that aren't ASCII, tokens per
byte: a source that is broken or in another language shows here. 1,400 documents of FineWeb had
0.225 tokens a byte, and 0.95 % of their bytes weren't ASCII.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.tokenise import Tokens

LONG = 100_000  # tokens; a longer document is seldom a page that somebody wrote


@dataclass
class Counts:
    """Of the documents whose first token has been written."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    non_ascii_bytes: int = 0
    empty: int = 0
    longer_than_100k_tokens: int = 0
    longest_tokens: int = 0
    end_of_text_as_text: int = 0

    def add(self, tokens: Tokens, begin: int, end: int) -> np.ndarray:
        """Counts the documents that begin at tokens [begin, end); returns their uint64 hashes."""
        a, b = np.searchsorted(tokens.starts[:-1], [begin, end])
        lengths = np.diff(tokens.starts[a : b + 1]) - 1
        self.documents += int(b - a)
        self.tokens += end - begin
        self.text_bytes += int(tokens.text_bytes[a:b].sum())
        self.non_ascii_bytes += int(tokens.non_ascii[a:b].sum())
        self.empty += int((lengths == 0).sum())
        self.longer_than_100k_tokens += int((lengths > LONG).sum())
        self.longest_tokens = max(self.longest_tokens, int(lengths.max(initial=0)))
        self.end_of_text_as_text += int(tokens.end_of_text[a:b].sum())
        return tokens.hashes[a:b]

    def statistics(self, duplicates: int) -> dict[str, Any]:
        """The counts and what follows from them, for the manifest."""
        return asdict(self) | {
            "duplicates": duplicates,
            "non_ascii_share": round(self.non_ascii_bytes / max(1, self.text_bytes), 6),
            "tokens_per_byte": round(self.tokens / max(1, self.text_bytes), 6),
        }


def in_words(statistics: dict[str, Any]) -> str:
    """Some lines for the end of a job."""
    lines = (
        "{documents:,} documents: {empty:,} empty, {duplicates:,} that repeat another exactly, "
        "{longer_than_100k_tokens:,} longer than 100,000 tokens (the longest {longest_tokens:,})\n"
        "{non_ascii_share:.2%} of the bytes are not ASCII, {tokens_per_byte:.4f} tokens per byte"
    )
    if statistics["end_of_text_as_text"]:
        lines += "\n<|endoftext|> stands {end_of_text_as_text:,} times in documents and stays text"
    return lines.format(**statistics)


def count_duplicates(path: Path, memory: int = 1 << 27) -> int:
    """How many of a file's uint64 hashes repeat another; `memory` bytes are sorted at a time."""
    total = path.stat().st_size // 8
    passes = np.uint64(max(1, -(-8 * total // memory)))
    different = 0
    for part in range(int(passes)):
        chosen = []
        with path.open("rb") as file:
            while len(chunk := np.frombuffer(file.read(1 << 22), "<u8")):
                chosen.append(chunk[chunk % passes == part])
        different += len(np.unique(np.concatenate(chosen))) if chosen else 0
    return total - different
