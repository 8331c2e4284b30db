"""A run's losses as a picture.

    python -m eval.report runs/demo       # writes runs/demo/report/loss.png
"""

import sys
from pathlib import Path

from launch.errors import BadInput, one_line_errors
from launch.tracker import read_rows


def plot_losses(run: Path) -> Path:
    """Draws train and validation loss against tokens from metrics.jsonl; returns the PNG's path."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = read_rows(run / "metrics.jsonl")
    train = [row for row in rows if "train_loss" in row]
    val = [row for row in rows if "val_loss" in row]
    if not train and not val:
        raise BadInput(f"{run} is no run with losses: looked in {run / 'metrics.jsonl'}")
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    if train:
        tokens, losses = [row["tokens"] for row in train], [row["train_loss"] for row in train]
        axes.plot(tokens, losses, color="tab:blue", alpha=0.5, linewidth=1, label="train")
    if val:
        tokens, losses = [row["tokens"] for row in val], [row["val_loss"] for row in val]
        label = f"val: {val[-1]['val_set']}"
        axes.plot(tokens, losses, color="tab:red", marker="o", markersize=4, label=label)
        axes.annotate(f"{losses[-1]:.4f}", (tokens[-1], losses[-1]), color="tab:red",
                      textcoords="offset points", xytext=(-8, 10), ha="right")
    axes.set(title=run.name, xlabel="tokens trained on", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path = run / "report" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    with one_line_errors():
        if len(sys.argv) != 2:
            raise BadInput("usage: python -m eval.report RUN")
        print(plot_losses(Path(sys.argv[1])))
