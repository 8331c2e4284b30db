"""Checkpoints: whole or absent, hashed, and readable without running anybody's code.

model/saving.py writes them, model/manifest.py checks them; this file finds them and loads models.
What training goes on from, model/train_state.py puts back.

    runs/NAME/checkpoints/step_00000500/
        model.safetensors      OpenAI's parameter names, master dtype, 50,257 vocabulary rows
        optimizer.safetensors  moments and step of each parameter
        state.json             step, tokens, random states, loss scale, the spike detector's memory
        config.json            the model's shape and what must match on resume
        manifest.json          size and sha256 of each file, written last
        DOUBTFUL               only where nothing but bad steps followed: mark_doubtful()
    runs/NAME/checkpoints/best.json    which of them is the best, under --keep_best: model/best.py

Nothing but `step_` and eight digits is ever taken for a checkpoint. Beside them lie, hidden and
only for moments: .step_00000500.tmp (being written), .old (set aside while a new one of the same
step takes its place) and .deleted (on its way out).
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from kernels import operators
from kernels.operators import Operators
from launch import console
from launch.errors import BadInput
from launch.files import Progress, atomic_write, fsync, no_progress
from model.formats import foreign
from model.formats.hf import from_hf
from model.formats.tensors import check_fits, load_named, without_padding
from model.gpt2 import GPT, GPTConfig
from model.manifest import MANIFEST, find_damage
from model.network import NoFirstWeights, new_network, without_weights
from model.safetensors_layout import TensorFile

NAME = re.compile(r"step_[0-9]{8}")
HIDDEN = re.compile(rf"\.({NAME.pattern})\.(tmp|old|deleted)")
DOUBTFUL = "DOUBTFUL"


# ---- folders ----


def folder_name(step: int) -> str:
    """500 -> step_00000500."""
    return f"step_{step:08d}"


def hidden(final: Path, ending: str) -> Path:
    """step_00000500, "tmp" -> .step_00000500.tmp beside it."""
    return final.with_name(f".{final.name}.{ending}")


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoint folders, newest first."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: path.name, reverse=True)


def put_in_place(work: Path, final: Path) -> None:
    """Gives a sealed checkpoint its name: the old one of the same step aside, the new one in, and
    only then is the old one deleted. Killed at any point, clean_up() finds one of the two whole."""
    aside = hidden(final, "old")
    replaces = final.exists()
    if replaces:
        if aside.exists():
            remove(aside)
        final.rename(aside)
    try:
        work.rename(final)
    except OSError:
        if replaces:
            aside.rename(final)
        raise
    fsync(final.parent)
    if replaces:
        with contextlib.suppress(OSError):  # clean_up() tries again
            remove(aside)


def remove(folder: Path) -> None:
    """Takes a checkpoint out of sight at once, then deletes it."""
    doomed = hidden(_final(folder), "deleted")
    _delete(doomed)
    folder.rename(doomed)
    _delete(doomed)


def prune(
    checkpoints: Path, newest: Path, keep: int, best: Path | None = None, full_rate: int = -1
) -> None:
    """Removes checkpoints older than the `keep` newest good ones, of which `newest` is the first.
    `best` stays in any case, and so does the newest good one up to step `full_rate`.

    Newer folders are damaged or doubtful ones that the run went back from: they aren't counted, nor
    are doubtful ones in between, or they would push out the good ones.
    """
    ours = [folder for folder in list_checkpoints(checkpoints) if folder.name <= newest.name]
    good = [folder for folder in ours if not (folder / DOUBTFUL).exists()]
    oldest = good[:keep][-1]
    before_decay = [folder for folder in good if folder.name <= folder_name(max(0, full_rate))]
    stay = {best, *before_decay[:1]} if full_rate >= 0 else {best}
    for folder in ours:
        if folder.name < oldest.name and folder not in stay:
            remove(folder)


def clean_up(checkpoints: Path, progress: Progress = no_progress) -> None:
    """Ends what a kill interrupted: a sealed checkpoint gets its name, one that was set aside gets
    it back, the rest is deleted. Only the run's owner may call this.

    progress: told of bytes as a sealed checkpoint is hashed.
    """
    left = checkpoints.iterdir() if checkpoints.is_dir() else []
    finals = {_final(path) for path in left if HIDDEN.fullmatch(path.name)}
    for final in sorted(finals):
        work, aside = hidden(final, "tmp"), hidden(final, "old")
        if not final.exists() and work.exists() and not find_damage(work, progress):
            work.rename(final)
        elif not final.exists() and aside.exists():
            aside.rename(final)
        fsync(checkpoints)
        for path in (work, aside, hidden(final, "deleted")):
            _delete(path)


def _final(path: Path) -> Path:
    """The name without what hides it."""
    match = HIDDEN.fullmatch(path.name)
    return path.with_name(match[1]) if match else path


def _delete(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def mark_doubtful(run: Path, step: int, reason: str) -> None:
    """Has the next start pass over the checkpoints of `step` and later, while there is an older
    one: nothing but bad steps followed them, so they may be the cause. The mark goes when a step is
    saved anew."""
    for folder in list_checkpoints(run / "checkpoints"):
        if folder.name >= folder_name(step):
            with contextlib.suppress(OSError):  # the run's end has a reason of its own to tell
                atomic_write(folder / DOUBTFUL, reason + "\n")


# ---- finding ----


def newest_valid(
    checkpoints: Path, progress: Progress = no_progress
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose hashes are right, and a warning about each that was passed over.

    None where there is no checkpoint yet. Doubtful ones are taken where there is no other. Raises
    BadInput where there are some and none is whole. progress: told of bytes as they are hashed.
    """
    all_of_them = list_checkpoints(checkpoints)
    doubtful = [folder for folder in all_of_them if (folder / DOUBTFUL).exists()]
    passed_over: list[str] = []
    for folder in all_of_them:
        if folder in doubtful:
            passed_over.append(f"{folder} was followed by nothing but bad steps")
            continue
        problem = find_damage(folder, progress) or _wrong_step(folder)
        if not problem:
            return folder, [f"{line}; going back to {folder}" for line in passed_over]
        passed_over.append(f"{folder} is damaged: {problem}")
    for folder in doubtful:
        problem = find_damage(folder, progress)
        if not problem:
            return folder, [*passed_over, f"going on from {folder} all the same: no other is left"]
        passed_over.append(f"{folder} is damaged: {problem}")
    if passed_over:
        raise BadInput(f"{'; '.join(passed_over)}; no older one is left: start anew with --name")
    return None, []


