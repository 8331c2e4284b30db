"""Moves weights between the field's formats.

    python -m model.convert runs/gpt2-124m exported --to hf      # transformers, vLLM, lm-eval
    python -m model.convert runs/gpt2-124m model.bin --to llmc   # llm.c
    python -m model.convert out/ckpt.pt converted --to ours      # eval.*, --init

SRC is a checkpoint folder, a run folder (its newest), hf:DIR or hf:NAME, llm.c's .bin, or a .pt of
nanoGPT or build-nanogpt: files are recognised by what is in them. fp32 weights keep every bit;
--dtype bf16 makes a hf folder or llm.c's file half as large.
DST appears whole or not at all, and nothing is overwritten. Optimizer state stays behind. What came
from the Hub is written down with its commit: "source" in config.json (ours), or in the header of
model.safetensors (hf).
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors import SafetensorError

from data.tokenizer import EOT, vocabulary
from launch import flags
from launch.errors import BadInput, Failed, run_command
from launch.files import fsync, refuse_lfs_pointer
from launch.world import DTYPES
from model.checkpoint import characters_of, load_resolved, resolve
from model.formats.hf import from_hf, to_hf
from model.formats.hub import locate
from model.formats.llmc import Precision, from_llmc, to_llmc
from model.formats.nanogpt import from_nanogpt
from model.formats.pickles import is_pickle
from model.formats.tensors import (
    named_weights,
    require_gpt2,
    without_padding,
)
from model.gpt2 import GPT
from model.manifest import write_manifest
from model.network import get_num_params
from model.safetensors_layout import save_tensors

EOT_TEXT = "<|endoftext|>"


def read_source(spec: str, allow_pickle: bool = False) -> GPT:
    """The model that `spec` names, with GPT-2's 50,257 tokens or, out of a checkpoint of ours, as
    many characters as it reads. Raises BadInput for any other."""
    path = Path(spec)
    if spec.startswith("hf:"):
        model = from_hf(spec.removeprefix("hf:"), allow_pickle=allow_pickle)
    elif path.is_dir():
        return read_ours(spec)[0]
    elif not path.is_file():
        raise BadInput(f"{spec} is neither a file nor a folder here: SRC is a checkpoint folder, a "
                       "run folder, hf:DIR, llm.c's .bin, or a .pt of nanoGPT or build-nanogpt")
    elif path.suffix == ".safetensors":
        raise BadInput(f"{spec} is only the weights: name its folder, hf:{path.parent} for one of "
                       "Hugging Face's")
    else:
        refuse_lfs_pointer(path)
        model = from_nanogpt(path) if is_pickle(path) else from_llmc(path)
    return without_padding(model, spec)


def read_ours(spec: str) -> tuple[GPT, str]:
    """The model of a checkpoint or a run, and the characters that it reads; '': GPT-2's tokens."""
    source = resolve(spec)
    model, characters = load_resolved(source), characters_of(source)
    return model if characters else without_padding(model, spec), characters


def write_hf(
    model: GPT, folder: Path, source: str = "", dtype: torch.dtype = torch.float32
) -> None:
    """A Hugging Face folder with everything that AutoModel, AutoTokenizer and pipeline read."""
    to_hf(model, folder, source, dtype)
    end = {"bos_token_id": EOT, "eos_token_id": EOT, "pad_token_id": EOT}
    _write_json(folder / "generation_config.json", end)
    for name, content in tokenizer_files(model.config.n_ctx).items():
        (folder / name).write_text(content, encoding="utf-8")


def write_ours(model: GPT, folder: Path, source: str = "", characters: str = "") -> None:
    """A checkpoint folder of weights alone, for eval.* and --init.

    source: where the weights came from. characters: what the model reads, if not GPT-2's tokens.
    Raises BadInput for a model that is no GPT-2.
    """
    if model.config.arch == "gpt2":
        require_gpt2(model, "a converted checkpoint")
    folder.mkdir()
    weights = {name: w.cpu().contiguous() for name, w in named_weights(model).items()}
    save_tensors(weights, folder / "model.safetensors", {"format": "pt"})
    content: dict[str, Any] = {"config": {"model": asdict(model.config)}}
    if source:
        content["source"] = source
    if characters:
        content["characters"] = characters
    _write_json(folder / "config.json", content)
    write_manifest(folder)


def tokenizer_files(n_ctx: int) -> dict[str, str]:
    """File name -> content of GPT-2's tokenizer for transformers, out of data.tokenizer's merges.

    tokenizer.json is what today's transformers reads; vocab.json and merges.txt are what others do.
    """
    vocab, merges = vocabulary()
    vocab = vocab | {EOT_TEXT: EOT}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": EOT, "content": EOT_TEXT, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": False, "vocab": vocab,
                  "merges": merges},
    }
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": EOT_TEXT,
        "eos_token": EOT_TEXT,
        "unk_token": EOT_TEXT,
        "pad_token": EOT_TEXT,  # GPT-2 has none; without one, transformers can't batch
        "padding_side": "left",  # where generation wants it
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,  # or decoding turns " ." into "."
        "model_max_length": n_ctx,
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
    }


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` make a file or folder under another name, flushes it and gives it its own."""
    work = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(work)
        write(work)
        for file in [*work.iterdir()] if work.is_dir() else [work]:
            fsync(file)
        work.rename(path)
        fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise Failed(f"could not write {path}: {error}") from None
    finally:
        _remove(work)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(
    src: Annotated[str, tyro.conf.Positional],
    dst: Annotated[str, tyro.conf.Positional],
    to: Literal["hf", "llmc", "ours"],
    dtype: Precision = "fp32",
    allow_pickle: bool = False,
) -> None:
    """Moves a model's weights into another format.

    Args:
        src: A checkpoint folder, a run folder, hf:DIR, llm.c's .bin, or nanoGPT's .pt.
        dst: What to make; must not exist.
        to: Hugging Face folder, llm.c's .bin, or a checkpoint folder of this project.
        dtype: Number format of the weights; bf16 for hf and llmc.
        allow_pickle: Read the pytorch_model.bin of a Hugging Face folder that has nothing else.
    """
    path = Path(dst)
    if path.exists() or path.is_symlink():
        raise BadInput(f"{dst} is there already, and nothing is overwritten: name another")
    if dtype != "fp32" and to == "ours":
        raise BadInput(f"--dtype {dtype} is for --to hf and --to llmc; a checkpoint of this "
                       "project keeps fp32")
    source = ""
    if src.startswith("hf:"):
        folder, commit = locate(src.removeprefix("hf:"), allow_pickle)
        if commit:
            name = src.partition("@")[0]
            src, source = f"hf:{folder}", f"{name}@{commit}"
    characters = ""
    if Path(src).is_dir():
        model, characters = read_ours(src)
    else:
        model = read_source(src, allow_pickle)
    if characters and to != "ours":
        raise BadInput(f"{src} reads {len(characters)} characters, and --to {to} is read with "
                       "GPT-2's tokenizer: --to ours keeps its characters")
    write: dict[str, Callable[[Path], None]] = {
        "hf": lambda work: write_hf(model, work, source, DTYPES[dtype]),
        "llmc": lambda work: to_llmc(model, work, dtype),
        "ours": lambda work: write_ours(model, work, source, characters),
    }
    write_whole(path, write[to])
    config = model.config
    print(f"{dst}: {get_num_params(model):,} parameters ({config.n_layer} layers, "
          f"{config.n_head} heads, width {config.n_embd}, context {config.n_ctx:,})")


if __name__ == "__main__":
    run_command(lambda: flags.parse(main))
