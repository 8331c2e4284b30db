r"""Lesson 9: byte pair encoding, trained, from eleven letters to GPT-2's own 50,000 merges.

    python lessons/09_tokenizer.py

Needs the names and tiny shakespeare (lessons/course.py fetches them); 15 seconds on a quiet core.
Same as lesson 8: a model sees numbers. Different: what they stand for is learned from text first.
Figures: 100,000 bytes of shakespeare in 47,586 tokens after 256 merges, 196,113 bytes of names in
101,713; 50,000 merges recovered from GPT-2's ranks; 60,826 tokens that are data/tokenizer.py's.
"""

# %% The start
import json
import math
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import pairwise, zip_longest
from pathlib import Path

import regex

sys.path.insert(0, "..")  # for a notebook, which runs in its own folder
sys.path.insert(0, ".")  # for a program, which runs in the repository's root
from data import tokenizer
from lessons import course
from lessons.solutions import e09

Pair = tuple[int, int]


def exact(what: str, value: int, right: int, other=None, text=course.SHAKESPEARE) -> None:
    """A figure without a band. other: what it is on the embedded text, where that differs."""
    other = right if other is None else other
    course.figure(what, value, right, right, embedded=(other, other), text=text)


def unlike(ids: Iterable, others: Iterable) -> int:
    """At how many places two lists differ."""
    return sum(a != b for a, b in zip_longest(ids, others))


# %% Step 1: train
# Text is bytes, and a byte is a number below 256. The pair of neighbours that stands there most
# often gets a new number, then the next pair, until the vocabulary is as large as it may be.
# Counting looks at every place (`aaa` holds `aa` twice), writing goes from left to right (`aaa`
# becomes `Xa`). Of pairs that are as frequent the one met FIRST wins: our rule, the method has
# none. No pair crosses the border between two chunks (step 2).
def merge(ids: Iterable[int], pair: Pair, new: int) -> list[int]:
    """The ids with `new` wherever the pair stands."""
    left, right = pair
    merged: list[int] = []
    for token in ids:
        if token == right and merged and merged[-1] == left:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


def learn(chunks: Iterable[Iterable[int]], count: int, first: int = 256):
    """`count` merges {pair: new id} in their order, and what they make of the text."""
    ids = [token for chunk in chunks for token in (*chunk, None)]  # None: a border
    merges: dict[Pair, int] = {}
    for new in range(first, first + count):
        counts = Counter(pairwise(ids))  # in the order in which pairs are met
        pairs = {pair: times for pair, times in counts.items() if None not in pair}
        if not pairs:
            break
        best = max(pairs, key=pairs.__getitem__)  # the first of those that are as frequent
        merges[best] = new
        ids = merge(ids, best, new)
    return merges, [token for token in ids if token is not None]


# %% Encode and decode
# Encoding replays the merges in the order in which they were learned: of all pairs in the text the
# oldest goes first, wherever it stands. Decoding puts bytes side by side, and what isn't UTF-8
# becomes U+FFFD. `byte_ids`, `pattern` and `specials` belong to steps 3, 2 and 4.
class Tokenizer:
    """Text to ids and back. pattern: what cuts text into chunks ("": nothing does)."""

    def __init__(self, merges: dict[Pair, int], pattern="", specials=None, byte_ids=range(256)):
        self.merges, self.pattern = merges, pattern
        self.specials, self.byte_ids = specials or {}, list(byte_ids)
        self.bytes_of = {token: bytes([byte]) for byte, token in enumerate(self.byte_ids)}
        for (left, right), new in merges.items():
            self.bytes_of[new] = self.bytes_of[left] + self.bytes_of[right]
        self.bytes_of |= {token: text.encode() for text, token in self.specials.items()}
        self.encode_chunk = lru_cache(100_000)(self._encode_chunk)  # most words come again

    def _encode_chunk(self, chunk: bytes) -> list[int]:
        ids = [self.byte_ids[byte] for byte in chunk]
        while len(ids) > 1:
            oldest = min(pairwise(ids), key=lambda pair: self.merges.get(pair, math.inf))
            if oldest not in self.merges:
                break
            ids = merge(ids, oldest, self.merges[oldest])
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Special tokens in the text are text like any other."""
        chunks = regex.findall(self.pattern, text) if self.pattern else [text]
        return [token for chunk in chunks for token in self.encode_chunk(chunk.encode())]

    def encode(self, text: str, allowed_special: str | Collection[str] = "none_raise") -> list[int]:
        """allowed_special: "all", "none" (they are text), "none_raise" (ValueError), or a set."""
        if allowed_special == "none_raise" and any(word in text for word in self.specials):
            raise ValueError("a special token stands in the text, and is not allowed there")
        if isinstance(allowed_special, str):
            allowed_special = self.specials if allowed_special == "all" else ()
        # The exercise: the text split at special tokens, of which the longest is found first.
        return e09.encode_special(text, self.encode_ordinary, self.specials, set(allowed_special))

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.bytes_of[token] for token in ids).decode(errors="replace")

    def save(self, path: Path) -> None:
        """As JSON: names and numbers, nothing that runs when it's read."""
        merges = [[*pair, new] for pair, new in self.merges.items()]
        path.write_text(json.dumps([merges, self.pattern, self.specials, self.byte_ids]))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        merges, *others = json.loads(path.read_text())
        return cls({(left, right): new for left, right, new in merges}, *others)


