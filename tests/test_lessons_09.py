"""Lesson 9: its figures, its tokenizers, the solutions right, every planted mistake named."""

import importlib
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex

from data import tokenizer
from lessons import grade
from lessons.checks import c09
from lessons.course import Wrong
from lessons.exercises import e09 as exercises
from lessons.solutions import e09 as solutions

ROOT = Path(__file__).parent.parent
TEXTS = {
    "empty": "",
    "one character": "?",
    "many scripts": "Grüße 42x, 안녕 \U0001f419!  it's <|endoftext|>\r\n",
    "an article": (ROOT / "README.md").read_text(),
}


@pytest.fixture(scope="module")
def lesson():
    """The lesson, run: it ends where a figure isn't what it should be."""
    return importlib.import_module("lessons.09_tokenizer")


@pytest.fixture(params=["basic", "split", "gpt2"])
def trained(lesson, request):
    """Merges of the bytes as they come, of GPT-4's chunks, of GPT-2."""
    return getattr(lesson, request.param)


# ---- minbpe's 21 kinds of cases, with GPT-2 in the place of cl100k_base ----


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_comes_back(trained, text):
    ids = trained.encode(text, "none")
    assert trained.decode(ids) == text
    assert len(ids) <= len(text.encode())


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_built_from_ranks_it_is_gpt2s(lesson, text):
    assert lesson.gpt2.encode(text, "none") == tokenizer.encode(text)


def test_special_tokens_stand_for_their_ids_where_they_are_allowed(lesson):
    text = "<|endoftext|>hello<|endoftext|> world"
    for allowed in ("all", {"<|endoftext|>"}):
        ids = lesson.gpt2.encode(text, allowed)
        assert ids == tokenizer.encoding().encode(text, allowed_special=allowed)
        assert lesson.gpt2.decode(ids) == text
    for allowed in ("none", set()):
        assert lesson.gpt2.encode(text, allowed) == tokenizer.encode(text)
    with pytest.raises(ValueError, match="special token"):
        lesson.gpt2.encode(text)


@pytest.mark.parametrize("pattern", ["", r"\p{L}+"], ids=["whole", "split"])
def test_wikipedias_example(lesson, pattern):
    merges, left = lesson.learn([b"aaabdaaabac"], 3)
    assert list(merges) == [(97, 97), (256, 97), (257, 98)]  # of equals the first one met
    assert left == [258, 100, 258, 97, 99]
    assert lesson.Tokenizer(merges, pattern).encode("aaabdaaabac") == left


@pytest.mark.parametrize("specials", [{}, {"<|a|>": 900, "<|a|>b": 901}], ids=["plain", "specials"])
def test_what_is_saved_is_loaded(lesson, tmp_path, specials):
    merges, _ = lesson.learn([TEXTS["an article"].encode()], 64)
    saved = lesson.Tokenizer(merges, tokenizer.PATTERN, specials)
    saved.save(tmp_path / "tokenizer.json")
    loaded = lesson.Tokenizer.load(tmp_path / "tokenizer.json")
    assert vars(loaded).keys() == vars(saved).keys()
    text = "<|a|>b and <|a|>: " + TEXTS["an article"][:2000]
    ids = saved.encode(text, "all")
    assert loaded.encode(text, "all") == ids
    assert loaded.decode(ids) == text
    assert {900, 901} & set(ids) == set(specials.values())


# ---- the exercises ----


@pytest.mark.parametrize("name", c09.CHECKS)
def test_the_solution_is_right(name):
    c09.CHECKS[name](getattr(solutions, name))


@pytest.mark.parametrize("name", c09.CHECKS)
def test_the_exercise_is_to_do(name):
    with pytest.raises(NotImplementedError):
        c09.CHECKS[name](getattr(exercises, name))


def trained_with(best=None, counted=None, merge=solutions._merge):
    """A train() with its choice of a pair, its way of counting or its merge replaced."""
    def train(chunks, count):
        texts, merges = [list(chunk) for chunk in chunks], []
        for _ in range(count):
            pairs = (counted or every_place)(texts)
            if not pairs:
                break
            merges.append((best or first_met)(pairs))
            texts = [merge(ids, merges[-1], 255 + len(merges)) for ids in texts]
        return merges
    return train


def every_place(texts):
    return Counter(pair for ids in texts for pair in pairwise(ids))


def first_met(pairs):
    return max(pairs, key=pairs.__getitem__)


def last_met(pairs):
    return max(reversed(pairs), key=pairs.__getitem__)


def without_overlaps(texts):
    pairs = Counter()
    for ids in texts:
        before = None
        for i, pair in enumerate(pairwise(ids)):
            if pair == before and pair[0] == pair[1]:
                before = None
                continue
            pairs[pair] += 1
            before = pair if i + 1 < len(ids) else None
    return pairs


def across_chunks(texts):
    return Counter(pairwise(token for ids in texts for token in ids))


def each_chunk_once(texts):
    return every_place(dict.fromkeys(map(tuple, texts)))


def merge_backwards(ids, pair, new):
    return solutions._merge(ids[::-1], pair[::-1], new)[::-1]


def merge_overlapping(ids, pair, new):
    places = [i for i, both in enumerate(pairwise(ids)) if both == pair]
    inside = {i + 1 for i in places} - set(places)
    return [new if i in places else token for i, token in enumerate(ids) if i not in inside]


def encode_greedily(text, merges):
    age, ids = {pair: 256 + i for i, pair in enumerate(merges)}, list(text)
    i = 0
    while i + 1 < len(ids):
        if (ids[i], ids[i + 1]) in age:
            ids[i : i + 2] = [age[ids[i], ids[i + 1]]]
        else:
            i += 1
    return ids


