"""GPT-2 out of a checkpoint of nanoGPT or build-nanogpt (.pt), which is a pickle.

    model = from_nanogpt(Path("out/ckpt.pt"))          # nanoGPT
    model = from_nanogpt(Path("log/model_19072.pt"))   # build-nanogpt

Nothing in the pickle is run (see pickles.py). nanoGPT's files need nothing but tensors, numbers and
dicts. build-nanogpt's hold the object of one class, `__main__.GPTConfig`; for that name, and no
other, an empty class stands in here, which takes the fields and has no code.

nanoGPT computes the exact GELU (nn.GELU(), since its pull request 274 of 14 June 2023), also when
it goes on from OpenAI's weights; build-nanogpt computes GPT-2's tanh. The model keeps which.

Both store matrices as nn.Linear does, (out, in), like model/gpt2.py: nothing is transposed.
"""

from pathlib import Path
from typing import Literal

import torch

from launch.errors import BadInput
from model.formats.pickles import load_pickle, weights_in
from model.formats.tensors import (
    check_shapes,
    check_tied_head,
    gpt2_shapes,
    load_named,
    our_names,
)
from model.gpt2 import GPT, GPTConfig
from model.network import NoFirstWeights

PREFIXES = ("_orig_mod.", "module.")  # torch.compile's and DDP's, in either order


class Fields:
    """What stands in for build-nanogpt's GPTConfig."""


def from_nanogpt(path: Path) -> GPT:
    """The model in a checkpoint, in fp32.

    Padding rows of the vocabulary stay: n_vocab is what the checkpoint says. Raises BadInput for a
    pickle that needs code, or that holds no GPT-2.
    """
    content = load_pickle(path, {"__main__.GPTConfig": Fields})
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds a {type(content).__name__}, and no checkpoint's dict")
    config = _config(content, path)
    weights = weights_in(content.get("model"), path, "under 'model'")
    weights = {_plain(name): weight for name, weight in weights.items()}
    check_tied_head(weights, path)

    tensors = our_names(weights)
    if not any(name.endswith("bias") for name in tensors):  # nanoGPT's bias=False
        tensors |= _zero_biases(config, tensors)
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, config, path)
    with NoFirstWeights():
        model = GPT(config)
    load_named(model, tensors, path)
    return model


def _zero_biases(config: GPTConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A bias of zeros beside each weight that GPT-2 has one for; views of one number."""
    layers = sum(name.endswith(".ln_1.weight") for name in tensors)
    if layers != config.n_layer:
        return {}  # check_shapes says so, and a description may ask for a billion
    shapes = gpt2_shapes(config)
    zero = torch.zeros(1)
    return {name: zero.expand(s) for name, s in shapes.items() if name.endswith("bias")}


def _config(content: dict, path: Path) -> GPTConfig:
    """The shape, out of nanoGPT's `model_args` or build-nanogpt's `config`."""
    gelu: Literal["tanh", "exact"]
    if "model_args" in content:
        settings, gelu = content["model_args"], "exact"
    else:
        settings, gelu = content.get("config"), "tanh"
    if isinstance(settings, Fields):
        settings = vars(settings)
    if not isinstance(settings, dict):
        raise BadInput(f"{path} has neither nanoGPT's 'model_args' nor build-nanogpt's 'config': "
                       "the number of heads can't be read off the weights")
    try:
        return GPTConfig(
            n_layer=int(settings["n_layer"]),
            n_head=int(settings["n_head"]),
            n_embd=int(settings["n_embd"]),
            n_ctx=int(settings["block_size"]),
            n_vocab=int(settings["vocab_size"]),
            gelu=gelu,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadInput(f"{path} has no GPT-2 shape: {error!r}") from None


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name
