"""The tokenizer is tiktoken's GPT-2, without a network."""

import base64
import hashlib
import json
import lzma

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from data import corpus, tokenizer
from data.tokenizer import EOT, decode, encode, encode_documents

# OpenAI's own pattern, as encoder.py of openai/gpt-2 writes it: without possessive quantifiers.
OPENAI = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tiktoken.Encoding:
    """tiktoken's class with OpenAI's own pattern, and the merges as tiktoken itself reads them."""
    folder = tmp_path_factory.mktemp("openai")
    (folder / "vocab.bpe").write_bytes(lzma.decompress(tokenizer.MERGES_FILE.read_bytes()))
    (folder / "encoder.json").write_text(json.dumps(tokenizer.vocabulary()[0]))
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding("reference", pat_str=OPENAI, mergeable_ranks=ranks, special_tokens={})


def test_the_ranks_are_those_that_openai_publishes_for_tiktoken():
    encoding = tokenizer.encoding()
    lines = (base64.b64encode(encoding.decode_single_token_bytes(rank)) + b" %d\n" % rank
             for rank in range(EOT))
    assert hashlib.sha256(b"".join(lines)).hexdigest() == tokenizer.RANKS_SHA256


def test_known_tokens():
    assert encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert decode([15496, 11]) == "Hello,"
    assert encode("") == []


def test_there_are_50257_tokens():
    assert tokenizer.encoding().n_vocab == 50257
    assert decode([EOT]) == "<|endoftext|>"


def test_end_of_text_in_a_document_is_ordinary_text():
    ids = encode("a<|endoftext|>b")
    assert EOT not in ids
    assert decode(ids) == "a<|endoftext|>b"


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_is_encoded_as_openai_would_and_comes_back(reference, text):
    ids = encode(text)
    assert ids == reference.encode_ordinary(text)
    assert decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(st.text("ab 's'll\n\t1é\u00a0\u180e\u2003\x1c", max_size=60))
def test_contractions_and_white_space_too(reference, text):
    assert encode(text) == reference.encode_ordinary(text)


@pytest.mark.parametrize("count", [999, 1000, 1001, 1002, 2000, 2001, 2002])
def test_white_space_is_taken_by_the_thousand(reference, count):
    for text in (" " * count + "a", "a" + "\n" * count + " b", " " * count, "\t " * count + "'s"):
        assert encode(text) == reference.encode_ordinary(text)


def test_a_megabyte_of_spaces_does_not_backtrack():
    # OpenAI's pattern without possessive quantifiers overflows its stack here.
    ids = encode(" " * 1_000_000)
    assert decode(ids) == " " * 1_000_000


def test_real_texts(reference, real_data):
    text = (real_data / "tinyshakespeare.txt").read_text()
    ids = encode(text)
    assert ids == reference.encode_ordinary(text)
    assert len(ids) == 338_025  # 301,966 + 36,059 of nanoGPT's data/shakespeare/readme.md


def test_documents_begin_with_end_of_text():
    tokens = encode_documents(["Hello", "", "Hello"])
    assert tokens.tolist() == [EOT, 15496, EOT, EOT, 15496]


def test_damaged_merges_are_noticed(tmp_path, monkeypatch):
    content = lzma.decompress(tokenizer.MERGES_FILE.read_bytes())
    damaged = tmp_path / "merges.xz"
    damaged.write_bytes(lzma.compress(content.replace(b"\nh e\n", b"\ne h\n")))
    monkeypatch.setattr(tokenizer, "MERGES_FILE", damaged)
    with pytest.raises(RuntimeError, match="damaged"):
        tokenizer.read_merges()


def test_tokens_follow_from_the_merges():
    vocab, merges = tokenizer.vocabulary()
    assert [vocab[a + b] for a, b in merges] == list(range(256, EOT))
    assert all(vocab[a] < vocab[a + b] > vocab[b] for a, b in merges)
    assert merges[:3] == [("Ġ", "t"), ("Ġ", "a"), ("h", "e")]  # vocab.bpe of openai/gpt-2


def test_the_embedded_corpus_is_whole_and_clean():
    chapters = corpus.bible_chapters()
    assert len(chapters) == 1189
    assert chapters[0].startswith("In the beginning God created the heavens and the earth.")
    assert "God's Spirit was hovering" in chapters[0]
    assert chapters[-1].endswith("be with all the saints. Amen.")
    text = "".join(chapters)
    assert not {"`", "\n", "<"} & set(text)
    assert "  " not in text
    train, val = corpus.embedded()
    assert (train == EOT).sum() + (val == EOT).sum() == 1189
    assert 970_000 < len(train) + len(val) < 990_000
    assert len(val) / (len(train) + len(val)) == pytest.approx(0.05, abs=0.005)


@settings(deadline=None)
@given(st.text("abc \n", min_size=1, max_size=2000))
def test_blocks_of_a_text_are_all_of_it(text):
    blocks = corpus.split_blocks(text)
    assert "".join(blocks) == text
    assert len(blocks) == 20


def test_a_text_file_is_split_into_train_and_validation(tmp_path, corpus_file):
    train, val = corpus.text_file(corpus_file)
    assert len(val) / (len(train) + len(val)) == pytest.approx(0.05, abs=0.01)
    lines = set(corpus_file.read_text().split("\n"))
    for part in (train, val):
        pieces = "".join(decode(part.tolist())).split("<|endoftext|>")
        assert {line for piece in pieces for line in piece.split("\n") if line} <= lines
