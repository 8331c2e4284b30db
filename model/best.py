"""Which checkpoint of a run is the best: checkpoints/best.json, under --keep_best.

    {"checkpoint": "step_00000500", "step": 500, "val_loss": 3.2811}

The file is for people and scripts: a run knows its validation losses from metrics.jsonl, and writes
it anew after every save.
"""

import json
from pathlib import Path

from launch.files import atomic_write
from model.checkpoint import list_checkpoints, step_of

BEST = "best.json"


def mark_best(checkpoints: Path, newest: Path, losses: dict[int, float]) -> Path | None:
    """Names the checkpoint of the lowest validation loss, of equal ones the oldest.

    losses: by step. Folders newer than `newest` are damaged ones that the run went back from, and
    are passed over. Returns the best one's folder; None where none of them was evaluated.
    """
    best, best_loss = None, float("inf")
    for folder in reversed(list_checkpoints(checkpoints)):  # the oldest first
        loss = losses.get(step_of(folder), float("inf"))
        if folder.name <= newest.name and loss < best_loss:
            best, best_loss = folder, loss
    if best:
        content = {"checkpoint": best.name, "step": step_of(best), "val_loss": best_loss}
        atomic_write(checkpoints / BEST, json.dumps(content) + "\n")
    return best
