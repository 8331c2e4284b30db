"""A text file becomes documents: where it says so, and nowhere else."""

import doctest
import os
import random

import numpy as np
import pytest

from data import corpus
from data.corpus import split_blocks, split_documents, text_file
from data.tokenizer import EOT, EOT_TEXT, decode, encode
from launch.errors import BadInput
from tests.documents import made

STORIES = [f"Story {i}. " + f"Once upon a time there was number {i}. " * 20 for i in range(400)]


def documents(tokens: np.ndarray) -> list[str]:
    begins = np.flatnonzero(tokens == EOT)
    assert begins[0] == 0
    return [decode(document[1:].tolist()) for document in np.split(tokens, begins[1:])]


@pytest.fixture
def stories(tmp_path):
    """As TinyStories writes them."""
    path = tmp_path / "stories.txt"
    path.write_text(f"\n{EOT_TEXT}\n".join(STORIES) + f"\n{EOT_TEXT}\n")
    return path


def test_endoftext_in_a_text_ends_a_document(stories, capsys):
    train, val = map(documents, text_file(stories))
    own = stories.read_text().split(EOT_TEXT)[:-1]  # what is left is a line break
    assert sorted(train + val) == sorted(own)  # none is cut
    assert 10 <= len(val) <= 30  # a twentieth
    (line,) = capsys.readouterr().out.splitlines()
    assert f"stories.txt: 400 {EOT_TEXT} in it" in line


def test_endoftext_is_text_where_that_is_asked_for(stories, capsys):
    train, _ = text_file(stories, split_text=False)
    assert documents(train)[0].startswith(f"\n{EOT_TEXT}\n".join(STORIES[:3]))
    assert capsys.readouterr().out == ""


def test_a_text_without_it_is_what_it_was(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("A line of text.\n" * 5_000)
    assert all(map(np.array_equal, text_file(path), text_file(path, split_text=False)))


def test_a_text_and_a_source_have_the_same_documents(tmp_path):
    text = "\ufeffone\n<|endoftext|>\n two<|endoftext|> \t\x0b<|endoftext|>\u3000<|endoftext|>three"
    source = tmp_path / "a.txt"
    source.write_text(text)
    assert made(source, tmp_path / "out", shard_tokens=2)[0] == split_documents(text[1:])


def test_a_text_of_nothing_but_separators_is_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text(f"{EOT_TEXT}\n" * 100)
    with pytest.raises(BadInput, match="too short to hold out"):
        text_file(path)


def test_no_block_ends_inside_a_separator():
    rng = random.Random(0)
    for _ in range(200):
        words = rng.choices([EOT_TEXT, "a", "\n", "word "], k=rng.randint(20, 400))
        text = "".join(words)
        blocks = split_blocks(text, [EOT_TEXT, "\n"])
        assert "".join(blocks) == text
        assert sum(block.count(EOT_TEXT) for block in blocks) == text.count(EOT_TEXT)


def test_the_example_of_split_documents():
    (example,) = doctest.DocTestFinder().find(split_documents, globs=vars(corpus))
    assert doctest.DocTestRunner().run(example) == (0, 1)


def test_a_separator_is_seven_tokens_of_text():
    assert len(encode(EOT_TEXT)) == 7
    assert EOT not in encode(EOT_TEXT)


def test_paths_that_are_no_text(tmp_path):
    with pytest.raises(BadInput, match="is a folder: --data.dir"):
        text_file(tmp_path)
    os.symlink("nowhere", tmp_path / "link.txt")
    with pytest.raises(BadInput, match=r"link\.txt: it is a link to nowhere"):
        text_file(tmp_path / "link.txt")
    (tmp_path / "p.txt").write_text("version https://git-lfs.github.com/spec/v1\n" * 99)
    with pytest.raises(BadInput, match="is a git-LFS pointer"):
        text_file(tmp_path / "p.txt")
    odd = tmp_path / "[v1] it's.txt"
    odd.write_text("A line of text.\n" * 500)
    train, _ = text_file(odd)
    assert train[0] == EOT
