"""What torch.save wrote, read without running it.

A pickle is a program. torch.load(weights_only=True) runs none of it: it builds tensors, numbers,
strings, lists and dicts, and stops at the name of anything else.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from launch.errors import BadInput


def is_pickle(path: Path) -> bool:
    """Whether a file begins like one that torch.save has written (a zip; before 1.6 a pickle)."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def load_pickle(path: Path, stand_ins: dict[str, type] | None = None) -> Any:
    """What a file of torch.save's holds. Raises BadInput for one that needs code, or is cut.

    stand_ins: name of a class in the pickle -> the class here that is to be made in its place.
    """
    allowed = stand_ins or {}
    try:
        with torch.serialization.safe_globals([(cls, name) for name, cls in allowed.items()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that was tampered with may raise anything
        code = _code_needed(path, allowed)
        if code:
            raise BadInput(f"{path} needs code to load ({code}), and whoever wrote the file chose "
                           "that code: refused. Save a dict of tensors and numbers instead, "
                           "{'model': model.state_dict(), 'model_args': {...}}") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's advice is to run its code
            reason = "it is damaged, or was never one"
        raise BadInput(f"can't read {path} as a file of torch.save's: {reason}") from None


def weights_in(content: Any, path: Path, where: str) -> dict[str, torch.Tensor]:
    """`content` if it is a dict of tensors by name; else raises BadInput."""
    if isinstance(content, dict):
        names = all(isinstance(name, str) for name in content)
        if names and all(isinstance(value, torch.Tensor) for value in content.values()):
            return content
    raise BadInput(f"{path} has no dict of weights {where}")


def _code_needed(path: Path, allowed: dict[str, type]) -> str:
    """The names that a pickle would import and that were not allowed; '' if it can't be told."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a file that torch.save writes, or not a whole one
        return ""
    return ", ".join(sorted(set(names) - allowed.keys()))
