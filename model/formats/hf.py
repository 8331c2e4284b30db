"""GPT-2 to and from a Hugging Face folder (config.json and safetensors).

    model = from_hf("gpt2")          # a folder, or a name on the Hub (HF_ENDPOINT is honoured)
    model = from_hf("gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e")     # this commit of it
    to_hf(model, Path("exported"))   # transformers.GPT2LMHeadModel.from_pretrained("exported")

OpenAI wrote these layers as Conv1D, (in, out); nn.Linear is (out, in), so four matrices a block
are transposed on the way.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels import operators
from kernels.operators import Operators
from launch.errors import BadInput
from launch.files import atomic_write, refuse_lfs_pointer
from launch.progress import track
from model.formats.hub import PICKLE, SAFETENSORS, SHARDS, locate, only_a_pickle
from model.formats.pickles import load_pickle, weights_in
from model.formats.tensors import (
    check_shapes,
    check_tied_head,
    load_named,
    named_weights,
    our_names,
    require_gpt2,
)
from model.gpt2 import GPT, GPTConfig
from model.network import NoFirstWeights
from model.safetensors_layout import save_tensors

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What model/gpt2.py computes; a folder that wants anything else is another network. A key that a
# config.json leaves out has this value in transformers too.
FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# transformers' names (activations.py) -> ours. The first of each kind is what to_hf writes.
GELU = {
    "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu_accurate": "tanh",
    "gelu": "exact", "gelu_python": "exact",
}


def from_hf(source: str, ops: Operators = operators.TORCH, allow_pickle: bool = False) -> GPT:
    """The model in a folder, or on the Hub under this name, in fp32.

    allow_pickle: read pytorch_model.bin where there is nothing else (without running its code).
    Raises BadInput where it is no GPT-2, Failed where the Hub can't be reached.
    """
    folder, _commit = locate(source, allow_pickle)
    config = read_config(folder)
    if _files(folder, SAFETENSORS):
        tensors = _read_safetensors(folder, config)
    elif allow_pickle and _files(folder, PICKLE):
        tensors = _read_pickles(folder, config)
    elif _files(folder, PICKLE):
        raise only_a_pickle(source)
    else:
        raise BadInput(_no_weights(folder))
    check_tied_head(tensors, folder)

    weights = our_names(tensors)
    for name, weight in weights.items():
        if name.endswith(CONV1D):
            weights[name] = weight.t()
    with NoFirstWeights():
        model = GPT(config, ops)
    load_named(model, weights, folder)
    return model


def to_hf(
    model: GPT, folder: Path, source: str = "", dtype: torch.dtype = torch.float32
) -> None:
    """Writes config.json and model.safetensors that GPT2LMHeadModel loads as they stand.

    source: where the weights came from, kept in the header of model.safetensors. dtype: fp32, which
    keeps every bit, or bf16, rounded to the nearest. Raises BadInput for a model that is no GPT-2.
    """
    require_gpt2(model, "a Hugging Face folder")
    config = model.config
    tensors = {}
    for name, parameter in named_weights(model).items():
        weight = parameter.cpu().to(dtype)
        if name.endswith(CONV1D):
            weight = weight.t()
        # A copy, in the order of its own dimensions, that shares no memory with the model.
        tensors[f"transformer.{name}"] = weight.clone(memory_format=torch.contiguous_format)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}
    if source:
        metadata["source"] = source
    save_tensors(tensors, folder / SAFETENSORS, metadata)
    content = {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
        "activation_function": "gelu" if config.gelu == "exact" else "gelu_new",
        "n_inner": None,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.n_ctx,
        "n_ctx": config.n_ctx,
        "vocab_size": config.n_vocab,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": config.n_vocab - 1,
        "eos_token_id": config.n_vocab - 1,
        "dtype": str(dtype).removeprefix("torch."),
    }
    atomic_write(folder / "config.json", json.dumps(content, indent=2) + "\n")


def read_config(folder: Path) -> GPTConfig:
    """The shape in a folder's config.json. Raises BadInput where it is no GPT-2."""
    content = _read_json(folder / "config.json", f"{folder} is no Hugging Face folder")
    for key, value in FIXED.items():
        if content.get(key, value) != value:
            raise BadInput(f"{folder} is another network than GPT-2: {key} is {content[key]!r}, "
                           f"and {value!r} is what is computed here")
    activation = content.get("activation_function", "gelu_new")
    if activation not in list(GELU):  # it may be anything that JSON has
        raise BadInput(f"{folder} is another network than GPT-2: activation_function is "
                       f"{activation!r}, and {', '.join(GELU)} are computed here")
    try:
        config = GPTConfig(
            n_layer=content["n_layer"],
            n_head=content["n_head"],
            n_embd=content["n_embd"],
            n_ctx=content.get("n_positions") or content.get("n_ctx") or 1024,
            n_vocab=content["vocab_size"],
            gelu=GELU[activation],  # type: ignore[arg-type]
        )
    except (KeyError, ValueError, TypeError) as error:
        raise BadInput(f"{folder / 'config.json'} has no GPT-2 shape: {error}") from None
    inner = content.get("n_inner")
    if inner not in (None, 4 * config.n_embd):
        raise BadInput(f"{folder} is another network than GPT-2: n_inner is {inner!r}, and "
                       f"4 n_embd = {4 * config.n_embd} is what is computed here")
    return config


