"""Shards: the format of llm.c and those of others, whole or refused."""

import errno
import json
import os
import struct

import numpy as np
import pytest

from data.shard_file import open_shard, shard_bytes
from data.shards import open_folder
from launch.errors import BadInput
from tests.toy_shards import TOKENS, change, write_toy


def read_independently(path) -> list[int]:
    """llm.c's reader in four lines, from its description and not from our code."""
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    assert header[:2] == (20240520, 1)
    assert not any(header[3:])
    return list(struct.unpack(f"<{header[2]}H", content[1024:]))


@pytest.fixture
def folder(tmp_path):
    return write_toy(tmp_path)


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


def test_llmcs_starter_data_is_read(tmp_path):
    (tmp_path / "tiny_shakespeare_train.bin").write_bytes(shard_bytes(TOKENS))
    (tmp_path / "tiny_shakespeare_val.bin").write_bytes(shard_bytes(TOKENS[:3]))
    train, val, _ = open_folder(tmp_path)
    assert train[0].tokens[:].tolist() == TOKENS.tolist()
    assert val[0].tokens[:].tolist() == TOKENS[:3].tolist()


@pytest.mark.parametrize(("length", "words"), [(8001, "8,001 bytes long, an odd number"),
                                               (0, "is empty")])
def test_a_bare_file_that_holds_no_uint16(tmp_path, length, words):
    (tmp_path / "train.bin").write_bytes(bytes([1]) * length)
    (tmp_path / "val.bin").write_bytes(bytes([1]) * 8000)
    with pytest.raises(BadInput, match=words):
        open_folder(tmp_path)


def test_nanogpts_own_vocabularies_are_refused_and_no_pickle_is_opened(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(65, dtype=np.uint16).tofile(tmp_path / name)
    evil = b"cos\nsystem\n(S'touch " + bytes(tmp_path) + b"/ran'\ntR."
    (tmp_path / "meta.pkl").write_bytes(evil)
    with pytest.raises(BadInput, match=r"has a meta\.pkl.* --data\.text input\.txt"):
        open_folder(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("largest", "warned"), [(64, True), (31_999, True), (45_000, False)])
def test_ids_that_no_gpt2_text_has_are_a_warning(tmp_path, capsys, largest, warned):
    tokens = np.resize(np.array([largest, 1], dtype=np.uint16), 5_000)
    tokens.tofile(tmp_path / "train.bin")
    open_shard(tmp_path / "train.bin").check()
    printed = capsys.readouterr().err
    assert (f"warning: the largest token in {tmp_path / 'train.bin'} is {largest:,}" in
            printed) == warned


def test_only_rank_0_warns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    np.ones(5_000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    open_shard(tmp_path / "train.bin").check()
    assert capsys.readouterr().err == ""


def test_an_npy_that_was_cut_short_is_refused(tmp_path):
    np.save(tmp_path / "train.npy", TOKENS)
    os.truncate(tmp_path / "train.npy", 130)
    with pytest.raises(BadInput, match="140 bytes long, and is 130"):
        open_shard(tmp_path / "train.npy")


def test_a_disk_that_fails_is_a_line(folder, monkeypatch):
    shard = open_shard(folder / "toy_train_000001.bin")

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(BadInput, match=r"can't read .*toy_train_000001\.bin: Input/output error"):
        shard.tokens[:3]


def test_a_read_that_gives_less_than_asked_goes_on(folder, monkeypatch):
    shard, preadv = open_shard(folder / "toy_train_000001.bin"), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, to, at: preadv(file, [to[0][:3]], at))
    assert shard.tokens[1:].tolist() == TOKENS[1:].tolist()


NPY = b"\x93NUMPY\x01\x00"
ODD_FILES = {
    "pointer": (".bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
                "is a git-LFS pointer"),
    "magic alone": (".bin", shard_bytes(TOKENS)[:4], "ends within its header of 1,024 bytes"),
    "npy of brackets": (".npy", NPY + bytes([200, 0]) + b"(" * 200, "can't read the .npy header"),
    "npy with a type that is no type": (
        ".npy", NPY + bytes([55, 0]) + b"{'descr': '<,2', 'fortran_order': False, 'shape': (9,)}",
        "can't read the .npy header"),
    "npy of minus signs": (".npy", NPY + bytes([0, 35]) + b"-" * 8959 + b"1",
                           "can't read the .npy header"),
}


@pytest.mark.parametrize("case", ODD_FILES)
def test_odd_files_are_a_line(tmp_path, case):
    ending, content, words = ODD_FILES[case]
    path = tmp_path / f"a_train_000001{ending}"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        open_shard(path)


@pytest.mark.parametrize("name", ["toy_train_000001.bin", "manifest.json"])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BadInput, match=f"{name} is no plain file"):
        open_folder(folder)


def test_tokens_of_32_bits_are_no_tokens_and_zeros_between(tmp_path):
    """As nanoGPT's forks write them for larger vocabularies."""
    for name in ("train.bin", "val.bin"):
        np.arange(5000, dtype=np.uint32).tofile(tmp_path / name)
    with pytest.raises(BadInput, match="train.bin holds numbers of 32 bits"):
        open_folder(tmp_path)
