"""Checkpoints are whole or absent; a damaged one is named and passed over."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.choice import open_model
from launch.errors import BadInput, Failed
from launch.world import World
from model import checkpoint
from model.gpt2 import GPT
from model.manifest import write_manifest
from model.safetensors_layout import TensorFile
from model.train_state import load_train_state
from tests.saved import CONFIG, names, save, trained, truncate


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


# ---- names ----


def test_nothing_but_step_and_eight_digits_is_a_checkpoint(run):
    """A user's copies are neither read nor counted nor deleted."""
    folder = run / "checkpoints"
    theirs = ["step_best", "step_00000002-best", "step_000000009", ".step_best.tmp",
              ".step_00000002-best.old", ".step_2.deleted"]
    for name in theirs:
        shutil.copytree(folder / "step_00000001", folder / name)
    (folder / "step_00000009").write_text("a file")
    assert checkpoint.find(str(run)).name == "step_00000002"
    checkpoint.clean_up(folder)
    save(run, 3, trained(), keep=1)
    assert names(run) == sorted([*theirs, "step_00000003", "step_00000009"])


def test_a_copy_under_another_name_is_of_the_step_in_its_state(run):
    """Its name compares with nothing: step_best of step 1 is not past step 2."""
    copy = shutil.copytree(run / "checkpoints" / "step_00000001", run / "checkpoints" / "step_best")
    with pytest.raises(BadInput, match="goes on to step_00000002, past"):
        checkpoint.find_resume_checkpoint(str(copy), run)
    checkpoint.remove(run / "checkpoints" / "step_00000002")
    assert checkpoint.find_resume_checkpoint(str(copy), run) == copy


# ---- kills ----


def small(folder: Path, content: str) -> Path:
    """A checkpoint whose hashes are right, of a few bytes."""
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text(content)
    write_manifest(folder)
    return folder


def killed_at(operation: int, function, *arguments) -> bool:
    """Calls the function in a process that is killed with -9 just before the given rename or
    deletion. False: it came to its end, there are no so many."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    done = []

    def one_more():
        if len(done) == operation:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)

    rename = Path.rename

    def counted_rename(self, target):
        one_more()
        return rename(self, target)

    def counted_rmtree(folder, **_):
        if folder.exists():
            for path in sorted(folder.iterdir()):
                one_more()
                path.unlink()
            one_more()
            folder.rmdir()

    Path.rename, shutil.rmtree = counted_rename, counted_rmtree
    try:
        function(*arguments)
    finally:
        os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_anywhere_a_checkpoint_of_the_same_step_is_the_old_or_the_new(tmp_path):
    """A rollback's save replaces the checkpoint that the run returned to."""
    found = []
    for kill in range(100):
        for kill_again in range(100):  # while what the first one left is cleaned up
            folder = tmp_path / f"{kill}-{kill_again}"
            final = small(folder / "step_00000002", "old")
            work = small(folder / ".step_00000002.tmp", "new")
            killed = killed_at(kill, checkpoint.put_in_place, work, final)
            killed_again = killed_at(kill_again, checkpoint.clean_up, folder)
            checkpoint.clean_up(folder)
            assert [path.name for path in folder.iterdir()] == ["step_00000002"]
            assert checkpoint.find_damage(final) == ""
            found.append((final / "config.json").read_text())
            if not killed_again:
                break
        if not killed:
            break
    assert not killed
    assert kill >= 6  # aside, in, out of sight, and a deletion of four
    assert found == sorted(found, reverse=True)  # from one point on it's the new one
    assert set(found) == {"old", "new"}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_half_pruned_checkpoint_never_comes_back(tmp_path):
    for kill in range(100):
        folder = tmp_path / str(kill)
        for step in (1, 2, 3):
            newest = small(folder / f"step_0000000{step}", "x")
        killed = killed_at(kill, checkpoint.prune, folder, newest, 1)
        checkpoint.clean_up(folder)
        left = checkpoint.list_checkpoints(folder)
        assert [path.name for path in folder.iterdir() if path not in left] == []
        assert [checkpoint.find_damage(path) for path in left] == [""] * len(left)
        if not killed:
            break
    assert left == [newest]


