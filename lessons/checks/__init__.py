"""What an exercise has to pass, and which mistake gives which wrong number."""

from typing import Any

import torch

from lessons.course import Wrong


def expect(what: str, seen: Any, right: float, tolerance: float,
           mistakes: dict[str, float]) -> None:
    """Raises Wrong unless `seen` is the right number, and says which mistake gives what it is.

    mistakes: what was done wrong -> the number which that gives.
    """
    if isinstance(seen, torch.Tensor) and seen.numel() == 1:
        seen = seen.item()
    try:
        number = float(seen)
    except (TypeError, ValueError):
        raise Wrong(f"{what}: a number is asked for, not {describe(seen)}") from None
    if abs(number - right) <= tolerance:
        return
    digits = next((d for d in range(7, 17) if f"{number:.{d}g}" != f"{right:.{d}g}"), 17)
    line = f"{what}: {number:.{digits}g} where {right:.{digits}g} is right"
    for mistake, wrong in mistakes.items():
        if number == wrong or abs(number - wrong) <= tolerance:  # infinity too
            raise Wrong(f"{line}: {mistake}")
    raise Wrong(line)


def same(what: str, seen: object, right: object, mistakes: dict[str, object]) -> None:
    """Raises Wrong unless `seen` is `right`, and says which mistake gives what it is.

    mistakes: what was done wrong -> what that gives.
    """
    if seen == right:
        return
    line = f"{what}: {str(seen)[:100]} where {right} is right"
    for mistake, wrong in mistakes.items():
        if seen == wrong:
            raise Wrong(f"{line}: {mistake}")
    raise Wrong(line)


def expect_shape(what: str, seen: Any, shape: tuple[int, ...]) -> None:
    """Raises Wrong unless `seen` is a tensor of this shape."""
    if not isinstance(seen, torch.Tensor) or seen.shape != shape:
        raise Wrong(f"{what}: a tensor of shape {shape} is asked for, not {describe(seen)}")


def describe(seen: Any) -> str:
    """What somebody has returned, in a few words."""
    if seen is None:
        return "None: is there a return?"
    if isinstance(seen, torch.Tensor):
        return f"a tensor of shape {tuple(seen.shape)}"
    if isinstance(seen, list | tuple):
        return f"a {type(seen).__name__} of {len(seen)}"
    kind = type(seen).__name__
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
