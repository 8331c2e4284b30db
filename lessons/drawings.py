"""The lessons' pictures: data in, a matplotlib figure out, which course.picture() saves."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

PALE, DARK = "#c5cfe8", "#4467c4"


# ---- lesson 1 ----


def step_errors(steps: Sequence[float], errors: Mapping[str, np.ndarray]) -> Figure:
    """The error of a slope by the step h that it is made with, a curve for each quotient."""
    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    for label, curve in errors.items():
        axes.loglog(steps, curve, "o-", label=label)
    axes.set(xlabel="h", ylabel="largest error of a slope", title="truncation against rounding")
    axes.legend()
    return figure


def graph(nodes: Iterable[Any], names: Mapping[Hashable, str]) -> Figure:
    """Every Value as a box, one column further right than the last of its parents, which come
    before it in nodes."""
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    heights: dict[int, int] = {}  # boxes in each column so far
    place: dict[Hashable, tuple[int, float]] = {}
    for node in nodes:
        column = 1 + max((place[parent][0] for parent in node.parents), default=-1)
        heights[column] = heights.get(column, 0) + 1
        place[node] = (column, -heights[column] - 0.4 * column)
        text = f"{names.get(node, node.op)}\n{node.data:.4f}\ngrad {node.grad:.4f}"
        axes.text(*place[node], text, ha="center", va="center", fontsize=8,
                  bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": DARK})
        for parent in node.parents:
            axes.plot(*zip(place[parent], place[node], strict=True), color="#999999", zorder=0)
    axes.axis("off")
    return figure


def moons(points: np.ndarray, labels: np.ndarray, grid: np.ndarray, scores: np.ndarray,
          losses: Sequence[float]) -> Figure:
    """Points (N, 2) with labels (N,) over the sign of the scores (G, G), a row for each y of the
    grid (G,); and the losses of the steps."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.contourf(grid, grid, scores, levels=[-99, 0, 99], colors=["#f4c7b5", "#b9cdf0"])
    left.scatter(*points.T, c=labels, cmap="coolwarm_r", edgecolors="black", s=18)
    right.plot(losses)
    right.set(xlabel="step", ylabel="loss")
    return figure


# ---- lesson 3 ----


def rate_search(rates: np.ndarray, smooth: np.ndarray, ylim: tuple[float, float],
                losses: list[float] | None = None, demo: float | None = None) -> Figure:
    """Loss over learning rate. smooth is shorter than rates, by as much at either end. losses:
    those of single batches, drawn behind it. demo: the demo's own rate."""
    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    if losses is not None:
        axes.plot(rates, losses, color=PALE)
    cut = (len(rates) - len(smooth) + 1) // 2
    axes.plot(rates[cut : cut + len(smooth)], smooth, color=DARK)
    if demo is not None:
        axes.axvline(demo, color="#999999", linestyle="--", label="the demo's")
        axes.legend()
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss of the batch", ylim=ylim)
    return figure


def letters_map(places: np.ndarray, letters: str) -> Figure:
    """Letters at their places (N, 2), vowels in another colour."""
    figure = Figure(figsize=(5, 5))
    axes = figure.subplots()
    colours = ["#f4c7b5" if letter in "aeiouy" else "#b9cdf0" for letter in letters]
    axes.scatter(places[:, 0], places[:, 1], s=260, color=colours)
    for letter, (x, y) in zip(letters, places, strict=True):
        axes.text(x, y, letter, ha="center", va="center")
    return figure


# ---- lesson 4 ----


def histograms(title: str, tensors: Iterable[Tensor], labels: Iterable[str]) -> Figure:
    """How the numbers of each tensor are spread."""
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    for x, label in zip(tensors, labels, strict=True):
        heights, edges = np.histogram(x.detach().numpy(), bins=40, density=True)
        axes.plot(edges[:-1], heights, label=label)
    axes.set(title=title)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves
    return figure


def update_to_data(ratios: Sequence[Sequence[float]], labels: Sequence[str]) -> Figure:
    """log10 of update to data: a row for each step, a curve for each weight, a line at -3."""
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    axes.plot(ratios, label=labels)
    axes.axhline(-3, color="black", linewidth=0.8)
    axes.set(title="update to data", xlabel="step", ylabel="log10")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves
    return figure


# ---- lesson 6 ----


def means(title: str, losses: Sequence[float]) -> Figure:
    """A training's losses, one a step, as means of a thousand each."""
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    thousands = len(losses) // 1000
    axes.plot(np.reshape(losses[: thousands * 1000], (thousands, 1000)).mean(1))
    axes.set(title=title, xlabel="thousand steps")
    return figure


# ---- lesson 7 ----


def ladder(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Validation losses of several trainings, each as (step, loss in nats)."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=name)
    axes.set(xlabel="steps", ylabel="validation loss, nats", ylim=(2, 2.9))
    axes.legend()
    return figure
