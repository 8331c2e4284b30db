"""GPT-2 to and from llm.c's model file.

    model = from_llmc(Path("gpt2_124M.bin"))
    to_llmc(model, Path("model.bin"), "bf16")

256 little-endian int32: magic, version (3: fp32, 5: bf16), context, vocabulary, layers, heads,
width, padded vocabulary, zeros. Then the parameters as order() has them, one kind after the other,
each for all layers, matrices as (out, in) (llm.c: write_model in train_gpt2.py,
gpt2_write_to_checkpoint in train_gpt2.cu).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from launch.errors import BadInput
from launch.progress import track
from model.formats.tensors import block_shapes, gpt2_shapes, load_named, require_gpt2
from model.gpt2 import GPT, GPTConfig
from model.network import NoFirstWeights

MAGIC = 20240326
VERSIONS = {3: torch.float32, 5: torch.bfloat16}
HEADER = 256  # int32
OTHER_MAGICS = {
    20240327: "llm.c's debug state",
    20240328: "llm.c's tokenizer",
    20240520: "a shard of tokens",
    20240522: "a file of evaluation questions",
    20240801: "a shard of Llama 3 tokens",
    20240803: "a Llama 3 model",
}

Precision = Literal["fp32", "bf16"]


def order(n_layer: int) -> Iterator[str]:
    """The parameters' names as the file has them."""
    yield from ("wte.weight", "wpe.weight")
    for name in block_shapes(1):
        for layer in range(n_layer):
            yield f"h.{layer}.{name}"
    yield from ("ln_f.weight", "ln_f.bias")


def parameters_in_file(config: GPTConfig, padded_vocab: int) -> int:
    """Numbers after the header, padding rows of the vocabulary counted."""
    C = config.n_embd
    embeddings = (padded_vocab + config.n_ctx) * C
    block = sum(math.prod(shape) for shape in block_shapes(C).values())
    ln_f = 2 * C
    return embeddings + config.n_layer * block + ln_f


def from_llmc(path: Path) -> GPT:
    """The model in a file, in fp32. Raises BadInput where the file is another one, or cut."""
    config, padded, dtype = _read_header(path)
    expected = 4 * HEADER + dtype.itemsize * parameters_in_file(config, padded)
    if path.stat().st_size != expected:  # before anything of that size is allocated
        raise BadInput(f"{path} has {path.stat().st_size:,} bytes and its header asks for "
                       f"{expected:,}: it was cut, or isn't llm.c's")
    shapes = gpt2_shapes(config)
    shapes["wte.weight"] = (padded, config.n_embd)  # (Vp, C)
    integers = np.memmap(path, f"<i{dtype.itemsize}", "r", offset=4 * HEADER)
    tensors: dict[str, torch.Tensor] = {}
    start = 0
    for name in track([*order(config.n_layer)], f"reading {path.name}", "tensor"):
        end = start + math.prod(shapes[name])
        values = torch.from_numpy(integers[start:end].copy())
        tensors[name] = values.view(dtype).view(shapes[name])
        start = end
    tensors["wte.weight"] = tensors["wte.weight"][: config.n_vocab]
    with NoFirstWeights():
        model = GPT(config)
    load_named(model, tensors, path)
    return model


def to_llmc(model: GPT, path: Path, precision: Precision) -> None:
    """Writes a file that llm.c trains on from: train_gpt2cu -e FILE.

    Raises BadInput for a model that llm.c would compute otherwise.
    """
    require_gpt2(model, "a file of llm.c's")
    config, dtype = model.config, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if config.gelu == "exact":
        raise BadInput("llm.c computes the tanh GELU, and this model was trained with the exact "
                       "one, nanoGPT's: it would be another function there. --to hf keeps it")
    header = np.zeros(HEADER, "<i4")
    header[:8] = (
        MAGIC, 3 if precision == "fp32" else 5, config.n_ctx, config.n_vocab, config.n_layer,
        config.n_head, config.n_embd, config.padded_vocab,
    )
    weights = dict(model.named_parameters())  # padding rows and all: they are zero
    with path.open("wb") as file:
        file.write(header.tobytes())
        for name in track([*order(config.n_layer)], f"writing {path.name}", "tensor"):
            values = weights[name].detach().to("cpu", dtype).contiguous()
            integers = values.view(torch.int16 if precision == "bf16" else torch.int32)
            file.write(integers.numpy().astype(f"<i{dtype.itemsize}", copy=False).tobytes())


def _read_header(path: Path) -> tuple[GPTConfig, int, torch.dtype]:
    """Shape, padded vocabulary and number format."""
    header = np.fromfile(path, "<i4", HEADER)
    magic = int(header[0]) if len(header) else 0
    if magic != MAGIC:
        what = OTHER_MAGICS.get(magic, "neither a .pt nor a file of llm.c's")
        raise BadInput(f"{path} is {what}: a model of llm.c's begins with the int32 {MAGIC}")
    if len(header) < HEADER:
        raise BadInput(f"{path} ends within its header of {4 * HEADER:,} bytes: it was cut")
    version, n_ctx, n_vocab, n_layer, n_head, n_embd, padded = (int(n) for n in header[1:8])
    if version not in VERSIONS:
        raise BadInput(f"{path} is of llm.c's version {version}; 3 (fp32) and 5 (bf16) are read: "
                       "write it anew with today's llm.c")
    try:
        config = GPTConfig(n_layer, n_head, n_embd, n_ctx, n_vocab)
    except ValueError as error:
        raise BadInput(f"{path} has no GPT-2 shape in its header: {error}") from None
    if padded < n_vocab:
        raise BadInput(f"{path}: a vocabulary of {n_vocab:,} in {padded:,} padded rows")
    return config, padded, VERSIONS[version]

