"""Lesson 9: the five steps of a tokenizer.

A byte is its own id here; the first merge makes id 256, the next 257. merges: the pairs of ids in
the order in which they were learned.
"""

from collections.abc import Callable

Pair = tuple[int, int]


def train(chunks: list[bytes], count: int) -> list[Pair]:
    """Step 1: the first `count` merges of a text in chunks, or fewer where no pair is left.

    Pairs are counted at every place (aaa holds aa twice), none across two chunks. Of pairs that
    are as frequent the one met first wins. A merge is written from left to right.
    """
    raise NotImplementedError


def encode(text: bytes, merges: list[Pair]) -> list[int]:
    """The ids of a text. Of all pairs in it the one learned first is merged, until none is left."""
    raise NotImplementedError


def decode(ids: list[int], merges: list[Pair]) -> str:
    """The text of ids; bytes that are no UTF-8 become U+FFFD."""
    raise NotImplementedError


def split(text: str) -> list[str]:
    """Step 2: GPT-2's words, which are all of the text and in its order.

    Each is the first of these that fits: 's 't 're 've 'm 'll or 'd; letters, digits, or anything
    else that isn't white space, each with one space before it if there is one; white space up to
    the last of it, if a word follows; white space. `import regex` knows \\p{L} and \\p{N}.
    """
    raise NotImplementedError


def recover(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Step 3: the merges that made a vocabulary, by rank, out of its tokens' bytes and ranks.

    The dictionary is in no order. Tokens of one byte come from no merge. The token of rank r was
    made of the two parts at which byte pair encoding of its bytes stops if only ranks below r are
    merged.
    """
    raise NotImplementedError


def encode_special(
    text: str, encode: Callable[[str], list[int]], specials: dict[str, int], allowed: set[str]
) -> list[int]:
    """Step 4: the ids of a text in which the allowed special tokens stand for their ids.

    encode: what makes ids of everything else, piece by piece; special tokens that aren't allowed
    are text. Where one special token is the beginning of another the longer counts.
    """
    raise NotImplementedError


def code_points(text: str, symbols: dict[str, int]) -> list[int]:
    """Step 5: a character's id in symbols; of one that isn't there the bytes of its UTF-8."""
    raise NotImplementedError
