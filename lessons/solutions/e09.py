"""Lesson 9, solved."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import regex

Pair = tuple[int, int]


def _merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    """The ids with `new` wherever the pair stands, from left to right."""
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def train(chunks: list[bytes], count: int) -> list[Pair]:
    """Step 1."""
    texts = [list(chunk) for chunk in chunks]
    merges: list[Pair] = []
    while len(merges) < count:
        pairs = Counter(pair for ids in texts for pair in pairwise(ids))
        if not pairs:
            break
        best = max(pairs, key=pairs.__getitem__)  # a Counter keeps the order of first meetings
        texts = [_merge(ids, best, 256 + len(merges)) for ids in texts]
        merges.append(best)
    return merges


def encode(text: bytes, merges: list[Pair]) -> list[int]:
    """Oldest merge first."""
    age = {pair: i for i, pair in enumerate(merges)}
    ids = list(text)
    while len(ids) > 1:
        oldest = min(pairwise(ids), key=lambda pair: age.get(pair, math.inf))
        if oldest not in age:
            break
        ids = _merge(ids, oldest, 256 + age[oldest])
    return ids


def decode(ids: list[int], merges: list[Pair]) -> str:
    """Bytes first, then text: a token may end inside a character."""
    bytes_of = {byte: bytes([byte]) for byte in range(256)}
    for i, (left, right) in enumerate(merges):
        bytes_of[256 + i] = bytes_of[left] + bytes_of[right]
    return b"".join(bytes_of[token] for token in ids).decode(errors="replace")


def split(text: str) -> list[str]:
    """Step 2."""
    pattern = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|"
               r"\s+(?!\S)|\s+")
    return regex.findall(pattern, text)


def recover(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Step 3."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, math.inf) for left, right in pairwise(parts)]
            if min(joined) >= ranks[token]:
                break  # more than two parts: it is ambiguous
            i = joined.index(min(joined))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def encode_special(
    text: str, encode: Callable[[str], list[int]], specials: dict[str, int], allowed: set[str]
) -> list[int]:
    """Step 4."""
    if not allowed:
        return encode(text)
    longest_first = sorted(allowed, key=len, reverse=True)
    ids = []
    for part in regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text):
        ids += [specials[part]] if part in allowed else encode(part)
    return ids


def code_points(text: str, symbols: dict[str, int]) -> list[int]:
    """Step 5."""
    ids = []
    for character in text:
        if character in symbols:
            ids.append(symbols[character])
        else:
            ids += character.encode()
    return ids
