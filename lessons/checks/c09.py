"""Checks of lesson 9."""

from collections.abc import Callable

from data import tokenizer
from lessons.checks import same
from lessons.course import Wrong


def train(answer: Callable) -> None:
    same("train([b'aaabdaaabac'], 3)", answer([b"aaabdaaabac"], 3),
         [(97, 97), (256, 97), (257, 98)], {
        "of pairs as frequent the last one met was taken, or the largest":
            [(97, 97), (97, 98), (256, 257)],
        "a merge is written from left to right": [(97, 97), (97, 256), (257, 98)],
        "a merge is a pair of ids": [97, 256, 257],
        "the text wasn't rewritten after the merge": [(97, 97), (97, 98), (98, 100)]})
    same("train([b'aaaabcxbcybc'], 1)", answer([b"aaaabcxbcybc"], 1), [(97, 97)], {
        "aaaa holds aa three times, pairs are counted at every place": [(98, 99)]})
    same("train([b'a', b'b', b'a', b'b', b'cd'], 1)", answer([b"a", b"b", b"a", b"b", b"cd"], 1),
         [(99, 100)], {"a pair was counted across two chunks": [(97, 98)]})
    same("train([b'ab', b'cd', b'cd'], 1)", answer([b"ab", b"cd", b"cd"], 1), [(99, 100)], {
        "a chunk that comes twice counts twice": [(97, 98)]})
    same("train([b'ab'], 5)", answer([b"ab"], 5), [(97, 98)], {})


def encode(answer: Callable) -> None:
    same("encode(b'abc', [(98, 99), (97, 98)])", answer(b"abc", [(98, 99), (97, 98)]), [97, 256], {
        "merged from left to right: the pair that was learned first goes first": [257, 99]})
    same("encode(b'aaa', [(97, 97)])", answer(b"aaa", [(97, 97)]), [256, 97], {
        "a merge is written from left to right": [97, 256],
        "the second a was used twice": [256, 256]})
    same("encode(b'aaaa', [(97, 97), (256, 256)])", answer(b"aaaa", [(97, 97), (256, 256)]), [257],
         {"merges of merges were left out": [256, 256]})
    same("encode(b'', [])", answer(b"", []), [], {})


def decode(answer: Callable) -> None:
    same("decode([257, 33], [(104, 105), (256, 33)])",
         answer([257, 33], [(104, 105), (256, 33)]), "hi!!", {})
    same("decode([195, 169], [])", answer([195, 169], []), "\N{LATIN SMALL LETTER E WITH ACUTE}", {
        "tokens were decoded one by one, and a character's bytes may lie in two of them":
            "\ufffd\ufffd",
        "chr() of a byte is Latin-1; the bytes together are UTF-8": "\u00c3\u00a9"})
    try:
        seen = answer([97, 195], [])
    except UnicodeDecodeError:
        raise Wrong("decode([97, 195], []) raised UnicodeDecodeError: half a character becomes "
                    "U+FFFD, decode(errors='replace')") from None
    same("decode([97, 195], [])", seen, "a\ufffd", {
        "half a character was dropped; it becomes U+FFFD": "a"})


def split(answer: Callable) -> None:
    text = "I've 2 dogs,  they   bark"
    same(f"split({text!r})", answer(text),
         ["I", "'ve", " 2", " dogs", ",", " ", " they", "  ", " bark"], {
        "the spaces are lost, and no text can be put together again": text.split(),
        "white space before a word leaves its last space to the word: \\s+(?!\\S)":
            ["I", "'ve", " 2", " dogs", ",", "  ", "they", "   ", "bark"],
        "'ve is a word, and has to be tried first":
            ["I", "'", "ve", " 2", " dogs", ",", " ", " they", "  ", " bark"]})
    same("split('a1b22')", answer("a1b22"), ["a", "1", "b", "22"], {
        "\\w+ keeps letters and digits together": ["a1b22"]})
    same("split('\u00e9t\u00e9')", answer("\u00e9t\u00e9"), ["\u00e9t\u00e9"], {
        "[a-zA-Z] knows no accents: \\p{L}": ["\u00e9", "t", "\u00e9"]})
    same("split('12345')", answer("12345"), ["12345"], {
        "digits by three is GPT-4's pattern, not GPT-2's": ["123", "45"]})
    same("split('a  ')", answer("a  "), ["a", "  "], {
        "white space at the end is one word": ["a", " ", " "]})


def recover(answer: Callable) -> None:
    ranks = {b"abc": 5, b"ab": 4, b"c": 0, b"b": 1, b"a": 2, b"bc": 3, b"abcb": 6}
    first, second, third, fourth = (b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"abc", b"b")
    same(f"recover({ranks})", answer(dict(ranks)), [first, second, third, fourth], {
        "merges stand in the order of ranks": [third, second, first, fourth],
        "abc falls into two known tokens in two ways; bc has the lower rank and was merged first":
            [first, second, (b"ab", b"c"), fourth],
        "with all ranks allowed a token is merged into itself: only those below its own": []})
    byte_of = {glyph: byte for byte, glyph in enumerate(tokenizer.byte_glyphs())}

    def spelled(token: str) -> bytes:
        return bytes(byte_of[glyph] for glyph in token)

    gpt2 = answer({spelled(token): rank for token, rank in tokenizer.vocabulary()[0].items()})
    if len(gpt2) != 50_000:
        raise Wrong(f"{len(gpt2):,} merges out of GPT-2's ranks, where 50,000 are right")
    for i, (left, right) in enumerate(tokenizer.read_merges()):
        same(f"GPT-2's rank {256 + i}", tuple(gpt2[i]), (spelled(left), spelled(right)), {})


def encode_special(answer: Callable) -> None:
    specials = {"<|a|>": 300, "<|a|>!": 301}

    def ids(text: str) -> list[int]:
        return list(text.encode())

    same("'x<|a|>y' with <|a|> allowed", answer("x<|a|>y", ids, specials, {"<|a|>"}),
         [120, 300, 121], {
        "special tokens that are allowed stand for their ids (in a pattern <|a|> is '<' or 'a' or "
        "'>': regex.escape)": ids("x<|a|>y"),
        "the special token itself was dropped: regex.split keeps what stands in brackets":
            [120, 121]})
    same("'<|a|>' with none allowed", answer("<|a|>", ids, specials, set()), ids("<|a|>"), {
        "a special token that isn't allowed is text: anyone could write it": [300]})
    same("'<|a|>!' with both allowed", answer("<|a|>!", ids, specials, set(specials)), [301], {
        "the shorter special token was found first": [300, 33]})
    same("'<|a|>!' with <|a|> allowed", answer("<|a|>!", ids, specials, {"<|a|>"}), [300, 33], {
        "a special token that isn't allowed is text": [301]})


def code_points(answer: Callable) -> None:
    symbols = {"a": 256, "\u00e9": 257}
    same(f"code_points('a\u00e9', {symbols})", answer("a\u00e9", symbols), [256, 257], {
        "ord() is no id: symbols has them": [97, 233]})
    same(f"code_points('a\u00fc', {symbols})", answer("a\u00fc", symbols), [256, 195, 188], {
        "a character without an id was dropped; it becomes its bytes": [256],
        "ord() of an unknown character is no id: its UTF-8 has two bytes": [256, 252]})


CHECKS = {"train": train, "encode": encode, "decode": decode, "split": split, "recover": recover,
          "encode_special": encode_special, "code_points": code_points}
