"""What the answers to lesson 9 have to pass."""

from collections.abc import Callable

from data import tokenizer
from lessons.course import Wrong


def compare(call: str, seen: object, right: object, **mistakes: tuple[object, str]) -> None:
    """Raises Wrong where seen isn't right, naming the mistake that gives it."""
    if seen == right and type(seen) is type(right):
        return
    line = f"{call} gave {str(seen)[:100]} where {right} is right"
    for wrong, what in mistakes.values():
        if seen == wrong:
            raise Wrong(f"{line}: {what}")
    raise Wrong(line)


def check_train(answer: Callable) -> None:
    compare("train([b'aaabdaaabac'], 3)", answer([b"aaabdaaabac"], 3),
            [(97, 97), (256, 97), (257, 98)],
            last=([(97, 97), (97, 98), (256, 257)], "of pairs as frequent the last one met was "
                  "taken, or the largest"),
            backwards=([(97, 97), (97, 256), (257, 98)], "a merge is written from left to right"),
            ids=([97, 256, 257], "a merge is a pair of ids"),
            old=([(97, 97), (97, 98), (98, 100)], "the text wasn't rewritten after the merge"))
    compare("train([b'aaaabcxbcybc'], 1)", answer([b"aaaabcxbcybc"], 1), [(97, 97)],
            apart=([(98, 99)], "aaaa holds aa three times, pairs are counted at every place"))
    compare("train([b'a', b'b', b'a', b'b', b'cd'], 1)", answer([b"a", b"b", b"a", b"b", b"cd"], 1),
            [(99, 100)], across=([(97, 98)], "a pair was counted across two chunks"))
    compare("train([b'ab', b'cd', b'cd'], 1)", answer([b"ab", b"cd", b"cd"], 1), [(99, 100)],
            once=([(97, 98)], "a chunk that comes twice counts twice"))
    compare("train([b'ab'], 5)", answer([b"ab"], 5), [(97, 98)])


def check_encode(answer: Callable) -> None:
    compare("encode(b'abc', [(98, 99), (97, 98)])", answer(b"abc", [(98, 99), (97, 98)]),
            [97, 256], greedy=([257, 99], "merged from left to right: the pair that was learned "
                               "first goes first"))
    compare("encode(b'aaa', [(97, 97)])", answer(b"aaa", [(97, 97)]), [256, 97],
            backwards=([97, 256], "a merge is written from left to right"),
            overlapping=([256, 256], "the second a was used twice"))
    compare("encode(b'aaaa', [(97, 97), (256, 256)])", answer(b"aaaa", [(97, 97), (256, 256)]),
            [257], once=([256, 256], "merges of merges were left out"))
    compare("encode(b'', [])", answer(b"", []), [])


def check_decode(answer: Callable) -> None:
    compare("decode([257, 33], [(104, 105), (256, 33)])",
            answer([257, 33], [(104, 105), (256, 33)]), "hi!!")
    compare("decode([195, 169], [])", answer([195, 169], []), "\N{LATIN SMALL LETTER E WITH ACUTE}",
            alone=("\ufffd\ufffd", "tokens were decoded one by one, and a character's bytes may "
                   "lie in two of them"),
            latin=("\u00c3\u00a9", "chr() of a byte is Latin-1; the bytes together are UTF-8"))
    try:
        seen = answer([97, 195], [])
    except UnicodeDecodeError:
        raise Wrong("decode([97, 195], []) raised UnicodeDecodeError: half a character becomes "
                    "U+FFFD, decode(errors='replace')") from None
    compare("decode([97, 195], [])", seen, "a\ufffd",
            ignored=("a", "half a character was dropped; it becomes U+FFFD"))


def check_split(answer: Callable) -> None:
    text = "I've 2 dogs,  they   bark"
    compare(f"split({text!r})", answer(text),
            ["I", "'ve", " 2", " dogs", ",", " ", " they", "  ", " bark"],
            spaces=(text.split(), "the spaces are lost, and no text can be put together again"),
            greedy=(["I", "'ve", " 2", " dogs", ",", "  ", "they", "   ", "bark"],
                    "white space before a word leaves its last space to the word: \\s+(?!\\S)"),
            apostrophe=(["I", "'", "ve", " 2", " dogs", ",", " ", " they", "  ", " bark"],
                        "'ve is a word, and has to be tried first"))
    compare("split('a1b22')", answer("a1b22"), ["a", "1", "b", "22"],
            words=(["a1b22"], "\\w+ keeps letters and digits together"))
    compare("split('\u00e9t\u00e9')", answer("\u00e9t\u00e9"), ["\u00e9t\u00e9"],
            ascii=(["\u00e9", "t", "\u00e9"], "[a-zA-Z] knows no accents: \\p{L}"))
    compare("split('12345')", answer("12345"), ["12345"],
            threes=(["123", "45"], "digits by three is GPT-4's pattern, not GPT-2's"))
    compare("split('a  ')", answer("a  "), ["a", "  "],
            trailing=(["a", " ", " "], "white space at the end is one word"))


