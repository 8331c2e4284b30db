"""Checkpoints: whole or absent, hashed, and readable without running anybody's code.

model/saving.py writes them; this file finds, checks and loads them.

    runs/NAME/checkpoints/step_00000500/
        model.safetensors      OpenAI's parameter names, master dtype, 50,257 vocabulary rows
        optimizer.safetensors  moments and step of each parameter
        state.json             step, tokens, random states, loss scale, the spike guard's memory
        config.json            the model's shape and what must match on resume
        manifest.json          size and sha256 of each file, written last

It is written as .step_00000500.tmp, flushed, and appears by rename.
"""

import base64
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import kernels
from kernels import Operators
from launch.errors import BadInput
from launch.files import atomic_write, fsync, sha256
from model.formats.hf import from_hf
from model.formats.tensors import load_named, without_padding
from model.gpt2 import GPT, GPTConfig
from model.optim import ROW_STATE, SCALAR_STATE, LossScaler
from model.parallel import ParallelModel


class TrainState(NamedTuple):
    """What training changes, and a checkpoint therefore holds."""

    model: ParallelModel
    optimizer: torch.optim.AdamW
    scaler: LossScaler


def folder_name(step: int) -> str:
    """500 -> step_00000500."""
    return f"step_{step:08d}"


def write_manifest(folder: Path) -> None:
    """Flushes every file of a checkpoint and writes the manifest that makes it one."""
    files = {}
    for path in sorted(folder.iterdir()):
        fsync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    atomic_write(folder / "manifest.json", json.dumps({"files": files}, indent=2) + "\n")


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoint folders, newest first."""
    return sorted(checkpoints.glob("step_*"), key=lambda p: p.name, reverse=True)


def find_damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in a few words; '' if every hash is right."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        for name, entry in files.items():
            path = folder / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}"
            if sha256(path) != entry["sha256"]:
                return f"{name} was altered (its sha256 differs)"
        return "" if "model.safetensors" in files else "model.safetensors is missing"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json can't be read: {error}"


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose hashes are right, and a line for each that was passed over.

    None where there is no checkpoint yet. Raises BadInput where there are some and none is whole.
    """
    complaints: list[str] = []
    for folder in list_checkpoints(checkpoints):
        problem = find_damage(folder)
        if not problem:
            return folder, complaints
        complaints.append(f"{folder} is damaged: {problem}")
    if complaints:
        raise BadInput(f"{'; '.join(complaints)}; no older one is left: start anew with --name")
    return None, []


def find(spec: str) -> Path:
    """The checkpoint folder that `spec` names: itself, or a run folder's newest valid one."""
    folder = Path(spec)
    if (folder / "checkpoints").is_dir():
        found, complaints = newest_valid(folder / "checkpoints")
        for complaint in complaints:
            print(f"warning: {complaint}; going back to {found}")
        if found is None:
            raise BadInput(f"the run {folder} has no checkpoint yet")
        return found
    if not any((folder / name).is_file() for name in ("manifest.json", "state.json")):
        raise BadInput(
            f"{spec} is no checkpoint: looked for {folder / 'manifest.json'} (a checkpoint) and "
            f"{folder / 'checkpoints'} (a run); write hf:{spec} for a Hugging Face folder"
        )
    problem = find_damage(folder)
    if problem:
        raise BadInput(f"{folder} is damaged: {problem}")
    return folder


def find_resume_checkpoint(resume: str, run: Path) -> Path | None:
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
        source, complaints = newest_valid(checkpoints)
        for complaint in complaints:
            print(f"warning: {complaint}; going back to {source}", flush=True)
        return source
    source = find(resume)
    if own and own[0].name > source.name:
        raise BadInput(f"{run} goes on to {own[0].name}, past {source}: choose another --name "
                       "for a run that branches off there")
    return source


def load_model(spec: str, ops: Operators = kernels.TORCH) -> GPT:
    """The model of a checkpoint, a run folder (its newest) or hf:DIR, in its master dtype.

    Raises BadInput for another vocabulary than GPT-2's; padding rows of others are left out.
    """
    if spec.startswith("hf:"):
        return without_padding(from_hf(spec.removeprefix("hf:"), ops), spec)
    folder = find(spec)
    model = GPT(model_config(folder), ops)
    load_weights(model, folder)
    return model


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
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"can't read {path}: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is no object of settings")
    return content


def copy_weights(model: GPT, spec: str) -> None:
    """Copies the weights that `spec` names into a model. Raises BadInput for another shape."""
    given = load_model(spec)
    if given.config != model.config:
        raise BadInput(f"{spec} is {given.config}, and the run asks for {model.config}")
    model.load_state_dict(given.state_dict())


def load_weights(model: GPT, folder: Path) -> None:
    """Copies a checkpoint's weights into a model of its shape, which takes on their dtype."""
    tensors = _read(folder / "model.safetensors")
    if any(t.dtype == torch.float64 for t in tensors.values()):
        model.double()
    load_named(model, tensors, folder / "model.safetensors")


@torch.no_grad()
def load_train_state(state: TrainState, folder: Path) -> dict[str, Any]:
    """Puts back what a checkpoint of any number of ranks, in any mode, holds.

    Returns its state.json.

    Each rank reads the rows that it holds. Raises BadInput for a converted checkpoint, which has
    weights only.
    """
    if not (folder / "optimizer.safetensors").exists() or not (folder / "state.json").exists():
        raise BadInput(f"{folder} has weights and no optimizer state: --init {folder} starts anew "
                       "from them")
    try:
        with (
            safe_open(folder / "model.safetensors", "pt") as weights,
            safe_open(folder / "optimizer.safetensors", "pt") as moments,
        ):
            for shard in state.model.shards:
                _read_rows(weights, shard.name, shard.local, shard.local_start)
                if len(shard.optim_param) == 0:
                    continue
                kept = state.optimizer.state[shard.optim_param]
                for key in ROW_STATE:
                    _read_rows(moments, f"{shard.name}.{key}", kept[key], shard.optim_start)
                for key in SCALAR_STATE:
                    kept[key].copy_(moments.get_tensor(f"{shard.name}.{key}"))
        saved = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"can't read {folder}: {error}") from None
    state.scaler.load_state_dict(saved["loss_scale"])
    torch.set_rng_state(_tensor_of(saved["rng_cpu"]))
    if torch.cuda.is_available() and saved["rng_cuda"]:
        torch.cuda.set_rng_state(_tensor_of(saved["rng_cuda"]))
    return saved


def _read_rows(file: safe_open, name: str, into: torch.Tensor, first: int) -> None:
    """Copies the stored rows from `first` on; what isn't stored, the padding, becomes zero."""
    stored = file.get_slice(name)
    rows = min(len(into), max(stored.get_shape()[0] - first, 0))
    into.zero_()
    if rows:
        into[:rows] = stored[first : first + rows].to(into.device)


def clean_up(checkpoints: Path) -> None:
    """Removes what an interrupted save or prune left behind. Only the run's owner may call this."""
    for left in [*checkpoints.glob(".step_*.tmp"), *checkpoints.glob(".step_*.old")]:
        shutil.rmtree(left, ignore_errors=True)


def remove(folder: Path) -> None:
    """Takes a checkpoint out of sight at once, then deletes it."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"can't read {path}: {error}") from None


def _tensor_of(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
