"""Which files a source names: folders, kinds, patterns, odd names and links."""

import gzip
import json
import os
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import parquet
from data.fineweb import FineWebConfig, make
from data.sources import local_files
from launch.errors import BadInput
from tests.documents import made, refused, write_parquet


@pytest.fixture
def write(tmp_path):
    """Writes a small file of the kind that its name says, in tmp_path/in."""

    def write(name: str):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"text": f"{name} " * 10}).encode() + b"\n"
        if name.endswith(".parquet"):
            write_parquet(path, [f"{name} " * 10])
        else:
            path.write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
        return path

    return write


def names(source) -> list[str]:
    return [file.name for file in local_files(str(source))]


def test_a_folder_is_read_with_its_subfolders(tmp_path, write, capsys):
    for name in ("b/2.parquet", "b/1.parquet", "a/x/3.parquet", "c.parquet", "README.txt",
                 "README.md", ".cache/4.parquet", ".5.parquet"):
        write(name)
    assert names(tmp_path / "in") == ["a/x/3.parquet", "b/1.parquet", "b/2.parquet", "c.parquet"]
    printed = capsys.readouterr().out
    assert "reading 4 files: " in printed
    left_out = printed.split("leaving out 2 files: ")[1]
    assert [os.path.basename(path) for path in left_out.strip().split(", ")] == [
        "README.md", "README.txt"]


def test_one_folder_of_many_is_the_only_one_read(tmp_path, write):
    """As huggingface-cli nests what it downloads: the names are those of the files alone."""
    write("data/CC-MAIN-2013-20/000.parquet")
    write("data/CC-MAIN-2013-20/001.parquet")
    (tmp_path / "in" / ".cache/huggingface").mkdir(parents=True)
    assert names(tmp_path / "in") == ["000.parquet", "001.parquet"]


def test_mixed_kinds_take_a_pattern(tmp_path, write):
    for name in ("README.txt", "a.parquet", "b.json.gz"):
        write(name)
    with pytest.raises(BadInput, match=r"several kinds \(1 parquet, 1 jsonl\).* --source") as error:
        local_files(str(tmp_path / "in"))
    (pattern,) = shlex.split(str(error.value).split("--source ")[1])
    assert names(pattern) == ["a.parquet"]
    assert names(tmp_path / "in" / "[ab].*") == ["a.parquet", "b.json.gz"]


@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json.gz", "a.jsonl", "a.jsonl.gz"])
def test_json_lines_by_any_name(tmp_path, write, name):
    path = write(name)
    documents, _ = made(path, tmp_path / "out", shard_tokens=20)
    assert documents == [f"{name} " * 10]


def test_brackets_and_spaces_are_names_where_they_are_there(tmp_path, write):
    write("[v1] data/a.parquet")
    write("[v1] data/b [2].parquet")
    folder = tmp_path / "in" / "[v1] data"
    assert names(folder) == ["a.parquet", "b [2].parquet"]
    assert names(folder / "b [2].parquet") == ["b [2].parquet"]
    assert names(folder / "*.parquet") == ["a.parquet", "b [2].parquet"]
    assert names(folder / "[ab].parquet") == ["a.parquet"]


def test_the_next_command_can_be_pasted(corpus, tmp_path, capsys):
    out = tmp_path / "out (1) it's"
    for _ in range(2):
        make(FineWebConfig(out, source=corpus[0], shard_tokens=1000))
    command = capsys.readouterr().out.split("`")[1]
    assert shlex.split(command)[-2:] == ["verify", str(out)]


def test_a_dangling_link_is_named(tmp_path, write):
    write("a.parquet")
    (tmp_path / "in" / "b.parquet").symlink_to("../blobs/nowhere")
    for source in (tmp_path / "in", tmp_path / "in" / "*.parquet", tmp_path / "in" / "b.parquet"):
        with pytest.raises(BadInput, match=r"b\.parquet is a link to \.\./blobs/nowhere"):
            local_files(str(source))


