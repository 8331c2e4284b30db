"""A folder of checkpoints: whole after a kill anywhere, and the right one of them is taken."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from launch.errors import BadInput, Failed
from model import checkpoint
from model.manifest import write_manifest
from tests.saved import names, save, trained, truncate

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
