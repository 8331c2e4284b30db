"""Folders of shards: which files belong to one, and what verify, info and convert make of it."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from data import shards
from data.shards import open_folder, write_folder
from launch.errors import BadInput
from tests.toy_shards import TOKENS, change, write_toy


@pytest.fixture
def folder(tmp_path):
    return write_toy(tmp_path)


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


@pytest.mark.parametrize("content", ["{", "[]", '{"shards": [{"file": "x"}]}', "[" * 100_000])
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


def test_a_shard_outside_the_manifest_is_refused(folder):
    shutil.copy(folder / "toy_train_000001.bin", folder / "toy_train_000003.bin")
    with pytest.raises(BadInput, match=r"toy_train_000003\.bin is not in the manifest"):
        open_folder(folder)


def test_a_shard_in_two_formats_is_not_taken_twice(folder):
    (folder / "manifest.json").unlink()
    np.save(folder / "toy_train_000001.npy", TOKENS)
    with pytest.raises(BadInput, match=r"toy_train_000001\.bin and .*\.npy, the same shard twice"):
        open_folder(folder)


def test_hidden_files_are_no_shards(folder):
    (folder / "._toy_train_000001.bin").write_bytes(b"what macOS leaves")
    (folder / ".toy_train_000009.bin").write_bytes(b"")
    train, val, _ = open_folder(folder)
    assert (len(train), len(val)) == (2, 1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("train.bin", "train"), ("val.npy", "val"), ("tiny_shakespeare_train.bin", "train"),
     ("tiny_shakespeare_val.bin", "val"), ("edu_fineweb_train_000001.bin", "train"),
     ("train_of_mine_val_000000.bin", "val")],
)
def test_what_a_shard_is_for_stands_in_its_name(name, kind):
    assert shards.kind_of(Path(name)) == kind


@pytest.mark.parametrize("name", ["retrain.bin", "train.txt", ".train.bin", "training_data.bin"])
def test_other_files_are_no_shards(tmp_path, name):
    (tmp_path / name).write_bytes(b"xx")
    assert shards.shard_paths(tmp_path) == []


@pytest.mark.parametrize("missing", ["toy_train_000001.bin", "toy_val_000000.bin"])
@pytest.mark.parametrize("manifest", [True, False])
def test_no_remedy_writes_into_a_folder_that_holds_something(folder, missing, manifest):
    (folder / missing).unlink()
    if not manifest:
        (folder / "manifest.json").unlink()
        for path in folder.glob(missing[:7] + "*"):
            path.unlink()
    with pytest.raises(BadInput) as error:
        open_folder(folder)
    assert "--out" not in str(error.value)


def test_a_folder_of_something_else_says_what_it_holds(tmp_path):
    (tmp_path / "a.parquet").touch()
    with pytest.raises(BadInput, match=r"holds no shards .* but a\.parquet\. .* of their own"):
        open_folder(tmp_path)


def test_a_half_made_folder_is_refused(folder):
    (folder / "manifest.json").rename(folder / ".progress.json")
    with pytest.raises(BadInput, match="is half made"):
        open_folder(folder)


def test_verify_goes_on_after_a_damaged_shard(folder, capsys):
    change(folder / "toy_train_000001.bin", last=1)
    change(folder / "toy_val_000000.bin", length=1025)
    with pytest.raises(BadInput, match="2 of these lines say what is wrong"):
        shards.main(["verify", str(folder)])
    val, first, second = capsys.readouterr().out.splitlines()
    assert val.startswith("wrong: ")
    assert "toy_val_000000.bin should be 1,030 bytes long" in val
    assert first.startswith("wrong: ")
    assert "toy_train_000001.bin is not the file" in first
    assert second == "toy_train_000002.bin: 3 tokens, sha256 and tokens right"


def test_verify_names_what_is_missing_and_what_nobody_listed(folder, capsys):
    (folder / "toy_train_000002.bin").rename(folder / "toy_train_000003.bin")
    with pytest.raises(BadInput, match="2 of these lines"):
        shards.main(["verify", str(folder)])
    printed = capsys.readouterr().out
    assert "toy_train_000003.bin is not in the manifest" in printed
    assert "toy_train_000002.bin is in the manifest and not on the disk" in printed


@pytest.mark.parametrize("name", ["[v1] data", "it's [bold]", "a;b $HOME"])
def test_odd_names_are_names(folder, name, capsys):
    odd = folder.rename(folder.with_name(name))
    shards.main(["verify", str(odd)])
    shards.main(["info", str(odd)])
    shards.main(["convert", str(odd), "--to", "npy"])
    shards.main(["info", f"{odd}-npy"])
    assert capsys.readouterr().out.count("12 tokens") == 3


def test_a_path_in_a_printed_command_is_quoted(tmp_path):
    with pytest.raises(BadInput) as error:
        open_folder(tmp_path / "[v1] it's")
    command = str(error.value).split("`")[1]
    assert shlex.split(command)[-1] == str(tmp_path / "[v1] it's")


def test_dangling_links_are_named_as_such(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    with pytest.raises(BadInput, match="link is a link to nowhere, and nothing is there"):
        open_folder(link)
    path = folder / "toy_train_000001.bin"
    path.unlink()
    path.symlink_to("blobs/gone")
    with pytest.raises(BadInput, match=r"toy_train_000001\.bin is a link to blobs/gone"):
        open_folder(folder)


def nested(folder: Path, *commits: str) -> Path:
    """The shards where the Hub's client puts them, under each of these commits."""
    hub = folder.with_name(f"{folder.name}-hub") / "datasets--toy"
    for commit in commits:
        shutil.copytree(folder, hub / "snapshots" / commit)
    shutil.copytree(folder, hub / ".cache")
    return hub


