"""Checkpoints are whole or absent; a damaged one is named and passed over."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.errors import BadInput, Failed
from model import checkpoint, saving
from model.checkpoint import TrainState
from model.gpt2 import GPT, GPTConfig
from model.optim import LossScaler, OptimConfig, configure_optimizers
from model.parallel import ParallelModel
from model.saving import Saver
from tests.running import ALONE, Silent

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=16)


def trained(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = ParallelModel(GPT(CONFIG), "ddp", ALONE, "fp32")
    optimizer = configure_optimizers(model.shards, OptimConfig())
    idx = torch.randint(50257, (2, 17))
    for _ in range(2):
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return TrainState(model, optimizer, LossScaler.of("fp16"))


def save(run, step, state, keep=3):
    progress = {"step": step, "tokens": step * 32, "skipped": []}
    Saver(run, state, Silent(), keep).save(step, progress, wait=True)


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints of steps 1 and 2."""
    config = {"config": {"model": vars(CONFIG)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for step in (1, 2):
        save(tmp_path, step, trained(step))
    return tmp_path


def test_everything_comes_back(tmp_path, run):
    saved, fresh = trained(2), trained(5)
    torch.manual_seed(2)
    fresh.scaler.scale = 1.0
    state = checkpoint.load_train_state(fresh, run / "checkpoints" / "step_00000002")
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


def test_old_ones_are_pruned_and_nothing_else_is_visible(run):
    save(run, 3, trained(), keep=2)
    names = [p.name for p in (run / "checkpoints").iterdir()]
    assert sorted(names) == ["step_00000002", "step_00000003"]


def test_the_files_are_what_the_library_writes(run):
    """Our writer knows offsets that safetensors' own does not tell; the format is the same."""
    folder = run / "checkpoints" / "step_00000002"
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors = load_file(folder / name)
        save_file(tensors, folder / "theirs", metadata={"format": "pt"})
        theirs = load_file(folder / "theirs")
        assert all(torch.equal(theirs[key], tensors[key]) for key in theirs)
        assert int.from_bytes((folder / name).read_bytes()[:8], "little") % 8 == 0


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "model.safetensors has"


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


def lose_the_state(folder):
    (folder / "state.json").unlink()
    return "state.json is missing"


@pytest.mark.parametrize(
    "harm", [truncate, flip_a_bit, lose_the_manifest, garble_the_manifest, lose_the_state]
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


def test_a_damaged_checkpoint_is_replaced_by_the_next_save(run):
    truncate(run / "checkpoints" / "step_00000002")
    save(run, 2, trained(2), keep=3)
    assert checkpoint.find_damage(run / "checkpoints" / "step_00000002") == ""


def test_a_full_disk_leaves_the_checkpoint_before(run, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.os, "pwrite", full)
    with pytest.raises(Failed, match="No space left"):
        save(run, 3, trained(), keep=1)
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["step_00000001", "step_00000002"]
    assert checkpoint.newest_valid(run / "checkpoints")[0].name == "step_00000002"


def test_a_rank_that_does_not_see_the_folder_is_told_so(run):
    saver = Saver(run, trained(), Silent(), keep=3)
    with pytest.raises(Failed, match="on a file system that all ranks share"):
        saver._open(run / "checkpoints" / ".step_00000009.tmp")


def test_left_overs_of_a_killed_save_are_removed_and_never_found(run):
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step_00000002", checkpoints / ".step_00000003.tmp")
    assert checkpoint.newest_valid(checkpoints)[0].name == "step_00000002"
    checkpoint.clean_up(checkpoints)
    assert not (checkpoints / ".step_00000003.tmp").exists()


def test_what_is_no_checkpoint_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(BadInput, match=r"looked for .*manifest\.json"):
        checkpoint.find(str(tmp_path))


def test_weights_alone_can_not_be_resumed(run):
    folder = run / "checkpoints" / "step_00000002"
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(BadInput, match="--init"):
        checkpoint.load_train_state(trained(), folder)


def test_pruning_spares_what_was_just_written(run):
    """The run went back from a damaged step 2 to step 1, and stops there once more."""
    truncate(run / "checkpoints" / "step_00000002")
    save(run, 1, trained(1), keep=1)
    assert checkpoint.newest_valid(run / "checkpoints")[0].name == "step_00000001"
