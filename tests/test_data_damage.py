"""One bad document costs itself and is named; of a damaged file everything is kept that decodes."""

import gzip
import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import job, lines, parquet
from data.documents import from_column
from data.lines import split
from tests.documents import failing, made, refused, run, texts
from tests.running import ROOT

SENTENCES = [f"document {i}: the quick brown fox jumps over the lazy dog." for i in range(300)]


def json_lines(documents: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in documents)


@pytest.mark.parametrize(
    ("line", "problem"),
    [(b'{"text": "cut in the mid', "document 4: Unterminated string"),
     (b'{"title": "no text here"}', "document 4 has no 'text'; --column takes one of: title"),
     (b"3", "document 4 has no 'text': it is a int"),
     (b'{"text": ["a"]}', "document 4: 'text' is a list"),
     (b'{"text": "\xff"}', "document 4: 'utf-8' codec"),
     (b"[" * 100_000, "document 4: maximum recursion depth")],
    ids=["cut off", "no field", "a number", "a list", "not utf-8", "deep"],
)
def test_a_bad_line_costs_itself(tmp_path, line, problem):
    whole = json_lines(SENTENCES).splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join([*whole[:3], line + b"\n", *whole[3:]]))
    refused(r"a\.jsonl, document 4.*--skip_bad_files True", out=tmp_path / "out",
            source=str(tmp_path / "a.jsonl"))
    documents, manifest = made(tmp_path / "a.jsonl", tmp_path / "out", skip_bad_files=True)
    assert documents == SENTENCES
    (named,) = manifest["skipped_files"]
    assert named.startswith(f"a.jsonl, {problem}")


def test_a_wrong_column_is_refused_whatever_is_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(SENTENCES))
    refused("has no 'body'; --column takes one of: text", out=tmp_path / "out", column="body",
            source=str(tmp_path / "a.jsonl"), skip_bad_files=True)
    pq.write_table(pa.table({"text": SENTENCES}), tmp_path / "a.parquet")
    refused("has no column 'body'", out=tmp_path / "out", column="body",
            source=str(tmp_path / "a.parquet"), skip_bad_files=True)


def write_bytes_as_strings(path, contents: list[bytes]) -> None:
    column = pa.array(contents, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), path, row_group_size=40)


def test_a_document_that_is_no_utf8_costs_itself(tmp_path, small_pieces):
    contents = [text.encode() for text in SENTENCES]
    contents[7], contents[200] = b"caf\xe9", b"\xed\xa0\x80"  # Latin-1, and half a surrogate pair
    write_bytes_as_strings(tmp_path / "a.parquet", contents)
    refused(r"a\.parquet, document 8: 'utf-8'.*--skip_bad_files True", out=tmp_path / "out",
            source=str(tmp_path / "a.parquet"))
    documents, manifest = made(tmp_path / "a.parquet", tmp_path / "out", skip_bad_files=True)
    assert documents == SENTENCES[:7] + SENTENCES[8:200] + SENTENCES[201:]
    assert [line.split(":")[0] for line in manifest["skipped_files"]] == [
        "a.parquet, document 8", "a.parquet, document 201"]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=8) | st.text(max_size=4).map(lambda text: text.encode(
    "utf-8", "surrogatepass")), max_size=8))
def test_documents_are_those_that_python_decodes(contents):
    documents = from_column(pa.array(contents, pa.large_binary()), "a", 5)
    decoded = [content.decode("utf-8", "replace") for content in contents]
    right = [i for i, content in enumerate(contents)
             if content == content.decode("utf-8", "ignore").encode()]
    assert documents.texts.to_pylist() == [decoded[i] for i in right]
    assert documents.numbers.tolist() == [5 + i for i in right]
    assert len(documents.unreadable) == len(contents) - len(right)


def test_skipping_is_noted_once_however_often_a_job_stops(tmp_path, small_pieces, monkeypatch):
    documents = texts(300, seed=3)
    whole = json_lines(documents).splitlines(keepends=True)
    for at in (250, 90, 89, 20):
        whole.insert(at, b"bad\n")
    (tmp_path / "a.jsonl").write_bytes(b"".join(whole))
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    for after in (3, 2, 2):
        with monkeypatch.context() as patch:
            patch.setattr(job, "tokenise", failing(job.tokenise, after))
            refused("on purpose", out=out, source=str(source), skip_bad_files=True,
                    shard_tokens=300)
    kept, manifest = made(source, out, skip_bad_files=True, shard_tokens=300)
    assert kept == documents
    assert [line.split(":")[0] for line in manifest["skipped_files"]] == [
        f"a.jsonl, document {number}" for number in (21, 91, 93, 254)]