# %% Two first tries
# Wikipedia's example. `aa` goes first; then `Xa` and `ab` stand there twice each, and whichever
# goes, the third merge makes the same five tokens: the ids don't show the tie rule, merges do.
merges, _ = learn([b"aaabdaaabac"], 3)
ids = Tokenizer(merges).encode("aaabdaaabac")
print("aaabdaaabac ->", ids, "by", list(merges))
exact("ids that are not the article's", unlike(ids, [258, 100, 258, 97, 99]), 0)
shakespeare = course.shakespeare()
start = shakespeare.encode()[:100_000].decode(errors="ignore")
merges, left = learn([start.encode()], 256)
basic = Tokenizer(merges)
exact("shakespeare, 256 merges: tokens", len(left), 47_586, 40_317)
exact("encode() makes others of it", unlike(basic.encode(start), left), 0)
print("first merges:", [basic.decode([token]) for token in range(256, 264)])

# %% Step 2: cut the text first
# Merges like `e ` and `, ` glue a word to whatever follows it: `dog.` and `dog!` share nothing.
# GPT-4's pattern (cl100k_base of tiktoken) keeps letters, digits (by three) and punctuation apart,
# and a space with the word behind it. It costs next to no tokens, or saves some. Names are chunks.
GPT4 = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|"
        r"\s*[\r\n]|\s+(?!\S)|\s+")
merges, left = learn([word.encode() for word in regex.findall(GPT4, start)], 256)
exact("cut by GPT-4's pattern: tokens", len(left), 46_482, 40_331)
split = Tokenizer(merges, GPT4)
print("first merges:", [split.decode([token]) for token in range(256, 264)])
names = course.names()
_, left = learn([name.encode() for name in names], 256)
exact("names, a chunk each: bytes", len("".join(names)), 196_113, 83_923, course.NAMES)
exact("names, 256 merges: tokens", len(left), 101_713, 44_114, course.NAMES)

# %% Step 3: GPT-2's merges, out of its ranks
# tiktoken publishes each token's bytes and rank, and no merges. They are in there: the token of
# rank r was made of two older ones. So of its bytes let those neighbours go together whose join has
# the lowest rank, while that is below r (the exercise): what is left should be two parts, its
# merge. Bytes have ranks too, in an order of their own: "A" is 32.
ranks = {tokenizer.token_bytes(rank): rank for rank in range(tokenizer.EOT)}
pairs = [(ranks[left], ranks[right]) for left, right in e09.recover(ranks)]
spelled = tokenizer.vocabulary()[0]  # a token's rank, by the glyphs that OpenAI has for its bytes
theirs = [(spelled[left], spelled[right]) for left, right in tokenizer.read_merges()]
byte_ids = [ranks[bytes([byte])] for byte in range(256)]
exact("merges recovered from GPT-2's ranks", len(pairs), 50_000)
exact("ambiguous ones", sum(len(token) > 1 for token in ranks) - len(pairs), 0)
exact("other than OpenAI's own list", unlike(pairs, theirs), 0)
exact("bytes whose rank is another number", unlike(byte_ids, range(256)), 256)

# %% Step 4: special tokens
# `<|endoftext|>` comes from no merge: its id is put in, where that is allowed. A stranger's text
# may spell it too, so the default refuses; data/tokenizer.py never emits it at all.
merges = {pair: 256 + i for i, pair in enumerate(pairs)}
gpt2 = Tokenizer(merges, tokenizer.PATTERN, {tokenizer.EOT_TEXT: tokenizer.EOT}, byte_ids)
text = f"{tokenizer.EOT_TEXT}hello world"
print("all: ", gpt2.encode(text, "all"), "\nnone:", gpt2.encode(text, "none"))
theirs = tokenizer.encoding().encode(text, allowed_special="all")
exact("ids that are not tiktoken's", unlike(gpt2.encode(text, "all"), theirs), 0)

# %% Step 5: characters for bytes
# sentencepiece merges characters: each that the text holds has an id, and ids below 256 remain
# bytes, for those never seen. A Korean syllable seen costs one id, not three; but of the same 512
# ids characters take theirs, and fewer are left for merges.
symbols = {character: 256 + i for i, character in enumerate(sorted(set(start)))}
_, left = learn([e09.code_points(start, symbols)], 256 - len(symbols), 256 + len(symbols))
exact("512 ids by characters: tokens", len(left), 51_272, 43_814)

# %% The door: data/tokenizer.py
# What our GPT-2 reads comes from tiktoken, with OpenAI's merges. The tokenizer above was built
# from ranks alone, and gives the same ids: for every token's own bytes, and for a text.
moved = [token for token, rank in ranks.items() if gpt2.encode_chunk(token) != [rank]]
exact("tokens that don't encode to themselves", len(moved), 0)
passage = shakespeare.encode()[:200_000].decode(errors="ignore")
ids = gpt2.encode(passage)
exact("200,000 bytes: tokens", len(ids), 60_826, 49_941)
exact("other than data/tokenizer.py's", unlike(ids, tokenizer.encode(passage)), 0)
