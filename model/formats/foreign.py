"""Weights that are no checkpoint yet: what to do with a file that was named as one.

    advice(Path("model.bin"))   # "model.bin is a file, and ...: `python -m model.conv..."
"""

import shlex
from pathlib import Path

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
# Beside tokens in folders lie .bin files too; these are nanoGPT's names of weights, and llm.c's.
PATTERNS = ("*.pt", "*.pth", "*.ckpt", "model*.bin")


def advice(path: Path) -> str:
    """One line on how to use the weights at this path; '' where none are recognised.

    path: a file of weights, or a folder that holds some (nanoGPT's out/). Only names are looked at.
    """
    if path.is_file():
        if path.suffix in SUFFIXES:
            return f"{path} is a file, and a checkpoint is a folder: {_convert(path)}"
        if path.suffix == ".safetensors" and not (path.parent / "manifest.json").exists():
            return f"{path} is only the weights: name its folder, hf:{path.parent}"
        return f"{path} is a file, and a checkpoint is a folder: name {path.parent}"
    if (path / "config.json").exists():
        return ""  # a Hugging Face folder, perhaps with a pytorch_model.bin
    for pattern in PATTERNS:
        found = sorted(path.glob(pattern))
        if found:
            return f"{path} is no checkpoint, but holds {found[-1].name}: {_convert(found[-1])}"
    return ""


def _convert(file: Path) -> str:
    command = ["python", "-m", "model.convert", str(file), f"{file.stem}_converted", "--to", "ours"]
    return f"`{shlex.join(command)}` makes one of it"
