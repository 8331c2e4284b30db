"""Files of documents in every format: read whole, resumed anywhere, and named when damaged."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import job, parquet, sources
from data.fineweb import FineWebConfig, make
from data.tokenizer import encode_documents
from launch.errors import Failed
from tests.documents import failing, read_independently, refused, texts, write_parquet


def write_as(path: Path, documents: list[str]) -> None:
    """Documents in the format that the name asks for."""
    lines = "".join(json.dumps({"text": text}) + "\n\n" for text in documents).encode()
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines[:999]) + gzip.compress(lines[999:]))  # two members
    elif path.name.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines)
    else:
        path.write_bytes(lines)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines_are_read_and_resumed(tmp_path, ending, small_pieces, monkeypatch):
    documents = texts(200)
    write_as(tmp_path / f"a.{ending}", documents[:150])
    write_as(tmp_path / f"b.{ending}", documents[150:])
    config = FineWebConfig(tmp_path / "out", source=str(tmp_path / f"*.{ending}"),
                           shard_tokens=700)
    monkeypatch.setattr(job, "tokenise", failing(job.tokenise, after=5))
    with pytest.raises(Failed, match="on purpose"):
        make(config)
    monkeypatch.undo()
    assert json.loads((tmp_path / "out" / ".progress.json").read_text())["shards"]
    make(config)
    assert read_independently(tmp_path / "out") == encode_documents(documents).tolist()


def test_a_txt_file_is_one_document(tmp_path):
    documents = ["one " * 50, "two\n\nthree " * 40]
    for i, text in enumerate(documents):
        (tmp_path / f"{i}.txt").write_text(text)
    make(FineWebConfig(tmp_path / "out", source=str(tmp_path / "*.txt"), shard_tokens=90))
    assert read_independently(tmp_path / "out") == encode_documents(documents).tolist()


def test_missing_texts_and_half_characters_become_documents(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", None, "two"] * 10)
    (tmp_path / "b.jsonl").write_text('{"text": null}\n{"text": "x\\ud800y"}\n')
    make(FineWebConfig(tmp_path / "out", source=str(tmp_path / "*.*"), shard_tokens=20))
    expected = ["one", "", "two"] * 10 + ["", "x\ufffdy"]
    assert read_independently(tmp_path / "out") == encode_documents(expected).tolist()


def test_a_huge_row_group_is_read_in_batches(tmp_path, monkeypatch, small_pieces):
    monkeypatch.setattr(parquet, "LARGE_GROUP_BYTES", 6_000)
    documents = texts(400)
    rng = random.Random(1)
    documents = [text + "".join(rng.choices("abcdefgh ", k=80)) for text in documents]
    write_parquet(tmp_path / "a.parquet", documents, rows=200)
    files = sources.local_files(str(tmp_path / "a.parquet"))
    found = list(sources.pieces(files, "text"))
    assert len(found) > 4
    assert [text for piece in found for text in piece.load().texts.to_pylist()] == documents
    # From any document on, the pieces that hold it and all after it.
    for start in (0, 1, 77, 199, 200, 399):
        later = list(sources.pieces(files, "text", 0, start))
        assert later[0].first <= start < later[0].first + later[0].count
        rest = [text for piece in later for text in piece.load().texts.to_pylist()]
        assert rest[start - later[0].first :] == documents[start:]


def test_bad_sources_are_one_clear_line(corpus, tmp_path):
    out, source = tmp_path / "out", corpus[0]
    refused("no such file", out=out, source=str(tmp_path / "none*.parquet"))
    refused(r"no column 'body'; --column takes one of: id, text", out=out, source=source,
            column="body")
    refused("holds int64, and documents are strings", out=out, source=source, column="id")
    (tmp_path / "x.csv").write_text("a,b")
    refused(r"x\.csv: documents are read from \.parquet", out=out, source=str(tmp_path / "x.csv"))
    (tmp_path / "x.jsonl").write_text('{"content": "a"}\n')
    refused(r"document 1 has no 'text'; --column takes one of: content", out=out,
            source=str(tmp_path / "x.jsonl"))
    write_parquet(tmp_path / "empty.parquet", [])
    refused(r"empty\.parquet: no documents", out=out, source=str(tmp_path / "empty.parquet"))
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(r"empty\.jsonl: no documents", out=out, source=str(tmp_path / "empty.jsonl"))
    refused("nothing is left to train on: --shard_tokens", out=out, source=source,
            shard_tokens=10**8)
    refused("--shard_tokens 0: expected 1 to", out=out, source=source, shard_tokens=0)
    refused("--workers 0: expected 1 to", out=out, source=source, workers=0)
    assert not list(out.glob("*.bin")) + list(out.glob(".*.tmp"))


@pytest.mark.parametrize("damage", ["footer", "page"])
def test_a_damaged_parquet_file_is_named_or_skipped(corpus, tmp_path, small_pieces, damage):
    source, documents = corpus
    path, out = Path(source.replace("*", "1")), tmp_path / "out"
    content = bytearray(path.read_bytes())
    if damage == "footer":
        content[-4:] = b"XXXX"
        kept = documents[:100] + documents[200:]
    else:
        column = pq.ParquetFile(path).metadata.row_group(2).column(1)
        begin = column.dictionary_page_offset or column.data_page_offset
        content[begin : begin + 200] = bytes(200)
        kept = documents[:160] + documents[190:]  # the row group before and the one behind
    path.write_bytes(content)
    refused(r"1\.parquet: .*--skip_bad_files True", out=out, source=source)
    make(FineWebConfig(out, source=source, shard_tokens=1000, skip_bad_files=True))
    assert read_independently(out) == encode_documents(kept).tolist()
    (skipped,) = json.loads((out / "manifest.json").read_text())["skipped_files"]
    assert skipped.startswith("1.parquet: ")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, document 2: "),
     ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, document 1: .*utf-8"),
     ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-20], r"a\.jsonl\.gz: "),
     ("a.jsonl.zst", b"no zstd at all", r"a\.jsonl\.zst: "),
     ("a.txt", b"\xff\xff", r"a\.txt: .*utf-8"),
     ("a.jsonl", b'["a"]\n', "has no 'text'"), ("a.jsonl", b'{"text": 3}\n', "is a int")],
    # gzip stores the time, which must not reach a test's name: parallel workers compare the names
    ids=["cut off", "not utf-8", "gzip cut off", "no zstd", "binary", "a list", "a number"],
)
def test_other_damaged_files_are_named(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    refused(line, out=tmp_path / "out", source=str(tmp_path / name))
