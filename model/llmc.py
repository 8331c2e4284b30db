"""GPT-2 to and from llm.c's model file.

    model = from_llmc(Path("gpt2_124M.bin"))
    to_llmc(model, Path("model.bin"), "bf16")

256 little-endian int32: magic, version (3: fp32, 5: bf16), context, vocabulary, layers, heads,
width, padded vocabulary, zeros. Then the parameters in ORDER, one kind after the other, each for
all layers, matrices as (out, in) (llm.c: write_model in train_gpt2.py, gpt2_write_to_checkpoint in
train_gpt2.cu).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from launch.errors import BadInput
from model.gpt2 import GPT, GPTConfig, parameter_count
from model.hf import load_named, named_weights

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
BLOCK = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
    "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
    "mlp.c_proj.weight", "mlp.c_proj.bias",
)

Precision = Literal["fp32", "bf16"]


def order(n_layer: int) -> Iterator[str]:
    """The parameters' names as the file has them."""
    yield from ("wte.weight", "wpe.weight")
    for name in BLOCK:
        yield from (f"h.{layer}.{name}" for layer in range(n_layer))
    yield from ("ln_f.weight", "ln_f.bias")


def from_llmc(path: Path) -> GPT:
    """The model in a file, in fp32. Raises BadInput where the file is another one, or cut."""
    config, padded, dtype = _read_header(path)
    count = parameter_count(config) + (padded - config.n_vocab) * config.n_embd
    expected = 4 * HEADER + dtype.itemsize * count
    if path.stat().st_size != expected:  # before anything of that size is allocated
        raise BadInput(f"{path} has {path.stat().st_size:,} bytes and its header asks for "
                       f"{expected:,}: it was cut, or isn't llm.c's")
    model = GPT(config)
    shapes = {name: weight.shape for name, weight in named_weights(model).items()}
    shapes["wte.weight"] = torch.Size((padded, config.n_embd))  # (Vp, C)
    integers = np.memmap(path, f"<i{dtype.itemsize}", "r", offset=4 * HEADER)
    tensors, start = {}, 0
    for name in order(config.n_layer):
        shape = shapes[name]
        values = torch.from_numpy(integers[start : start + shape.numel()].copy())
        tensors[name] = values.view(dtype).view(shape)
        start += shape.numel()
    tensors["wte.weight"] = tensors["wte.weight"][: config.n_vocab]
    load_named(model, tensors, path)
    return model


def to_llmc(model: GPT, path: Path, precision: Precision) -> None:
    """Writes a file that llm.c trains on from: train_gpt2cu -e FILE."""
    config, dtype = model.config, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    header = np.zeros(HEADER, "<i4")
    header[:8] = (
        MAGIC, 3 if precision == "fp32" else 5, config.n_ctx, config.n_vocab, config.n_layer,
        config.n_head, config.n_embd, config.padded_vocab,
    )
    weights = dict(model.named_parameters())  # padding rows and all: they are zero
    with path.open("wb") as file:
        file.write(header.tobytes())
        for name in order(config.n_layer):
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

