"""GPT-2 out of a checkpoint of nanoGPT or build-nanogpt (.pt), which is a pickle.

    model = from_nanogpt(Path("out/ckpt.pt"))          # nanoGPT
    model = from_nanogpt(Path("log/model_19072.pt"))   # build-nanogpt

A pickle is a program. torch.load(weights_only=True) runs none of it: it builds tensors, numbers,
strings, lists and dicts, and stops at the name of anything else. nanoGPT's files need nothing else.
build-nanogpt's hold the object of one class, `__main__.GPTConfig`; for that name, and no other, an
empty class stands in here, which takes the fields and has no code.

Both store matrices as nn.Linear does, (out, in), like model/gpt2.py: nothing is transposed.
"""

from pathlib import Path
from typing import Any

import torch

from launch.errors import BadInput
from model.gpt2 import GPT, GPTConfig
from model.hf import load_named, our_name

PREFIXES = ("_orig_mod.", "module.")  # torch.compile's and DDP's, in either order


class Fields:
    """What stands in for build-nanogpt's GPTConfig."""


def is_pickle(path: Path) -> bool:
    """Whether a file begins like one that torch.save has written (a zip; before 1.6 a pickle)."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def from_nanogpt(path: Path) -> GPT:
    """The model in a checkpoint, in fp32.

    Padding rows of the vocabulary stay: n_vocab is what the checkpoint says. Raises BadInput for a
    pickle that needs code, or that holds no GPT-2.
    """
    content = _load(path)
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds a {type(content).__name__}, and no checkpoint's dict")
    config = _config(content, path)
    weights = content.get("model")
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()
    ):
        raise BadInput(f"{path} has no dict of weights under 'model'")
    weights = {_plain(name): weight for name, weight in weights.items()}
    head, wte = weights.get("lm_head.weight"), weights.get("transformer.wte.weight")
    if head is not None and wte is not None and not torch.equal(head, wte):
        raise BadInput(f"{path} has a head of its own; GPT-2's head is its embedding")
    tensors = {our_name(k): v for k, v in weights.items() if our_name(k)}
    layers = sum(name.endswith(".ln_1.weight") for name in tensors)
    shape = tuple(wte.shape) if wte is not None else None
    if shape != (config.n_vocab, config.n_embd) or layers != config.n_layer:
        raise BadInput(f"{path} is no GPT-2 of its own description: {config.n_layer} layers and an "
                       f"embedding {(config.n_vocab, config.n_embd)} there, {layers} and {shape} "
                       "among the weights")  # told before a model of that size is made
    model = GPT(config)
    if not any(name.endswith("bias") for name in tensors):  # nanoGPT's bias=False
        tensors |= {n: torch.zeros_like(p) for n, p in model.named_parameters()
                    if n.endswith("bias")}
    load_named(model, tensors, path)
    return model


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([(Fields, "__main__.GPTConfig")]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that was tampered with may raise anything
        code = _code_needed(path)
        if code:
            raise BadInput(f"{path} needs code to load ({code}), and whoever wrote the file chose "
                           "that code: refused. Save a dict of tensors and numbers instead, "
                           "{'model': model.state_dict(), 'model_args': {...}}") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"can't read {path} as a checkpoint of nanoGPT: {reason}") from None


def _code_needed(path: Path) -> str:
    """The names that a pickle would import and that were not allowed; '' if it can't be told."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a file that torch.save writes, or not a whole one
        return ""
    return ", ".join(sorted(set(names) - {"__main__.GPTConfig"}))


def _config(content: dict, path: Path) -> GPTConfig:
    """The shape, out of nanoGPT's `model_args` or build-nanogpt's `config`."""
    settings = content.get("model_args", content.get("config"))
    if isinstance(settings, Fields):
        settings = vars(settings)
    if not isinstance(settings, dict):
        raise BadInput(f"{path} has neither nanoGPT's 'model_args' nor build-nanogpt's 'config': "
                       "the number of heads can't be read off the weights")
    try:
        return GPTConfig(*(int(settings[key]) for key in (
            "n_layer", "n_head", "n_embd", "block_size", "vocab_size")))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} has no GPT-2 shape: {error!r}") from None


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name
