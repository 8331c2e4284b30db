"""GPT-2 to and from a Hugging Face folder (config.json and model.safetensors).

    model = from_hf("gpt2")          # a folder, or a name on the Hub (HF_ENDPOINT is honoured)
    to_hf(model, Path("exported"))   # transformers.GPT2LMHeadModel.from_pretrained("exported")

OpenAI wrote these layers as Conv1D, (in, out); nn.Linear is (out, in), so four matrices a block
are transposed on the way.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import kernels
from kernels import Operators
from launch.errors import BadInput, Failed
from launch.files import atomic_write
from model.gpt2 import GPT, GPTConfig

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
FILES = ("config.json", "model.safetensors")
VOCAB = GPTConfig.n_vocab  # the tokenizer's
# 50,257 rounded up for the hardware, as the field does; a vocabulary of any other size has tokens
# of its own.
PADDED = {-(-VOCAB // multiple) * multiple for multiple in (64, 128, 256, 512, 1024)}
# What model/gpt2.py computes; a folder that wants anything else is another network. A key that a
# config.json leaves out has this value in transformers too.
FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "n_inner": None,
}


def from_hf(source: str, ops: Operators = kernels.TORCH) -> GPT:
    """The model in a folder, or on the Hub under this name, in fp32.

    Raises BadInput where it is no GPT-2, Failed where the Hub can't be reached.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _fetch(source)
    config = read_config(folder)
    path = folder / "model.safetensors"
    if not path.exists():
        raise BadInput(f"{folder} holds no model.safetensors (pickled weights are not loaded)")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"can't read {path}: {error}") from None
    model = GPT(config, ops)
    weights = {our_name(k): v for k, v in tensors.items() if our_name(k)}
    for name, weight in weights.items():
        if name.endswith(CONV1D):
            weights[name] = weight.t()
    load_named(model, weights, path)
    return model


def to_hf(model: GPT, folder: Path) -> None:
    """Writes config.json and model.safetensors (fp32) that GPT2LMHeadModel loads as they stand."""
    config = model.config
    tensors = {}
    for name, parameter in named_weights(model).items():
        weight = parameter.detach().float().cpu()
        tensors[f"transformer.{name}"] = (weight.t() if name.endswith(CONV1D) else weight).clone(
            memory_format=torch.contiguous_format
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
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
        "dtype": "float32",
    }
    atomic_write(folder / "config.json", json.dumps(content, indent=2) + "\n")


def without_padding(model: GPT, spec: str) -> GPT:
    """The model without vocabulary rows past GPT-2's 50,257.

    Weights from elsewhere hold rows there that no text has trained, and that could be sampled.
    Raises BadInput for a vocabulary of another size.
    """
    if model.config.n_vocab == VOCAB:
        return model
    if model.config.n_vocab not in PADDED:
        raise BadInput(f"{spec} has a vocabulary of {model.config.n_vocab:,}; GPT-2's is {VOCAB:,} "
                       f"(or padded: {', '.join(f'{size:,}' for size in sorted(PADDED))})")
    cut = GPT(replace(model.config, n_vocab=VOCAB), model.ops).to(model.wte.weight.dtype)
    weights = named_weights(model)
    weights["wte.weight"] = weights["wte.weight"][:VOCAB]
    load_named(cut, weights, Path(spec))
    return cut


def read_config(folder: Path) -> GPTConfig:
    """The shape in a folder's config.json. Raises BadInput where it is no GPT-2."""
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} is no Hugging Face folder: config.json: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{folder / 'config.json'} is no object of settings")
    for key, value in FIXED.items():
        if content.get(key, value) != value:
            raise BadInput(f"{folder} is another network than GPT-2: {key} is {content[key]!r}, "
                           f"and {value!r} is what is computed here")
    try:
        return GPTConfig(
            n_layer=content["n_layer"],
            n_head=content["n_head"],
            n_embd=content["n_embd"],
            n_ctx=content.get("n_positions") or content.get("n_ctx") or 1024,
            n_vocab=content["vocab_size"],
        )
    except (KeyError, ValueError, TypeError) as error:
        raise BadInput(f"{folder / 'config.json'} has no GPT-2 shape: {error}") from None


def named_weights(model: GPT) -> dict[str, torch.Tensor]:
    """OpenAI's names -> weights, without the padding rows of the embedding."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    weights["wte.weight"] = weights["wte.weight"][: model.config.n_vocab]
    return weights


@torch.no_grad()
def load_named(model: GPT, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """Copies weights in by OpenAI's names. Raises BadInput where a name or shape is not right."""
    own = named_weights(model)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        problem = f"lacks {missing[0]}" if missing else f"has an unknown tensor {extra[0]}"
        raise BadInput(f"{source} is no GPT-2 of {model.config.n_layer} layers: it {problem}")
    for name, weight in own.items():
        given = tensors[name]  # which may read it from a file
        if weight.shape != given.shape:
            raise BadInput(f"{source}: {name} has shape {tuple(given.shape)}, "
                           f"expected {tuple(weight.shape)}")
        weight.copy_(given)


def our_name(name: str) -> str:
    """Hugging Face's name without its prefix; '' for what is no weight (masks, the tied head)."""
    name = name.removeprefix("transformer.")
    no_weight = name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight"
    return "" if no_weight else name


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HFValidationError, RepositoryNotFoundError):
        raise BadInput(f"{name!r} is neither a folder here nor a model on the Hub") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise Failed(f"could not fetch {name!r} from the Hub: {type(error).__name__}") from None
