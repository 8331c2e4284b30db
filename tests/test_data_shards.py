"""Shards: the format of llm.c, whole or refused."""

import json
import struct

import numpy as np
import pytest

from data import shards
from data.shards import open_folder, open_shard, shard_bytes, write_folder
from launch.errors import BadInput

TOKENS = np.array([50256, 5, 6, 50256, 7, 0], dtype=np.uint16)


def read_independently(path) -> list[int]:
    """llm.c's reader in four lines, from its description and not from our code."""
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    assert header[:2] == (20240520, 1)
    assert not any(header[3:])
    return list(struct.unpack(f"<{header[2]}H", content[1024:]))


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path, "toy", [TOKENS, TOKENS[:3]], TOKENS[3:], "toy set")
    return tmp_path


def test_the_format_is_llmcs(folder):
    assert read_independently(folder / "toy_train_000001.bin") == TOKENS.tolist()
    assert read_independently(folder / "toy_val_000000.bin") == TOKENS[3:].tolist()


def test_written_shards_are_read(folder):
    train, val, name = open_folder(folder)
    assert name == "toy set"
    assert [s.tokens[:].tolist() for s in train] == [TOKENS.tolist(), TOKENS[:3].tolist()]
    assert [s.tokens[:].tolist() for s in val] == [TOKENS[3:].tolist()]
    for shard in train + val:
        shard.check()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [e["documents"] for e in manifest["shards"]] == [1, 2, 1]
    assert [e["tokens"] for e in manifest["shards"]] == [3, 6, 3]


def test_nanogpts_and_build_nanogpts_files_are_read(tmp_path):
    TOKENS.tofile(tmp_path / "train.bin")
    TOKENS[:3].tofile(tmp_path / "val.bin")
    train, val, _ = open_folder(tmp_path)
    assert train[0].tokens[:].tolist() == TOKENS.tolist()
    assert val[0].tokens[:].tolist() == TOKENS[:3].tolist()
    other = tmp_path / "edu"
    other.mkdir()
    np.save(other / "edufineweb_val_000000.npy", TOKENS[:3])
    np.save(other / "edufineweb_train_000001.npy", TOKENS)
    train, val, _ = open_folder(other)
    assert train[0].tokens[:].tolist() == TOKENS.tolist()


def test_only_gpt2_tokens_are_written():
    with pytest.raises(ValueError, match="50256"):
        shard_bytes(np.array([50257], dtype=np.uint16))
    with pytest.raises(ValueError, match="uint16"):
        shard_bytes(TOKENS.astype(np.int64))


def change(path, **words):
    content = bytearray(path.read_bytes())
    if "magic" in words:
        content[:4] = struct.pack("<i", words["magic"])
    if "version" in words:
        content[4:8] = struct.pack("<i", words["version"])
    if "last" in words:
        content[-2:] = struct.pack("<H", words["last"])
    path.write_bytes(content[: words.get("length", len(content))])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"magic": 1}, "begins with 1, and a shard with 20240520"),
        ({"version": 9}, "version 9"),
        ({"length": 1030}, "should be 1,036 bytes long"),
        ({"length": 2}, "begins with nothing"),
    ],
)
def test_a_wrong_header_or_length_is_refused(folder, words, line):
    path = folder / "toy_train_000001.bin"
    change(path, **words)
    with pytest.raises(BadInput, match=line):
        open_folder(folder)


def test_a_hash_that_differs_is_refused(folder):
    path = folder / "toy_train_000001.bin"
    change(path, last=1)
    train, _, _ = open_folder(folder)
    with pytest.raises(BadInput, match=r"toy_train_000001\.bin is not the file"):
        train[0].check()


def test_a_token_above_gpt2s_largest_is_refused(folder):
    path = folder / "toy_train_000001.bin"
    (folder / "manifest.json").unlink()
    change(path, last=50257)
    train, _, _ = open_folder(folder)
    with pytest.raises(BadInput, match="token 50257 at position 5"):
        train[0].check()


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(BadInput, match=r"python -m data\.fineweb .* --out "):
        open_folder(tmp_path / "nowhere")