def test_a_sealed_checkpoint_is_completed_and_another_deleted(tmp_path):
    small(tmp_path / ".step_00000003.tmp", "sealed")
    (small(tmp_path / ".step_00000004.tmp", "not") / "manifest.json").unlink()
    (small(tmp_path / ".step_00000005.tmp", "damaged") / "config.json").write_text("damages")
    small(tmp_path / ".step_00000006.old", "set aside")
    (small(tmp_path / ".step_00000006.tmp", "not") / "manifest.json").unlink()
    checkpoint.clean_up(tmp_path)
    left = {path.name: (path / "config.json").read_text() for path in tmp_path.iterdir()}
    assert left == {"step_00000003": "sealed", "step_00000006": "set aside"}


def test_a_refused_rename_leaves_the_old_checkpoint(run, monkeypatch):
    rename = Path.rename

    def refused(self, target):
        if self.name == ".step_00000002.tmp":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    before = (run / "checkpoints" / "step_00000002" / "manifest.json").read_text()
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(Failed, match="could not save .*step_00000002: .*Input/output error"):
        save(run, 2, trained(7))
    assert names(run) == ["step_00000001", "step_00000002"]
    assert (run / "checkpoints" / "step_00000002" / "manifest.json").read_text() == before


# ---- which one is taken ----


def test_a_copy_or_a_link_with_a_later_steps_name_is_passed_over(run, capsys):
    """Every restart would go back to step 1 for ever, for step 9 stays the newest."""
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step_00000001", checkpoints / "step_00000008")
    (checkpoints / "step_00000009").symlink_to("step_00000001")
    assert checkpoint.find_resume_checkpoint("auto", run).name == "step_00000002"
    assert capsys.readouterr().out.count("it holds step 1; going back to") == 2


def test_a_checkpoint_that_only_bad_steps_followed_is_passed_over(run, capsys):
    checkpoint.mark_doubtful(run, 2, "step 3: the loss is nan")
    assert checkpoint.find_resume_checkpoint("auto", run).name == "step_00000001"
    assert checkpoint.find(str(run)).name == "step_00000001"
    words = "step_00000002 was followed by nothing but bad steps; going back to"
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("warning: ") and words in line for line in lines] == [True, True]
    save(run, 2, trained(2))
    assert checkpoint.find(str(run)).name == "step_00000002"
    assert capsys.readouterr().out.count("warning") == 0


def test_a_doubtful_checkpoint_is_taken_where_no_other_is_left(run, capsys):
    checkpoint.mark_doubtful(run, 2, "step 3: the loss is nan")
    truncate(run / "checkpoints" / "step_00000001")
    assert checkpoint.find_resume_checkpoint("auto", run).name == "step_00000002"
    assert "going on from" in capsys.readouterr().out
    truncate(run / "checkpoints" / "step_00000002")
    with pytest.raises(BadInput, match="step_00000002 is damaged.*no older one is left"):
        checkpoint.find_resume_checkpoint("auto", run)


def test_a_run_returns_to_where_it_branched_off_before_its_first_save(run, tmp_path):
    branch, source = tmp_path / "branch", run / "checkpoints" / "step_00000001"
    branch.mkdir()
    assert checkpoint.find_rollback_checkpoint(branch, source) == source
    with pytest.raises(BadInput, match="no checkpoint"):
        checkpoint.find_rollback_checkpoint(branch, None)
    own = branch / "checkpoints" / "step_00000002"
    shutil.copytree(run / "checkpoints" / "step_00000002", own)
    assert checkpoint.find_rollback_checkpoint(branch, source) == own


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("model.bin", "python -m model.convert {}/model.bin model_converted --to ours"),
        ("out/ckpt.pt", "python -m model.convert {}/out/ckpt.pt ckpt_converted --to ours"),
        ("out", "holds ckpt.pt: `python -m model.convert {}/out/ckpt.pt"),
        ("hub/model.safetensors", "only the weights: name its folder, hf:{}/hub"),
        ("hub", "write hf:{}/hub for a Hugging Face folder"),
        ("checkpoints/step_00000002/model.safetensors", "name {}/checkpoints/step_00000002"),
        ("nothing", "is no checkpoint: looked for {}/nothing/manifest.json"),
    ],
)
def test_what_is_no_checkpoint_is_answered_with_what_to_do(run, named, words):
    for folder in ("out", "hub"):
        (run / folder).mkdir()
    for name in ("model.bin", "out/ckpt.pt", "hub/model.safetensors", "hub/config.json"):
        (run / name).write_bytes(b"")
    with pytest.raises(BadInput) as refused:
        checkpoint.load_model(str(run / named))
    assert words.format(run) in str(refused.value)
    if (run / named).is_file():
        with pytest.raises(BadInput) as refused:
            checkpoint.load_model(f"hf:{run / named}")
        assert words.format(run) in str(refused.value)