def test_a_file_with_several_names_is_read_once(tmp_path, write, capsys):
    """The Hub's cache has a link to each file for each revision, and links may go in circles."""
    write("snapshots/1/a.parquet")
    (tmp_path / "in/snapshots/2").mkdir()
    (tmp_path / "in/snapshots/2/a.parquet").symlink_to("../1/a.parquet")
    (tmp_path / "in/snapshots/1/up").symlink_to("..")
    assert names(tmp_path / "in") == ["a.parquet"]
    assert "leaving out 1 file: " in capsys.readouterr().out


TEXTS = ["one", None, "", "¿señor?", "one"] * 5
COLUMNS = {
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "dictionary of bytes": pa.array(TEXTS, pa.string()).cast(pa.binary()).dictionary_encode(),
    "large string": pa.array(TEXTS, pa.large_string()),
    "string view": pa.array(TEXTS, pa.string_view()),
    "bytes": pa.array(TEXTS).cast(pa.binary()),
    "large bytes": pa.array(TEXTS).cast(pa.large_binary()),
    "bytes view": pa.array(TEXTS).cast(pa.binary_view()),
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(TEXTS, pa.string())),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_all_that_is_text_is_read(tmp_path, kind):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": COLUMNS[kind]}), path, row_group_size=10)
    documents, _ = made(path, tmp_path / "out", shard_tokens=20)
    assert documents == [text or "" for text in TEXTS]


def test_bytes_of_a_fixed_size_and_nothing_but_nulls(tmp_path):
    column = pa.array([b"abcd"] * 9, pa.binary(4))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert made(tmp_path / "a.parquet", tmp_path / "a", shard_tokens=5)[0] == ["abcd"] * 9
    pq.write_table(pa.table({"text": pa.nulls(9)}), tmp_path / "b.parquet")
    assert made(tmp_path / "b.parquet", tmp_path / "b", shard_tokens=5)[0] == [""] * 9


def test_two_columns_of_one_name(tmp_path):
    path = tmp_path / "a.parquet"
    column = pa.array([f"document {i}" for i in range(9)])
    pq.write_table(pa.Table.from_arrays([column, column], ["text", "text"]), path)
    refused(r"a\.parquet has 2 columns called 'text'", out=tmp_path / "out", source=str(path))
    pq.write_table(pa.Table.from_arrays([column] * 3, ["id", "text", "id"]), path)
    assert made(path, tmp_path / "out", shard_tokens=5)[0] == column.to_pylist()


def test_a_column_whose_name_has_a_point_is_no_field_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LARGE_GROUP_BYTES", 1)  # in batches, where columns are few
    column = pa.array([f"document {i}" for i in range(9)])
    fields = pa.array([{"b": "another"}] * 9)
    pq.write_table(pa.table({"a": fields, "a.b": column}), tmp_path / "a.parquet")
    documents, _ = made(tmp_path / "a.parquet", tmp_path / "out", column="a.b", shard_tokens=5)
    assert documents == column.to_pylist()


def test_the_folder_that_one_stands_in(tmp_path, write, monkeypatch):
    write("a.jsonl")
    monkeypatch.chdir(tmp_path / "in")
    assert names(".") == names("./") == names("../in") == ["a.jsonl"]


def test_capitals_are_endings_too(tmp_path, write):
    for name in ("A.TXT", "B.Txt"):
        write(name)
    assert names(tmp_path / "in") == ["A.TXT", "B.Txt"]


def test_a_name_that_is_no_utf8(tmp_path, write):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    os.rename(write("a.jsonl"), path)
    assert made(path, tmp_path / "out", shard_tokens=5)[0] == ["a.jsonl " * 10]


def test_an_empty_folder_is_named_as_such(tmp_path):
    with pytest.raises(BadInput, match="holds no files, or hidden ones alone"):
        names(tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_git_lfs_pointer_is_named(write, name):
    """As git without git-lfs leaves it."""
    path = write(name)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5481\n")
    with pytest.raises(BadInput, match="is a git-LFS pointer.*run `git lfs pull` in"):
        names(path)