def _wrong_step(folder: Path) -> str:
    """Says so where a checkpoint isn't of the step in its name: a user's copy of another, or a link
    to it. Were it the newest for ever, every restart would go back to it."""
    saved = _saved_step(folder)
    if saved < 0 or folder_name(saved) == folder.name:
        return ""
    return f"it holds step {saved}"


def _newest_valid(checkpoints: Path, progress: Progress) -> Path | None:
    """The same, its warnings printed."""
    found, warnings = newest_valid(checkpoints, progress)
    for line in warnings:
        with contextlib.suppress(OSError, ValueError):  # what can't be printed is dropped
            print(console.warning(line), flush=True)
    return found


def find(spec: str, progress: Progress = no_progress) -> Path:
    """The checkpoint folder that `spec` names: itself, or a run folder's newest valid one."""
    folder = Path(spec)
    if (folder / "checkpoints").is_dir():
        found = _newest_valid(folder / "checkpoints", progress)
        if found is None:
            raise BadInput(f"the run {folder} has no checkpoint yet")
        return found
    if not any((folder / name).is_file() for name in (MANIFEST, "state.json")):
        raise BadInput(
            foreign.advice(folder) or _nearest(folder)
            or f"{spec} is no checkpoint: looked for {folder / MANIFEST} (a checkpoint) and "
            f"{folder / 'checkpoints'} (a run); write hf:{spec} for a Hugging Face folder"
        )
    problem = find_damage(folder, progress)
    if problem:
        raise BadInput(f"{folder} is damaged: {problem}")
    return folder


def _nearest(folder: Path) -> str:
    """What may have been meant by a folder that isn't there; '' where nothing is near."""
    if (Path("runs") / folder / "checkpoints").is_dir():
        return f"{folder} is no checkpoint: did you mean runs/{folder}?"
    there = [path.name for path in reversed(list_checkpoints(folder.parent))]
    if not folder.exists() and there:
        return f"there is no {folder.name} in {folder.parent}: there are {', '.join(there)}"
    return ""


def find_resume_checkpoint(
    resume: str, run: Path, progress: Progress = no_progress
) -> Path | None:
    """The checkpoint that a run goes on from, its hashes checked; None for a new run.

    resume: "auto", "never" or a checkpoint. Raises BadInput where the run's folder forbids it.
    """
    checkpoints = run / "checkpoints"
    if resume == "never":
        if (run / "config.json").exists():
            raise BadInput(f"{run} holds a run, and --resume never refuses it: choose --name")
        return None
    own = list_checkpoints(checkpoints)
    branched = own and Path(resume).resolve().parent != checkpoints.resolve()
    if resume == "auto" or branched:  # a run that began in another run's checkpoint goes on too
        return _newest_valid(checkpoints, progress)
    source = find(resume, progress)
    if own and own[0].name > folder_name(step_of(source)):
        raise BadInput(f"{run} goes on to {own[0].name}, past {source}: choose another --name "
                       "for a run that branches off there")
    return source