def test_shards_that_the_hubs_client_nested_are_found(folder, capsys):
    hub = nested(folder, "abc")
    train, _, name = open_folder(hub)
    assert train[0].path == hub / "snapshots" / "abc" / "toy_train_000001.bin"
    assert name == "toy set"
    assert f"the shards of {hub} lie in {hub}/snapshots/abc" in capsys.readouterr().out
    shards.main(["verify", str(hub)])
    shards.main(["info", str(hub)])


def test_several_nested_folders_are_a_question(folder):
    with pytest.raises(BadInput, match=r"2 folders below it.*snapshots/abc, .*snapshots/def"):
        open_folder(nested(folder, "abc", "def"))


@pytest.mark.parametrize("change", [{"sha256": ""}, {"sha256": None}, {"file": "../x_train.bin"}])
def test_an_entry_that_leaves_a_shard_unchecked_is_refused(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1] |= change
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="is no manifest"):
        open_folder(folder)


def test_a_file_is_no_folder_and_an_empty_folder_can_be_filled(folder, tmp_path):
    with pytest.raises(BadInput, match="is a file, and --data.dir takes a folder"):
        open_folder(folder / "toy_train_000001.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"is empty: `python -m data\.fineweb"):
        open_folder(tmp_path / "empty")


@pytest.mark.parametrize("statistics", [None, ["x"], {"documents": "many", "tokens": 3}])
def test_any_statistics_in_a_manifest_are_shown(folder, statistics, capsys):
    change_manifest = json.loads((folder / "manifest.json").read_text())
    change_manifest["statistics"] = statistics
    (folder / "manifest.json").write_text(json.dumps(change_manifest))
    shards.main(["info", str(folder)])
    printed = capsys.readouterr().out
    assert "tokens in" in printed and "it begins: " in printed  # whatever the statistics are


def test_a_link_where_a_conversion_works_is_not_followed(folder, tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "toy-nanogpt").mkdir()
    (tmp_path / "toy-nanogpt" / ".val.bin.tmp").symlink_to(tmp_path / "precious")
    shards.main(["convert", str(folder), "--to", "nanogpt"])
    assert (tmp_path / "precious").read_text() == "kept"
