"""What training changes, and where a checkpoint holds it: to save it, and to put it back.

    layouts(state)                         both .safetensors files, the same on every rank
    pieces_to_save(state, files, ...)      what one rank writes of them
    small_state(state)                     the rest, for state.json
    load_train_state(state, folder)        all of it back, on any number of ranks, in any mode

model.safetensors holds each parameter under its name, optimizer.safetensors its moments and step
as NAME.exp_avg and the like. A tensor is stored whole, whatever rows of it a rank has.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.errors import BadInput
from launch.progress import track
from model.adamw import AdamW
from model.manifest import TRAINING
from model.network import has_vocabulary_rows
from model.optim import SCALAR_STATE, LossScaler, MuonAdamW, row_state
from model.parallel import ParallelModel, ParamShard
from model.safetensors_layout import Layout, TensorFile

WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"


class TrainState(NamedTuple):
    """What training changes, and a checkpoint therefore holds."""

    model: ParallelModel
    optimizer: AdamW | MuonAdamW
    scaler: LossScaler


@dataclass
class Piece:
    """Rows to write: their values, and where they belong."""

    file: str
    name: str  # of the tensor
    offset: int
    values: Tensor


def stored_shape(state: TrainState, shard: ParamShard) -> tuple[int, ...]:
    """The shape in which a parameter is stored: without the vocabulary's padding rows."""
    rows = len(shard.param)
    if has_vocabulary_rows(shard.name):
        rows = min(rows, state.model.module.config.n_vocab)
    return (rows, *shard.param.shape[1:])


# ---- saving ----


def layouts(state: TrainState) -> dict[str, Layout]:
    """Both files' layouts, the same on every rank."""
    weights: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    optimizer: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for shard in state.model.shards:
        p = shard.param
        shape = stored_shape(state, shard)
        weights[shard.name] = (p.dtype, shape)
        for key in row_state(state.optimizer, shard):
            optimizer[f"{shard.name}.{key}"] = (p.dtype, shape)
        for key in SCALAR_STATE:
            optimizer[f"{shard.name}.{key}"] = (torch.float32, ())
    return {WEIGHTS: Layout.of(weights), MOMENTS: Layout.of(optimizer)}


def pieces_to_save(state: TrainState, files: dict[str, Layout], with_steps: bool) -> list[Piece]:
    """What this rank writes: its rows of weights and moments, and on one rank (with_steps, rank 0)
    AdamW's step of every parameter. The values are those that training goes on to change.

    files: what layouts(state) gives.
    """
    pieces = []

    def add(file: str, name: str, row: int, values: Tensor) -> None:
        offset = files[file].offsets[name] + row * values[:1].nbytes
        pieces.append(Piece(file, name, offset, values))

    for shard in state.model.shards:
        first = shard.save_rows.start
        end = min(shard.save_rows.stop, stored_shape(state, shard)[0])
        kept = state.optimizer.state.get(shard.optim_param, {})
        if first < end:
            weights = shard.local[first - shard.local_start : end - shard.local_start]
            add(WEIGHTS, shard.name, first, weights)
            for key in row_state(state.optimizer, shard):
                values = kept[key][first - shard.optim_start : end - shard.optim_start]
                add(MOMENTS, f"{shard.name}.{key}", first, values)
        if with_steps:  # rank 0 always has rows, of every parameter
            for key in SCALAR_STATE:
                add(MOMENTS, f"{shard.name}.{key}", 0, kept[key].reshape(1))
    return pieces


def find_not_finite(pieces: list[Piece]) -> str:
    """Names a weight with an infinity or a NaN: such a checkpoint is worth less than none, for it
    would push out a good one. Moments may overflow and recover."""
    for piece in pieces:
        if piece.file == WEIGHTS:
            smallest, largest = torch.aminmax(piece.values)  # each NaN where there is one
            if not (smallest.isfinite() and largest.isfinite()):
                return f"{piece.name} holds values that are no numbers (infinite or NaN)"
    return ""


def small_state(state: TrainState) -> dict[str, Any]:
    """What state.json holds of it: the loss scale and the random states."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "loss_scale": state.scaler.state_dict(),
        "rng_cpu": _text_of(torch.get_rng_state()),
        "rng_cuda": _text_of(cuda),
    }


def _text_of(state: Tensor | None) -> str | None:
    return None if state is None else base64.b64encode(state.numpy().tobytes()).decode()


# ---- loading ----


@torch.no_grad()
def load_train_state(state: TrainState, folder: Path) -> dict[str, Any]:
    """Puts back what a checkpoint of any number of ranks, in any mode, holds; returns its state.

    Each rank reads the rows that it holds. Raises BadInput for a converted checkpoint, which has
    weights only.
    """
    if not all((folder / name).exists() for name in TRAINING):
        raise BadInput(f"{folder} has weights and no optimizer state: --init {folder} starts anew "
                       "from them")
    try:
        with (
            TensorFile(folder / WEIGHTS) as weights,
            TensorFile(folder / MOMENTS) as moments,
        ):
            for shard in track(state.model.shards, f"loading {folder}", "tensor"):
                shape = stored_shape(state, shard)
                _read_rows(weights, shard.name, shape, shard.local, shard.local_start)
                if len(shard.optim_param) == 0:
                    continue
                kept = state.optimizer.state[shard.optim_param]
                for key in row_state(state.optimizer, shard):
                    name = f"{shard.name}.{key}"
                    _read_rows(moments, name, shape, kept[key], shard.optim_start)
                for key in SCALAR_STATE:
                    kept[key].copy_(moments[f"{shard.name}.{key}"])
        saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        state.scaler.load_state_dict(saved["loss_scale"])
        _set_random_states(saved)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"can't read {folder}: {error}") from None
    except KeyError as error:
        raise BadInput(f"can't read {folder}: there is no {error}") from None
    return saved


def _read_rows(
    file: TensorFile, name: str, shape: tuple[int, ...], into: Tensor, first: int
) -> None:
    """Copies the stored rows from `first` on; what isn't stored, the padding, becomes zero."""
    if file.shape(name) != shape:
        raise ValueError(f"{name} has shape {file.shape(name)}, expected {shape}")
    end = min(first + len(into), shape[0])
    into.zero_()
    if first < end:
        into[: end - first] = file.rows(name, first, end).to(into.device)


def _set_random_states(saved: dict[str, Any]) -> None:
    try:
        torch.set_rng_state(_tensor_of(saved["rng_cpu"]))
        if torch.cuda.is_available() and saved["rng_cuda"]:
            torch.cuda.set_rng_state(_tensor_of(saved["rng_cuda"]))
    except RuntimeError as error:  # a state of another size
        raise ValueError(str(error)) from None


def _tensor_of(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