# ---- the files of a folder ----


def _files(folder: Path, name: str) -> list[Path]:
    """The file of this name, or the shards that its index lists; [] where there is neither."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return []
    shards = _read_json(index, f"can't read {index}").get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise BadInput(f"{index} has no weight_map: which shards hold the weights?")
    paths = []
    for shard in sorted(set(map(str, shards.values()))):
        if Path(shard).name != shard:
            raise BadInput(f"{index} names {shard!r}: shards lie in the index's own folder")
        if not (folder / shard).is_file():
            raise BadInput(f"{index} names {shard}, which isn't there: fetch it too")
        paths.append(folder / shard)
    return paths


def _no_weights(folder: Path) -> str:
    for shard in sorted(folder.glob(SHARDS[SAFETENSORS])):
        return (f"{folder} holds {shard.name} and no {SAFETENSORS}.index.json, which says what all "
                "the shards are: fetch it too")
    return f"{folder} holds no {SAFETENSORS}"


def _read_safetensors(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    """The tensors of a folder, under its own names, once their headers say GPT-2."""
    shapes: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    paths = _files(folder, SAFETENSORS)
    for path in paths:
        refuse_lfs_pointer(path)
    try:
        for path in paths:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    shapes[name] = file.get_slice(name).get_shape()
        _check_conv1d_shapes(shapes, config, folder)
        for path in paths:
            with safe_open(path, "pt") as file:
                for name in track(file.keys(), f"reading {path.name}", "tensor"):
                    tensors[name] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"can't read {path}: {error}") from None
    return tensors


def _read_pickles(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    """The same out of pytorch_model.bin, whose tensors have to be read to know their shapes."""
    tensors: dict[str, Tensor] = {}
    for path in _files(folder, PICKLE):
        refuse_lfs_pointer(path)
        tensors |= weights_in(load_pickle(path), path, "by name")
    _check_conv1d_shapes({name: w.shape for name, w in tensors.items()}, config, folder)
    return tensors


def _check_conv1d_shapes(shapes: Mapping[str, Any], config: GPTConfig, folder: Path) -> None:
    """Raises BadInput where the folder's tensors aren't those that its config.json asks for."""
    ours = our_names(shapes)
    for name, shape in ours.items():
        if name.endswith(CONV1D):
            ours[name] = tuple(reversed(shape))  # (in, out) -> (out, in)
    check_shapes(ours, config, folder)


def _read_json(path: Path, problem: str) -> dict[str, Any]:
    """A JSON object, with a byte order mark or without."""
    if path.exists() and not path.is_file():  # reading a pipe or a device may never end
        raise BadInput(f"{problem}: {path.name} is no plain file")
    try:
        refuse_lfs_pointer(path)
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{problem}: {path.name}: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{problem}: {path.name} is no object of settings")
    return content
