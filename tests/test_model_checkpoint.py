"""Checkpoints are whole or absent; a damaged one is named and passed over."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.choice import open_model
from launch.errors import BadInput
from launch.world import World
from model import checkpoint
from model.gpt2 import GPT
from model.safetensors_layout import TensorFile
from model.train_state import load_train_state
from tests.saved import CONFIG, trained, truncate


def test_everything_comes_back(tmp_path, run):
    saved, fresh = trained(2), trained(5)
    torch.manual_seed(2)
    fresh.scaler.state[0] = 1.0
    state = load_train_state(fresh, run / "checkpoints" / "step_00000002")
    assert (state["step"], state["tokens"], fresh.scaler.scale) == (2, 64, 65536.0)
    parameters = [state.model.module.parameters() for state in (saved, fresh)]
    for one, two in zip(*parameters, strict=True):
        assert torch.equal(one, two)
        old, new = saved.optimizer.state[one], fresh.optimizer.state[two]
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_it_holds_gpt2s_names_and_no_padding(run):
    folder = run / "checkpoints" / "step_00000002"
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]
    tensors = load_file(folder / "model.safetensors")
    assert tensors["wte.weight"].shape == (50257, 32)
    assert "h.0.attn.c_attn.weight" in tensors
    moments = load_file(folder / "optimizer.safetensors")
    assert moments["wte.weight.exp_avg"].shape == (50257, 32)


def test_the_files_are_what_the_library_writes(run):
    """Our writer knows offsets that safetensors' own does not tell; the format is the same."""
    folder = run / "checkpoints" / "step_00000002"
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors = load_file(folder / name)
        save_file(tensors, folder / "theirs", metadata={"format": "pt"})
        theirs = load_file(folder / "theirs")
        assert all(torch.equal(theirs[key], tensors[key]) for key in theirs)
        assert int.from_bytes((folder / name).read_bytes()[:8], "little") % 8 == 0


def flip_a_bit(folder):
    path = folder / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "optimizer.safetensors was altered"


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json is missing"


def garble_the_manifest(folder):
    (folder / "manifest.json").write_text("[1, 2")
    return "manifest.json can't be read"


def nest_the_manifest(folder):
    (folder / "manifest.json").write_text("[" * 100_000)
    return "manifest.json can't be read"


def lose_the_state(folder):
    (folder / "state.json").unlink()
    return "state.json is missing"


def list_other_files(folder, forget="", **more):
    path = folder / "manifest.json"
    files = json.loads(path.read_text())["files"] | more
    files.pop(forget, None)
    path.write_text(json.dumps({"files": files}))


def leave_out_the_state(folder):
    list_other_files(folder, forget="state.json")
    return "state.json is not in manifest.json"


def leave_out_the_config(folder):
    (folder / "config.json").unlink()
    list_other_files(folder, forget="config.json")
    return "config.json is missing"


def name_a_device(folder):
    list_other_files(folder, **{"/dev/zero": {"bytes": 0, "sha256": ""}})
    return "names '/dev/zero', which is no file of a checkpoint"


def name_a_file_outside(folder):
    list_other_files(folder, **{"../step_00000001": {"bytes": 0, "sha256": ""}})
    return "names '../step_00000001', which is no file of a checkpoint"


def link_to_a_device(folder):
    (folder / "more").symlink_to("/dev/zero")
    list_other_files(folder, more={"bytes": 0, "sha256": ""})
    return "more is no plain file"