def test_a_shard_that_the_manifest_lists_has_to_be_there(folder):
    (folder / "toy_train_000002.bin").unlink()
    with pytest.raises(BadInput, match=r"toy_train_000002\.bin is in the manifest"):
        open_folder(folder)


def test_a_folder_without_validation_is_refused(folder):
    (folder / "manifest.json").unlink()
    (folder / "toy_val_000000.bin").unlink()
    with pytest.raises(BadInput, match="no validation shard"):
        open_folder(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"shards": [{"file": "x"}]}'])
def test_a_broken_manifest_is_refused(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(BadInput, match=r"manifest\.json"):
        open_folder(folder)


def test_verify_says_what_it_checked(folder, capsys):
    shards.main(["verify", str(folder)])
    printed = capsys.readouterr().out
    assert "toy_train_000001.bin: 6 tokens, sha256 and tokens right" in printed
    assert "toy set: 3 shards, 12 tokens, all right" in printed
    with pytest.raises(SystemExit, match="2"):
        shards.main(["verify"])


def test_info_counts_documents_across_shards(folder, capsys):
    shards.main(["info", str(folder)])
    printed = capsys.readouterr().out
    assert "toy_train_000001.bin: 6 tokens, 2 documents begin in it" in printed
    # In order: 50256 7 0 | 50256 5 6 50256 7 0 | 50256 5 6. Each document has two tokens.
    assert "toy set: 12 tokens in 4 documents, 3.0 tokens each, the longest 2" in printed
    assert "it begins: '(!'" in printed


def test_info_measures_a_document_that_goes_on_in_the_next_shard(tmp_path, capsys):
    tokens = np.array([50256, 1, 2, 3, 4, 5, 6, 50256, 7], dtype=np.uint16)
    write_folder(tmp_path, "toy", [tokens[3:5], tokens[5:]], tokens[:3], "toy set")
    shards.main(["info", str(tmp_path)])
    assert "9 tokens in 2 documents, 4.5 tokens each, the longest 6" in capsys.readouterr().out


def test_converted_folders_hold_the_same_tokens(folder):
    train, val = TOKENS.tolist() + TOKENS[:3].tolist(), TOKENS[3:].tolist()
    shards.main(["convert", str(folder), "--to", "npy"])
    target = folder.with_name(folder.name + "-npy")
    names = ["toy_train_000001.npy", "toy_train_000002.npy", "toy_val_000000.npy"]
    assert sorted(path.name for path in target.iterdir()) == names
    first, second, third = (np.load(target / name) for name in names)
    assert [*first, *second] == train
    assert third.tolist() == val
    assert first.dtype == np.uint16
    shards.main(["convert", str(folder), "--to", "nanogpt"])
    target = folder.with_name(folder.name + "-nanogpt")
    assert np.fromfile(target / "train.bin", "<u2").tolist() == train
    assert np.fromfile(target / "val.bin", "<u2").tolist() == val


def test_a_damaged_shard_is_not_converted(folder):
    change(folder / "toy_train_000002.bin", last=1)
    with pytest.raises(BadInput, match="sha256 differs"):
        shards.main(["convert", str(folder), "--to", "nanogpt"])
    assert not (folder.with_name(folder.name + "-nanogpt") / "train.bin").exists()


def test_nothing_is_converted_without_room(folder, monkeypatch):
    monkeypatch.setattr(shards, "free_bytes", lambda _: 10)
    with pytest.raises(BadInput, match="not enough disk"):
        shards.main(["convert", str(folder), "--to", "npy"])
    assert not folder.with_name(folder.name + "-npy").exists()


def test_wrong_npy_files_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", TOKENS.astype(np.int64))
    with pytest.raises(BadInput, match="uint16"):
        open_shard(tmp_path / "x.npy")
    np.save(tmp_path / "y.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BadInput, match="holds object"):
        open_shard(tmp_path / "y.npy")
    (tmp_path / "z.npy").write_bytes(b"text")
    with pytest.raises(BadInput, match="can't read"):
        open_shard(tmp_path / "z.npy")