def check_recover(answer: Callable) -> None:
    ranks = {b"abc": 5, b"ab": 4, b"c": 0, b"b": 1, b"a": 2, b"bc": 3, b"abcb": 6}
    right = [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"abc", b"b")]
    compare("recover({b'abc': 5, b'ab': 4, b'c': 0, b'b': 1, b'a': 2, b'bc': 3, b'abcb': 6})",
            answer(ranks), right,
            order=([right[2], right[1], right[0], right[3]], "merges stand in the order of ranks"),
            first=([*right[:2], (b"ab", b"c"), (b"abc", b"b")], "abc falls into two known tokens "
                   "in two ways; bc has the lower rank and was merged first"),
            whole=([], "with all ranks allowed a token is merged into itself: only those below its "
                   "own"))
    byte_of = {glyph: byte for byte, glyph in enumerate(tokenizer.byte_glyphs())}
    gpt2 = {bytes(byte_of[glyph] for glyph in token): rank
            for token, rank in tokenizer.vocabulary()[0].items()}
    seen = answer(gpt2)
    theirs = [(bytes(byte_of[glyph] for glyph in left), bytes(byte_of[glyph] for glyph in right))
              for left, right in tokenizer.read_merges()]
    if len(seen) != 50_000:
        raise Wrong(f"{len(seen):,} merges out of GPT-2's ranks, where 50,000 are right")
    for i, (mine, official) in enumerate(zip(seen, theirs, strict=True)):
        if mine != official:
            raise Wrong(f"GPT-2's rank {256 + i}: {mine} where {official} is right")


def check_encode_special(answer: Callable) -> None:
    specials = {"<|a|>": 300, "<|a|>!": 301}

    def encode(text: str) -> list[int]:
        return list(text.encode())

    compare("'x<|a|>y' with <|a|> allowed", answer("x<|a|>y", encode, specials, {"<|a|>"}),
            [120, 300, 121],
            ignored=(encode("x<|a|>y"), "special tokens that are allowed stand for their ids"),
            lost=([120, 121], "the special token itself was dropped: regex.split keeps what stands "
                  "in brackets"))
    # As a pattern <|a|> is "<" or "a" or ">".
    compare("'a' with <|a|> allowed", answer("a", encode, specials, {"<|a|>"}), [97])
    compare("'<|a|>' with none allowed", answer("<|a|>", encode, specials, set()),
            encode("<|a|>"), injected=([300], "a special token that isn't allowed is text: anyone "
                                       "could write it"))
    compare("'<|a|>!' with both allowed", answer("<|a|>!", encode, specials, set(specials)), [301],
            short=([300, 33], "the shorter special token was found first"))
    compare("'<|a|>!' with <|a|> allowed", answer("<|a|>!", encode, specials, {"<|a|>"}), [300, 33],
            injected=([301], "a special token that isn't allowed is text"))


def check_code_points(answer: Callable) -> None:
    symbols = {"a": 256, "\u00e9": 257}
    compare("code_points('a\u00e9', {'a': 256, '\u00e9': 257})", answer("a\u00e9", symbols),
            [256, 257], points=([97, 233], "ord() is no id: symbols has them"))
    compare("code_points('a\u00fc', {'a': 256, '\u00e9': 257})", answer("a\u00fc", symbols),
            [256, 195, 188],
            dropped=([256], "a character without an id was dropped; it becomes its bytes"),
            latin=([256, 252], "ord() of an unknown character is no id: its UTF-8 has two bytes"))


CHECKS = {
    "train": check_train, "encode": check_encode, "decode": check_decode, "split": check_split,
    "recover": check_recover, "encode_special": check_encode_special,
    "code_points": check_code_points,
}
