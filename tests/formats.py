"""GPT-2's weights in files as each project writes its own, and the logits they stand for."""

import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model import convert
from model.gpt2 import GPTConfig

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=16)
IDX = torch.randint(50257, (2, 16), generator=torch.Generator().manual_seed(1))
SETTINGS = dict(n_layer=2, n_head=2, n_embd=32, block_size=16)
LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@dataclass
class Source:
    """A file or folder as its own project writes it, and the logits it stands for."""

    spec: str
    logits: torch.Tensor


def theirs(bias: bool = True, gelu: str = "gelu_new") -> GPT2LMHeadModel:
    """transformers' GPT-2 with no parameter at its initial 0 or 1."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=16, activation_function=gelu,
        attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))
    for name, parameter in model.named_parameters():
        zero = name.endswith("bias") and not bias
        parameter.data += 0 if zero else 0.05 * torch.randn_like(parameter)
    return model.eval()


def linear_weights(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    """Its weights under nanoGPT's names, matrices as (out, in)."""
    return {name: (w.t() if name.endswith(LINEAR) else w).detach().clone().contiguous()
            for name, w in model.state_dict().items()}


def write_llmc(weights: dict[str, torch.Tensor], path: Path, dtype: torch.dtype) -> None:
    """llm.c's layout, spelled out."""
    header = np.zeros(256, dtype="<i4")
    header[:8] = 20240326, 3 if dtype == torch.float32 else 5, 16, 50257, 2, 2, 32, 50304
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            names += [f"transformer.h.{layer}.{part}.{kind}" for layer in (0, 1)]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    content = header.tobytes()
    for name in names:
        values = weights[name].to(dtype).flatten()
        content += values.view(torch.uint8).numpy().tobytes()
        if name == "transformer.wte.weight":
            content += bytes(47 * 32 * dtype.itemsize)
    path.write_bytes(content)


def pickle_config(**settings: int) -> object:
    """An object of a class that is called __main__.GPTConfig, as a script's would be."""
    kind = make_dataclass("GPTConfig", settings.keys())
    kind.__module__ = "__main__"
    sys.modules["__main__"].GPTConfig = kind  # type: ignore[attr-defined]
    return kind(**settings)


def make_sources(folder: Path) -> dict[str, Source]:
    """One of each format that is read."""
    full, bare = theirs(), theirs(bias=False, gelu="gelu")
    exact = theirs(gelu="gelu")  # the same weights with nanoGPT's GELU
    weights = linear_weights(full)
    with torch.no_grad():
        logits, exact_logits, bare_logits = (m(IDX).logits for m in (full, exact, bare))
    rounded = theirs()
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        rounded_logits = rounded(IDX).logits

    full.save_pretrained(folder / "hf")
    write_llmc(weights, folder / "fp32.bin", torch.float32)
    write_llmc(weights, folder / "bf16.bin", torch.bfloat16)
    torch.save({"model": {f"_orig_mod.module.{k}": v for k, v in weights.items()},
                "optimizer": {"state": {}}, "iter_num": 7, "best_val_loss": torch.tensor(3.0),
                "model_args": SETTINGS | {"vocab_size": 50257, "bias": True, "dropout": 0.0},
                "config": {"dataset": "openwebtext"}}, folder / "ckpt.pt")
    without = {k: v for k, v in linear_weights(bare).items() if not k.endswith("bias")}
    padded = torch.cat([without["transformer.wte.weight"], torch.randn(47, 32)])  # they are trained
    without |= {"transformer.wte.weight": padded, "lm_head.weight": padded}
    torch.save({"model": without, "model_args": SETTINGS | {"vocab_size": 50304, "bias": False}},
               folder / "bare.pt")
    torch.save({"model": weights, "config": pickle_config(**SETTINGS, vocab_size=50257),
                "step": 3, "val_loss": 3.0}, folder / "model_00003.pt")
    convert.main(str(folder / "model_00003.pt"), str(folder / "ours"), "ours")
    return {
        "ours": Source(str(folder / "ours"), logits),
        "hf": Source(f"hf:{folder / 'hf'}", logits),
        "llmc": Source(str(folder / "fp32.bin"), logits),
        "llmc-bf16": Source(str(folder / "bf16.bin"), rounded_logits),
        "nanogpt": Source(str(folder / "ckpt.pt"), exact_logits),
        "nanogpt-bare": Source(str(folder / "bare.pt"), bare_logits),
        "build-nanogpt": Source(str(folder / "model_00003.pt"), logits),
    }
