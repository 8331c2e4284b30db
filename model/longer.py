"""A run that is given more steps goes on from before its learning rate began to fall.

Under wsd and constant the rate doesn't depend on the number of steps until its decay begins, so the
steps until then are those of the longer run, bit for bit. What was saved during the decay belongs
to the shorter run: it moves from checkpoints/ to decayed/ beside it, where it can still be sampled,
judged and converted.
"""

from pathlib import Path
from typing import Any

from launch import folder
from launch.errors import BadInput
from model.checkpoint import list_checkpoints, read_config, step_of


def set_aside_decayed(run: Path, description: dict[str, Any]) -> None:
    """Moves the checkpoints that a run with more steps than they knew of can't go on from.

    description: the run as it's asked for (launch/folder.py). Does nothing where no more steps are
    asked. Raises BadInput, and moves nothing, where the run differs in anything else, or where no
    checkpoint from before the decay is left.
    """
    checkpoints = list_checkpoints(run / "checkpoints")
    decayed = [path for path in checkpoints if _in_decay(path, description)]
    if not decayed:
        return
    folder.require_same_run(decayed[0], description, in_decay=True)
    if len(decayed) == len(checkpoints):
        raise BadInput(f"{run} has no checkpoint from before its rate began to fall, to go on from "
                       f"with more steps: --name OTHER --init {run} starts anew from its weights")
    aside = run / "decayed"
    aside.mkdir(exist_ok=True)
    for path in decayed:
        free, number = aside / path.name, 2
        while free.exists():
            free, number = aside / f"{path.name}-{number}", number + 1
        path.rename(free)
        print(f"{path} is of the shorter run's decay, and is {free} now", flush=True)


def _in_decay(checkpoint: Path, description: dict[str, Any]) -> bool:
    """Whether a checkpoint was made in the decay of a run of fewer steps than are asked now."""
    try:
        saved = read_config(checkpoint)
        steps, start = saved["config"]["steps"], saved["resolved"]["decay_start"]
    except (BadInput, KeyError, TypeError):  # a damaged one: passed over elsewhere; an older run's
        return False
    return steps < description["config"]["steps"] and 0 <= start < step_of(checkpoint)
