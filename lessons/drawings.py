"""The lessons' pictures: data in, a matplotlib figure out, which course.picture() saves."""

import numpy as np
from matplotlib.figure import Figure

PALE, DARK = "#c5cfe8", "#4467c4"


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
