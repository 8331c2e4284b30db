"""GPT-2's tensors, by OpenAI's names, and whether a model or a file has these and no others.

Matrices are (out, in), as nn.Linear has them. Everything is checked by shape before a model of that
size is made, and a model that was changed is never written as GPT-2: its extra tensors would be
lost, and the rest would be another network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from launch.errors import BadInput
from launch.progress import track
from model.gpt2 import GPT, GPTConfig
from model.network import NoFirstWeights, has_vocabulary_rows

VOCAB = GPTConfig.n_vocab  # the tokenizer's
# 50,257 rounded up for the hardware, as the field does; a vocabulary of any other size has tokens
# of its own.
PADDED = {-(-VOCAB // multiple) * multiple for multiple in (64, 128, 256, 512, 1024)}
WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Value = TypeVar("Value")


def block_shapes(C: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one block, in llm.c's order."""
    return {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C),
        "mlp.c_proj.bias": (C,),
    }


def gpt2_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of GPT-2, without padding rows of the vocabulary."""
    C = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.n_vocab, C),
        "wpe.weight": (config.n_ctx, C),
        "ln_f.weight": (C,),
        "ln_f.bias": (C,),
    }
    for layer in range(config.n_layer):
        for name, shape in block_shapes(C).items():
            shapes[f"h.{layer}.{name}"] = shape
    return shapes


def named_weights(model: GPT) -> dict[str, Tensor]:
    """OpenAI's names -> weights, without the padding rows of the vocabulary."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    rows = model.config.n_vocab
    return {name: w[:rows] if has_vocabulary_rows(name) else w for name, w in weights.items()}


def require_gpt2(model: GPT, kind: str) -> None:
    """Raises BadInput for a model that has other tensors than GPT-2."""
    if model.config.arch != "gpt2":
        raise BadInput(f"a model with --model.arch {model.config.arch} can't be written as {kind}: "
                       "nothing that reads that format knows its network; --to ours can")
    shapes = {name: weight.shape for name, weight in named_weights(model).items()}
    problem = _difference(shapes, gpt2_shapes(model.config))
    if problem:
        raise BadInput(f"this model is no GPT-2 and can't be written as {kind}: {problem}. What "
                       "reads that format would compute another network")


def check_shapes(
    shapes: Mapping[str, Sequence[int]], config: GPTConfig, source: Path | str
) -> None:
    """Raises BadInput where a file's tensors are not those that its own description asks for.

    shapes: by OpenAI's names. Costs nothing like the model's memory, whatever the file says.
    """
    layers = sum(name.endswith(".ln_1.weight") for name in shapes)
    if layers != config.n_layer:  # first: a description may ask for a billion layers
        problem = f"{config.n_layer} layers there, {layers} among the weights"
    else:
        problem = _difference(shapes, gpt2_shapes(config))
    if problem:
        raise BadInput(f"{source} is no GPT-2 of its own description: {problem}")


def check_fits(
    model: GPT, shapes: Mapping[str, Sequence[int]], source: Path | str
) -> None:
    """Raises BadInput where a file's tensors aren't the model's. It needs no numbers of its own."""
    problem = _difference(shapes, _shapes_of(named_weights(model)))
    if problem:
        raise BadInput(f"{source} is no GPT-2 of {model.config.n_layer} layers: {problem}")


@torch.no_grad()
def load_named(
    model: GPT, tensors: Mapping[str, Tensor], source: Path | str,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Copies weights in by OpenAI's names. Raises BadInput where a name or shape is not right.

    shapes: of the tensors, where asking them for theirs would read them from a file.
    """
    check_fits(model, shapes or _shapes_of(tensors), source)
    own = named_weights(model)
    for name in track(own, f"loading {source}", "tensor"):
        given = tensors[name]
        if given.dtype not in WEIGHT_DTYPES or given.layout != torch.strided:
            raise BadInput(f"{source} holds {name} as {given.dtype}, {given.layout}: GPT-2's "
                           "weights are dense numbers of 16, 32 or 64 bits with a point")
        own[name].copy_(given)


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
    with NoFirstWeights():
        cut = GPT(replace(model.config, n_vocab=VOCAB), model.ops).to(model.wte.weight.dtype)
    weights = named_weights(model)
    weights["wte.weight"] = weights["wte.weight"][:VOCAB]
    load_named(cut, weights, spec)
    return cut


def our_names(entries: Mapping[str, Value]) -> dict[str, Value]:
    """What Hugging Face or nanoGPT name, under OpenAI's names and without what is no weight.

    No weights are the causal masks and the tied head. A head whose embedding isn't there is the
    embedding: safetensors' save_model keeps one of two names for the same memory. Raises BadInput
    where two entries have one name.
    """
    ours = {}
    for name, value in entries.items():
        name = name.removeprefix("transformer.")
        mask = name.endswith((".attn.bias", ".attn.masked_bias"))
        if name in ours:
            raise BadInput(f"two tensors are {name}, with `transformer.` before it and without")
        if not mask and name != "lm_head.weight":
            ours[name] = value
    if "wte.weight" not in ours and "lm_head.weight" in entries:
        ours["wte.weight"] = entries["lm_head.weight"]
    return ours


def check_tied_head(tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Raises BadInput where the output head isn't the embedding."""
    head = tensors.get("lm_head.weight")
    embedding = our_names(tensors).get("wte.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise BadInput(f"{source} has a head of its own; GPT-2's head is its embedding")


def _shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _difference(
    shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]
) -> str:
    """The first thing that is not as expected, in a few words; '' where nothing is."""
    for name in sorted(expected.keys() - shapes.keys()):
        return f"it lacks {name}"
    for name in sorted(shapes.keys() - expected.keys()):
        return f"it has an unknown tensor {name}"
    for name, shape in expected.items():
        if tuple(shapes[name]) != tuple(shape):
            return f"{name} has shape {tuple(shapes[name])}, expected {tuple(shape)}"
    return ""