def compress(content: bytes, ending: str) -> bytes:
    if ending == "gz":
        return gzip.compress(content, mtime=0)
    return pa.compress(content, "zstd", asbytes=True)


def random_documents(count: int) -> list[str]:
    rng = random.Random(0)
    return [f"{i} " + "".join(rng.choices("abcdefghijklmnop ", k=600)) for i in range(count)]


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_file_cut_at_90_percent_keeps_what_decodes(tmp_path, ending):
    documents = random_documents(2000)
    content = compress(json_lines(documents), ending)
    name = f"a.jsonl.{ending}"
    (tmp_path / name).write_bytes(content[: len(content) * 9 // 10])
    refused(name + r": Truncated.*\(document [\d,]+ and all after\)", out=tmp_path / "out",
            source=str(tmp_path / name), shard_tokens=50_000)
    kept, manifest = made(tmp_path / name, tmp_path / "out", skip_bad_files=True,
                          shard_tokens=50_000)
    assert kept == documents[: len(kept)]
    # Random letters are spread evenly; a block of zstd, 128 kB of text, decodes whole or not.
    assert len(kept) > (1795 if ending == "gz" else 1580)
    (named,) = manifest["skipped_files"]
    assert f"(document {len(kept) + 1:,} and all after)" in named


def test_a_last_line_that_is_whole_is_kept():
    """Damage behind it may have cost its line end alone."""
    content = json_lines(SENTENCES)[:-1]
    assert list(lines._json_lines(StandIn(content, "cut off"))) == content.split(b"\n")
    assert list(lines._json_lines(StandIn(content[:-1], "cut off"))) == content.split(b"\n")[:-1]


class StandIn:
    """Content that ends in damage."""

    def __init__(self, content: bytes, problem: str) -> None:
        self.content, self.at_the_end, self.problem = content, problem, ""

    def __iter__(self):
        yield self.content
        self.problem = self.at_the_end


def test_rows_before_a_damaged_page_are_kept(tmp_path):
    documents = random_documents(1000)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": documents}), path, row_group_size=500, compression=None,
                   use_dictionary=False, data_page_size=10_000, write_page_checksum=True,
                   write_batch_size=10, write_statistics=False)
    content = bytearray(path.read_bytes())
    at = bytes(content).index(documents[300].encode())
    content[at : at + 50] = bytes(50)
    path.write_bytes(content)
    kept, manifest = made(path, tmp_path / "out", skip_bad_files=True, shard_tokens=50_000)
    before = len(kept) - 500
    assert 250 < before <= 300  # a page has 16 of these documents
    assert kept == documents[:before] + documents[500:]
    (named,) = manifest["skipped_files"]
    assert named.endswith(f"(documents {before + 1} to 500)")


@settings(deadline=None)
@given(st.text("ab<|>", max_size=40), st.sampled_from([b"|", b"<|>", b"ab", b""]),
       st.integers(1, 7))
def test_splitting_in_chunks_is_splitting(text, separator, size):
    content = text.encode()
    chunks = [content[i : i + size] for i in range(0, len(content), size)]
    assert list(split(chunks, separator)) == (
        content.split(separator) if separator else [content])


def test_too_long_a_record_is_left_out(monkeypatch):
    monkeypatch.setattr(lines, "RECORD_BYTES", 5)
    for size in (1, 2, 3, 100):
        content = b"12345,123456,,1234567890123,123"
        chunks = [content[i : i + size] for i in range(0, len(content), size)]
        assert list(split(chunks, b",")) == [b"12345", None, b"", None, b"123"]


ENDLESS = """
import resource, sys
from data.sources import local_files, pieces
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for piece in pieces(local_files(sys.argv[1]), "text"):
    documents = piece.load()
    print(documents.texts.to_pylist(), [lost.problem for lost in documents.unreadable])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)
"""


def test_one_endless_line_takes_little_memory(tmp_path):
    """256 MB in a quarter of a megabyte: a record is held, and joined once."""
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "first"}\n')
        for _ in range(256):
            file.write(bytes(1 << 20))
        file.write(b'\n{"text": "last"}\n')
    assert path.stat().st_size < 1_000_000
    done = subprocess.run([sys.executable, "-c", ENDLESS, str(path)], cwd=ROOT, timeout=120,
                          capture_output=True, text=True, check=True)
    _, found, grown = done.stdout.splitlines()
    assert found.startswith("['first', 'last'] ['a.jsonl.gz, document 2: longer than 67,108,864")
    assert int(grown) < 200


