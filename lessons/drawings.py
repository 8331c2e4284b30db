"""Pictures of the lessons: functions from numbers to a matplotlib Figure."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure


def means(title: str, losses: Sequence[float]) -> Figure:
    """A training's losses, one a step, as means of a thousand each."""
    thousands = len(losses) // 1000
    drawing = Figure(figsize=(7, 3))
    axes = drawing.add_subplot(title=title, xlabel="thousand steps")
    axes.plot(torch.tensor(losses[: thousands * 1000]).view(thousands, 1000).mean(1))
    return drawing


def ladder(curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """Validation losses of several trainings, each as (step, loss in nats)."""
    drawing = Figure(figsize=(7, 4))
    axes = drawing.add_subplot(xlabel="steps", ylabel="validation loss, nats", ylim=(2, 2.9))
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=name)
    axes.legend()
    return drawing