def encode_with(merge):
    def encode(text, merges):
        ids = list(text)
        for i, pair in enumerate(merges):
            ids = merge(ids, pair, 256 + i)
        return ids
    return encode


def encode_bytes_only(text, merges):
    ids = list(text)
    for i, (left, right) in enumerate(merges):
        if left < 256 and right < 256:
            ids = solutions._merge(ids, (left, right), 256 + i)
    return ids


def pieces(ids, merges):
    return [solutions.decode([token], merges) for token in ids]


def decode_with(errors, encoding="utf-8"):
    def decode(ids, merges):
        tokens = {byte: bytes([byte]) for byte in range(256)}
        for i, (left, right) in enumerate(merges):
            tokens[256 + i] = tokens[left] + tokens[right]
        return b"".join(tokens[token] for token in ids).decode(encoding, errors)
    return decode


def split_by(pattern):
    return lambda text: regex.findall(pattern, text)


def recover_any(ranks):
    """The first place where a token falls into two known ones."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        ways = [(token[:i], token[i:]) for i in range(len(token) - 1, 0, -1)]
        merges += [way for way in ways if way[0] in ranks and way[1] in ranks][:1]
    return merges


def recover_unordered(ranks):
    merges = solutions.recover(ranks)
    return sorted(merges, key=lambda pair: list(ranks).index(pair[0] + pair[1]))


def special_pattern(order, escape=re.escape, group="({})"):
    def encode_special(text, encode, specials, allowed):
        if not allowed:
            return encode(text)
        pattern = group.format("|".join(escape(word) for word in sorted(allowed, key=order)))
        ids = []
        for part in filter(None, re.split(pattern, text)):
            ids += [specials[part]] if part in allowed else encode(part)
        return ids
    return encode_special


def longest_first(word):
    return -len(word)


WRONG = [
    ("train", trained_with(best=last_met), "the last one met"),
    ("train", lambda chunks, count: [97, 256, 257], "a merge is a pair of ids"),
    ("train", lambda chunks, count: [p for p, _ in every_place(chunks).most_common(count)],
     "wasn't rewritten"),
    ("train", trained_with(counted=without_overlaps), "three times"),
    ("train", trained_with(counted=across_chunks), "across two chunks"),
    ("train", trained_with(counted=each_chunk_once), "comes twice counts twice"),
    ("train", trained_with(merge=merge_backwards), "from left to right"),
    ("encode", encode_greedily, "learned first goes first"),
    ("encode", encode_with(merge_backwards), "from left to right"),
    ("encode", encode_with(merge_overlapping), "used twice"),
    ("encode", encode_bytes_only, "merges of merges"),
    ("decode", lambda ids, merges: "".join(pieces(ids, merges)), "one by one"),
    ("decode", decode_with("strict", "latin-1"), "Latin-1"),
    ("decode", decode_with("strict"), "UnicodeDecodeError"),
    ("decode", decode_with("ignore"), "was dropped"),
    ("split", str.split, "the spaces are lost"),
    ("split", split_by(r"'ve| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"), "leaves its last space"),
    ("split", split_by(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "tried first"),
    ("split", split_by(r"'ve| ?\w+| ?[^\s\w]+|\s+(?!\S)|\s+"), "together"),
    ("split", split_by(r"'ve| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+"), "accents"),
    ("split", split_by(r"'ve| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "by three"),
    ("split", split_by(r"'ve| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?=\s\S)|\s"), "at the end"),
    ("recover", recover_any, "in two ways"),
    ("recover", recover_unordered, "in the order of ranks"),
    ("recover", lambda ranks: [], "merged into itself"),
    ("encode_special", lambda text, encode, specials, allowed: encode(text), "stand for their ids"),
    ("encode_special", special_pattern(longest_first, group="{}"), "was dropped"),
    ("encode_special", special_pattern(longest_first, escape=str), "regex.escape"),
    ("encode_special", special_pattern(len), "shorter special token"),
    ("encode_special", lambda text, encode, specials, allowed: solutions.encode_special(
        text, encode, specials, set(specials)), "anyone could write it"),
    ("code_points", lambda text, symbols: [ord(character) for character in text], "ord() is no id"),
    ("code_points", lambda text, symbols: [symbols[c] for c in text if c in symbols], "dropped"),
    ("code_points", lambda text, symbols: [symbols.get(c, ord(c)) for c in text], "two bytes"),
]


@pytest.mark.parametrize("name, answer, said", WRONG, ids=[f"{w[0]}: {w[2]}" for w in WRONG])
def test_a_mistake_is_named(name, answer, said):
    with pytest.raises(Wrong, match=re.escape(said)) as wrong:
        c09.CHECKS[name](answer)
    assert "\n" not in str(wrong.value)


def test_the_time_limit_is_a_ratio_to_our_own_solution(tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "FLOOR", 0.5)
    monkeypatch.setattr(c09, "CHECKS", {"decode": c09.decode})
    (tmp_path / "e09.py").write_text("def decode(ids, merges):\n    while True:\n        pass\n")
    verdicts = grade.grade("09", tmp_path)
    told = r"wrong: no answer after (\S+) s, and ours takes (\S+) s, and then it was at line [23] "
    waited, ours = map(float, re.match(told, verdicts["decode"]).groups())
    rounding = 0.05 * (1 + grade.TIMES)
    assert waited == pytest.approx(0.5 + grade.TIMES * ours, abs=rounding)