def find_rollback_checkpoint(
    run: Path, resumed_from: Path | None, progress: Progress = no_progress
) -> Path:
    """The checkpoint that a running run returns to: its newest, or before its first one that of
    another run which it branched off from."""
    if resumed_from and not list_checkpoints(run / "checkpoints"):
        return find(str(resumed_from), progress)
    return find(str(run), progress)


def step_of(folder: Path) -> int:
    """The step of a checkpoint, whatever its folder is called; -1 for one without training state,
    which is refused when it's loaded."""
    if NAME.fullmatch(folder.name):
        return int(folder.name.removeprefix("step_"))
    return _saved_step(folder)


def _saved_step(folder: Path) -> int:
    """The step in a checkpoint's state.json; -1 where there is none."""
    try:
        return int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


# ---- loading ----


def resolve(spec: str) -> str:
    """What load_resolved() takes: hf:DIR as it is, or the folder of the checkpoint that `spec`
    names. On several ranks, rank 0's answer is for all: a run that is being trained saves and
    deletes, and ranks that looked for themselves could load different checkpoints."""
    return spec if spec.startswith("hf:") else str(find(spec))


def load_resolved(source: str, ops: Operators = operators.TORCH) -> GPT:
    """The model of a checkpoint folder, whose hashes were checked, or of hf:DIR."""
    if source.startswith("hf:"):
        return without_padding(from_hf(source.removeprefix("hf:"), ops), source).eval()
    folder = Path(source)
    config = model_config(folder)
    with _open_weights(folder) as tensors:  # before a model of the size that config.json says
        check_fits(without_weights(config), _shapes(tensors), folder)
    with NoFirstWeights():
        model = new_network(config, ops)
    load_weights(model, folder)
    return model.eval()  # without dropout


def load_model(spec: str, ops: Operators = operators.TORCH) -> GPT:
    """The model of a checkpoint, a run folder (its newest) or hf:DIR, in its master dtype.

    Raises BadInput for another vocabulary than GPT-2's; padding rows of others are left out.
    """
    return load_resolved(resolve(spec), ops)


def characters_of(source: str) -> str:
    """What the tokens of a checkpoint's model stand for, in the order of their ids, if they are
    characters (--data.vocab char); '' for GPT-2's tokens. source: as load_resolved() takes it."""
    if source.startswith("hf:"):
        return ""
    folder = Path(source)
    characters, n_vocab = read_config(folder).get("characters", ""), model_config(folder).n_vocab
    if not isinstance(characters, str) or len(set(characters)) not in (0, n_vocab):
        raise BadInput(f"{folder / 'config.json'}: \"characters\" are not the {n_vocab} different "
                       "ones that its model reads")
    return characters


def model_config(folder: Path) -> GPTConfig:
    """The shape of the model in a checkpoint."""
    try:
        return GPTConfig(**read_config(folder)["config"]["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder / 'config.json'} has no model shape: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_bytes())  # of bytes it skips a byte order mark
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"can't read {path}: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is no object of settings")
    return content


def copy_weights(model: GPT, source: str, characters: str = "") -> None:
    """Copies weights (resolve() says which) into a model, whose tokens stand for `characters` or
    are GPT-2's. Raises BadInput for another shape or other tokens."""
    theirs = characters_of(source)
    if theirs != characters:
        names = [f"{len(of)} characters" if of else "GPT-2's tokens" for of in (theirs, characters)]
        raise BadInput(f"{source} reads {names[0]}, and this run's data is of {names[1]}: weights "
                       "go over only where every token stands for the same (--data.vocab)")
    given = load_resolved(source)
    if replace(given.config, dropout=model.config.dropout) != model.config:
        flags = [f"--model.{name} {value}" for name, value in asdict(given.config).items()
                 if value != getattr(model.config, name) and name != "dropout"]
        raise BadInput(f"{source} holds a model of another shape than this run's: add "
                       f"{' '.join(flags)}")
    model.load_state_dict(given.state_dict())


def load_weights(model: GPT, folder: Path) -> None:
    """Copies a checkpoint's weights into a model of its shape, which takes on their dtype."""
    with _open_weights(folder) as tensors:
        if torch.float64 in tensors.dtypes():
            model.double()
        load_named(model, tensors, folder, _shapes(tensors))


@contextlib.contextmanager
def _open_weights(folder: Path) -> Iterator[TensorFile]:
    """A checkpoint's model.safetensors. Raises BadInput, also later, where it can't be read."""
    path = folder / "model.safetensors"
    try:
        with TensorFile(path) as tensors:
            yield tensors
    except (OSError, ValueError) as error:
        raise BadInput(f"can't read {path}: {error}") from None


def _shapes(tensors: TensorFile) -> dict[str, tuple[int, ...]]:
    return {name: tensors.shape(name) for name in tensors}
