"""What tests of the launch scripts share: programs that stand in for others, and awkward paths."""

import stat
from pathlib import Path

# Variables by which an engine says that it is there; a test sets the ones that it means.
ENGINES = ("SLURM_", "SBATCH_", "SKYPILOT_", "PET_", "NCCL_", "OMP_", "TORCH_")
# What a path may hold and a shell, a glob or a careless script would take for something else.
AWKWARD = """it's [v1] "data" $HOME; * -- &{a,b}\\"""


def tool(folder: Path, name: str, script: str) -> None:
    """An executable in `folder`."""
    path = folder / name
    path.write_text(script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
