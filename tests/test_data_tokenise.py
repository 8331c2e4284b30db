"""The fast tokenizer writes tiktoken's tokens, for any text there is."""

import random
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenise
from data.tokenise import encode_exactly, encoder
from data.tokenizer import EOT, encode, encode_documents, encoding
from launch.errors import Failed
from tests.test_data_tokenizer import OPENAI

CODE_POINTS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
LENGTH = 1_000_000  # of words without an end, in bytes


@pytest.fixture(scope="module")
def fast() -> tokenise.Encode:
    pytest.importorskip("fastokens", reason="without fastokens there is tiktoken alone")
    name, encode = encoder(2)
    assert name == "fastokens"
    return encode


def same(fast: tokenise.Encode, texts: list[str]) -> None:
    ids, offsets = fast(texts)
    expected = [encode_exactly(text) for text in texts]
    different = [text for i, text in enumerate(texts)
                 if not np.array_equal(ids[offsets[i] : offsets[i + 1]], expected[i])]
    assert not different, f"{len(different)} differ, the first: {different[0][:200]!r}"
    assert offsets[-1] == len(ids) == sum(map(len, expected))


@settings(deadline=None, max_examples=300)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), max_size=5))
def test_any_text(fast, texts):
    same(fast, texts)


@settings(deadline=None, max_examples=300)
@given(text=st.text("ab 's'LlTreEvm\n\t\r\u00a0\u180e\u200b1٣é中-", max_size=60))
def test_contractions_spaces_and_numbers(fast, text):
    same(fast, [text])


@pytest.mark.parametrize("around", ["a{}", "{}{} 1"])
def test_every_code_point(fast, around):
    """Between letters, and twice between a digit and a space."""
    parts = [around.replace("{}", c) for c in CODE_POINTS]
    same(fast, ["".join(parts[i : i + 512]) for i in range(0, len(parts), 512)])


def test_every_code_point_of_the_first_planes_alone(fast):
    same(fast, CODE_POINTS[:0x3000])


@pytest.mark.parametrize(
    "text",
    ["a" * LENGTH, " " * LENGTH, " " * (LENGTH // 2) + "a", "\n" * LENGTH, "7" * LENGTH,
     "中" * (LENGTH // 3), "-" * LENGTH, "\0" * LENGTH,
     "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=LENGTH)),
     "".join(random.Random(0).choices(CODE_POINTS, k=LENGTH // 4))],
    ids=["a", "spaces", "spaces and a", "lines", "digits", "Chinese", "dashes", "zeros", "letters",
         "all"],
)
def test_a_megabyte_without_an_end(fast, text):
    same(fast, [text])


WHITE_SPACE = [" " * 1_000_000 + "a", " \n" * 600_000 + "a", "x" + "\u3000" * 1_000_001 + " b",
               "\t" * 1_200_000 + "'s"]


@pytest.mark.parametrize("text", WHITE_SPACE, ids=["spaces", "lines", "ideographic", "tabs"])
def test_a_million_white_spaces_before_a_text(fast, text):
    """tiktoken's own pattern overflows here; openai/gpt-2's, in another library, does not."""
    words = regex.findall(OPENAI, text)
    expected = [token for word in words for token in encoding()._encode_single_piece(word)]
    assert encode(text) == encode_exactly(text).tolist() == expected
    assert encode_documents([text]).tolist() == [EOT, *expected]
    assert fast([text])[0].tolist() == expected
    tokens = tokenise.tokenise(pa.array([text], pa.large_string()), fast)
    assert tokens.ids.tolist() == [EOT, *expected]


def test_end_of_text_is_counted_in_each_document(fast):
    texts = ["<|endoftext|>", "a<|endoftext|>b<|endoftext|>", "", "x<|endof", "text|>", "|", "<|"]
    array = pa.array(["cut off<|endoftext|>", *texts], pa.large_string())[1:]
    assert tokenise.tokenise(array, fast).end_of_text.tolist() == [1, 2, 0, 0, 0, 0, 0]


def test_no_documents_are_no_tokens(fast):
    tokens = tokenise.tokenise(pa.array([], pa.large_string()), fast)
    assert (len(tokens.ids), tokens.starts.tolist(), len(tokens.hashes)) == (0, [0], 0)


def test_names_of_special_tokens_are_text(fast):
    same(fast, ["<|endoftext|>", "a<|endoftext|>b", " <|endoftext|> \n<|im_start|>", "<|endof"])
    assert EOT not in fast(["a<|endoftext|>b"])[0]


def test_real_documents(fast, real_data):
    for path in sorted(real_data.glob("fineweb_sample_*.parquet")):
        same(fast, pq.read_table(path)["text"].to_pylist())


def test_without_fastokens_tiktoken_is_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    name, encode = encoder(2)
    assert name == "tiktoken"
    same(encode, ["Hello", "", "a<|endoftext|>b"])


def test_a_tokenizer_that_is_wrong_stops_the_job():
    def wrong(texts):
        ids = [encode_exactly(text) for text in texts]
        ids[0] = ids[0][::-1]
        return tokenise._joined(ids)

    texts = pa.array(["one two three", "four five"], pa.large_string())
    with pytest.raises(Failed, match="encodes otherwise a document that begins with 'one two"):
        tokenise.tokenise(texts, wrong)