def damaged_in_the_middle(path, documents: list[str]) -> None:
    """One row group, a page of which holds document 300 and no longer agrees with its checksum."""
    pq.write_table(pa.table({"text": documents}), path, compression=None, use_dictionary=False,
                   data_page_size=10_000, write_page_checksum=True, write_batch_size=10,
                   write_statistics=False)
    content = bytearray(path.read_bytes())
    at = bytes(content).index(documents[300].encode())
    content[at : at + 50] = bytes(50)
    path.write_bytes(content)


def test_rows_before_a_damaged_page_of_a_huge_row_group_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LARGE_GROUP_BYTES", 6_000)
    documents = random_documents(500)
    damaged_in_the_middle(tmp_path / "a.parquet", documents)
    kept, manifest = made(tmp_path / "a.parquet", tmp_path / "out", skip_bad_files=True,
                          shard_tokens=50_000)
    assert 250 < len(kept) <= 300  # a page has 16 of these documents
    assert kept == documents[: len(kept)]
    (named,) = manifest["skipped_files"]
    assert named.endswith(f"(documents {len(kept) + 1} to 500)")


@pytest.mark.parametrize("large_group_bytes", [1 << 26, 1], ids=["whole", "in batches"])
def test_a_value_of_a_dictionary_that_is_no_utf8_costs_itself(tmp_path, monkeypatch,
                                                              large_group_bytes):
    monkeypatch.setattr(parquet, "LARGE_GROUP_BYTES", large_group_bytes)
    values = pa.array([b"one", b"caf\xe9", b"three"], pa.binary()).view(pa.string())
    indices = pa.array([0, 1, 2] * 20)
    column = pa.DictionaryArray.from_arrays(indices, values, safe=False)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    documents, manifest = made(tmp_path / "a.parquet", tmp_path / "out", skip_bad_files=True,
                               shard_tokens=30)
    assert documents == ["one", "three"] * 20
    assert len(manifest["skipped_files"]) == 20
    assert manifest["skipped_files"][0].startswith("a.parquet, document 2: 'utf-8'")


def test_a_file_may_begin_with_documents_that_are_no_utf8(tmp_path):
    write_bytes_as_strings(tmp_path / "a.parquet",
                           [b"\xe9"] * 1500 + [text.encode() for text in SENTENCES])
    documents, manifest = made(tmp_path / "a.parquet", tmp_path / "out", skip_bad_files=True)
    assert documents == SENTENCES
    assert len(manifest["skipped_files"]) == 1500


def test_a_text_with_zero_bytes_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("what Windows calls Unicode".encode("utf-16-le"))
    refused("a.txt: a zero byte, so it is UTF-16 or no text", out=tmp_path / "out",
            source=str(tmp_path / "a.txt"))


def test_a_damaged_footer_ends_no_process(tmp_path):
    """Arrow throws where nobody catches if it's asked for a column whose levels can't be."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": SENTENCES}), path)
    content = path.read_bytes()
    optional, required = b"%\x02\x18\x04text", b"%\x00\x18\x04text"  # of the column, in Thrift
    assert content.count(optional) == 1
    path.write_bytes(content.replace(optional, required))
    done = run(str(path), tmp_path / "out")
    assert done.returncode == 2
    assert "error: a.parquet: " in done.stderr
    assert "(documents 1 to 300); get the file again" in done.stderr


def test_a_column_whose_name_is_no_utf8(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": SENTENCES, "café": SENTENCES}), path)
    path.write_bytes(path.read_bytes().replace("café".encode(), b"caf\xe9\xe9"))
    refused("a.parquet: 'utf-8' codec can't decode", out=tmp_path / "out", source=str(path))


def test_an_index_that_its_dictionary_has_not_costs_what_comes_after(tmp_path, monkeypatch):
    """A damaged page may decode to one; Arrow hands it on, and finds it when it casts."""

    def batches(self, rows):
        yield pa.array(SENTENCES[:200])
        yield pa.DictionaryArray.from_arrays(pa.array([0, 7]), SENTENCES[200:201], safe=False)

    monkeypatch.setattr(parquet, "LARGE_GROUP_BYTES", 1)
    monkeypatch.setattr(parquet._Groups, "_batches", batches)
    pq.write_table(pa.table({"text": SENTENCES}), tmp_path / "a.parquet")
    documents, manifest = made(tmp_path / "a.parquet", tmp_path / "out", skip_bad_files=True)
    assert documents == SENTENCES[:200]
    (named,) = manifest["skipped_files"]
    assert named.endswith("(documents 201 to 300)")
