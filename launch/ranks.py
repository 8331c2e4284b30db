"""Which rank this process is, as torchrun says it in the environment: checked before it's believed.

    rank, size = read_ranks()       # (0, 1) without torchrun
"""

import os

from launch.errors import BadInput

SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def read_ranks() -> tuple[int, int]:
    """(RANK, WORLD_SIZE). Raises BadInput for variables that no torchrun would set together."""
    problem = find_problem()
    if problem:
        # Which of the ranks may speak can't be told, so this process counts as one that is alone.
        for name in SET_BY_TORCHRUN:
            os.environ.pop(name, None)
        raise BadInput(f"{problem}. torchrun sets these; for one process alone: "
                       "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE")
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def find_problem() -> str:
    """What is wrong with the environment; empty where nothing is."""
    given = {name: os.environ[name] for name in SET_BY_TORCHRUN if name in os.environ}
    for name, value in given.items():
        if not (value.isascii() and value.isdigit()):
            return f"{name}={value!r} in the environment: expected a number"
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name in given and other not in given:
            return f"{name}={given[name]} in the environment without {other}"
    if "RANK" in given and int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        return (f"RANK={given['RANK']} with WORLD_SIZE={given['WORLD_SIZE']} in the environment: "
                "expected 0 to WORLD_SIZE - 1")
    if int(given.get("WORLD_SIZE", "1")) > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                return f"WORLD_SIZE={given['WORLD_SIZE']} in the environment without {name}"
    return ""