def link_the_weights(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")
    return "model.safetensors is no plain file"


def put_a_pipe_for_the_manifest(folder):
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    return "manifest.json is no plain file"


def promise_endless_files(folder):
    list_other_files(folder, more={"bytes": float("inf"), "sha256": ""})
    return "manifest.json can't be read"


@pytest.mark.parametrize(
    "harm",
    [truncate, flip_a_bit, lose_the_manifest, garble_the_manifest, nest_the_manifest,
     lose_the_state, leave_out_the_state, leave_out_the_config, name_a_device,
     name_a_file_outside, link_to_a_device, link_the_weights, put_a_pipe_for_the_manifest,
     promise_endless_files],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(run, harm, capsys):
    words = harm(run / "checkpoints" / "step_00000002")
    found = checkpoint.find_resume_checkpoint("auto", run)
    assert found == run / "checkpoints" / "step_00000001"
    printed = capsys.readouterr().out
    assert words in printed
    assert "step_00000002 is damaged" in printed
    assert "going back to" in printed
    with pytest.raises(BadInput, match="is damaged"):
        checkpoint.find(str(run / "checkpoints" / "step_00000002"))


def test_no_whole_checkpoint_left_is_an_error_and_not_a_new_start(run):
    for step in ("step_00000001", "step_00000002"):
        truncate(run / "checkpoints" / step)
    with pytest.raises(BadInput, match="no older one is left"):
        checkpoint.find_resume_checkpoint("auto", run)


def test_what_is_no_checkpoint_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(BadInput, match=r"looked for .*manifest\.json"):
        checkpoint.find(str(tmp_path))


def test_weights_alone_can_not_be_resumed(run):
    folder = run / "checkpoints" / "step_00000002"
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(BadInput, match="--init"):
        load_train_state(trained(), folder)


def test_sizes_are_compared_before_anything_is_hashed(run):
    folder, hashed = run / "checkpoints" / "step_00000002", []
    with (folder / "state.json").open("a") as file:  # the last of the files
        file.write(" ")
    assert "state.json has" in checkpoint.find_damage(folder, hashed.append)
    assert hashed == []


def test_hashing_tells_its_progress(run):
    hashed = []
    checkpoint.find_resume_checkpoint("auto", run, hashed.append)
    files = (run / "checkpoints" / "step_00000002").iterdir()
    assert sum(hashed) == sum(p.stat().st_size for p in files if p.name != "manifest.json")


def test_weights_of_another_shape_than_the_model_are_refused(run):
    """Rows that a file lacks aren't taken for padding."""
    folder = run / "checkpoints" / "step_00000002"
    tensors = load_file(folder / "model.safetensors")
    tensors["wte.weight"] = tensors["wte.weight"][:50_000]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"wte.weight has shape \(50000, 32\), expected \(50257"):
        load_train_state(trained(), folder)


def test_shapes_are_compared_before_a_model_is_made(run, monkeypatch):
    """A config.json may ask for more memory than there is: of this width, for 480 GB."""
    folder = run / "checkpoints" / "step_00000002"
    content = json.loads((folder / "config.json").read_text())
    content["config"]["model"]["n_embd"] = 100_000
    (folder / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(checkpoint, "GPT", None)
    with pytest.raises(BadInput, match=r"wte.weight has shape \(50257, 32\), expected \(50257, 1"):
        checkpoint.load_resolved(str(folder))


def test_a_file_cut_short_while_it_is_read_is_an_error_and_not_sigbus(run):
    path = run / "checkpoints" / "step_00000002" / "model.safetensors"
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(ValueError, match="ends in the middle of"):
            for name in file:
                file[name]
    with pytest.raises(BadInput, match="can't read .*lies outside of it"):
        checkpoint.load_weights(GPT(CONFIG), path.parent)


@pytest.mark.parametrize(
    "header",
    [b"", b"[]", b'{"x": 1}', b"[" * 100_000,
     b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
     b'{"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
     b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}',
     b'{"x": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}'],
    ids=lambda header: header[:60].decode(),
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match="no safetensors file|can't be read|lies outside"):
        TensorFile(path)


def test_ranks_that_evaluate_load_what_rank_0_chose(run):
    """The run that is being evaluated saves step 2 after rank 0 has looked."""

    class Second(World):
        def broadcast_from_rank0(self, function, *arguments):
            return str(run / "checkpoints" / "step_00000001")

    with open_model(str(run), "fp32", Second(0, 1, torch.device("cpu"))) as model:
        wpe = load_file(run / "checkpoints" / "step_00000001" / "model.safetensors")["wpe.weight"]
        assert torch.equal(model.wpe.weight, wpe)
