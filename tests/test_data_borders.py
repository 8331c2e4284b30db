"""`<|endoftext|>` ends a document in a text file, and is text in parquet and JSON lines."""

import json

import pytest

from data import lines, sources
from data.tokenizer import EOT, encode, encoding
from tests.documents import made, read_independently, refused, write_parquet

STORIES = [f"Once upon a time there was a fox, number {i}.\n" for i in range(300)]


@pytest.fixture
def tiny_stories(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>\n".join(STORIES))
    return path


def test_a_text_is_split_at_its_borders(tiny_stories, tmp_path, capsys):
    documents, manifest = made(tiny_stories, tmp_path / "out")
    assert len(documents) == 300
    printed = capsys.readouterr().out
    assert "299 <|endoftext|> in .txt files end documents; --split_text False" in printed
    assert manifest["statistics"]["end_of_text_as_border"] == 299
    assert manifest["statistics"]["end_of_text_as_text"] == 0
    text = tiny_stories.read_text()
    assert read_independently(tmp_path / "out") == [
        EOT, *encoding().encode(text, allowed_special={"<|endoftext|>"})]


def test_a_text_is_left_whole_where_that_is_asked_for(tiny_stories, tmp_path, capsys):
    documents, manifest = made(tiny_stories, tmp_path / "out", split_text=False)
    assert documents == [tiny_stories.read_text()]
    assert "299 <|endoftext|> in .txt files stay text" in capsys.readouterr().out
    assert manifest["statistics"]["end_of_text_as_border"] == 0
    assert manifest["statistics"]["end_of_text_as_text"] == 299
    assert read_independently(tmp_path / "out") == [EOT, *encode(tiny_stories.read_text())]
    refused("split_text was False and is True", out=tmp_path / "out", source=str(tiny_stories))


def test_white_space_between_borders_is_no_document(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa b<|endoftext|>\n<|endoftext|>c<|endoftext|>\n")
    (tmp_path / "b.txt").write_text("<|endoftext|>d")
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "d.txt").write_text("")
    assert made(tmp_path, tmp_path / "out", shard_tokens=2)[0] == ["a b", "c", "d", " \n", ""]


def test_pieces_of_any_size_have_the_same_documents(tiny_stories, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)
    monkeypatch.setattr(lines, "READ_BYTES", 7)
    documents, _ = made(tiny_stories, tmp_path / "out")
    assert documents == tiny_stories.read_text().split("<|endoftext|>")


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_inside_documents_it_stays_text(tmp_path, ending, capsys):
    documents = ["a<|endoftext|>b", "<|endoftext|>", "no"] * 100
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        write_parquet(path, documents)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    _, manifest = made(path, tmp_path / "out", shard_tokens=400)
    assert read_independently(tmp_path / "out") == [
        token for text in documents for token in [EOT, *encode(text)]]
    assert manifest["statistics"]["end_of_text_as_text"] == 200
    assert "stands 200 times in documents and stays text" in capsys.readouterr().out
