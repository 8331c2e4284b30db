"""The first eight minutes on a card: what was predicted, what is measured, and their ratio.

    make gpu-check                                  # with the torch of this machine's python3
    make gpu-check PYTHON=/opt/conda/bin/python     # of another interpreter
    python -m tests.gpucheck                        # with this one, which has all that runs need
    python -m tests.gpucheck steps rates            # some parts

Needs a GPU, and no network. Parts: errors, steps, all GPUs (under torchrun, where there are
several), rates, losses, sampling, HellaSwag, saving, largest, kernels; docs/gpu_check.md says what
they measure. Prints a table and writes gpu_report.json, which --plan takes as a card. Exit code 1
where a part failed, 2 without a GPU.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from kernels.cards import by_name
from launch import cli, flags
from launch.errors import BadInput, run_command
from tests.gpucheck import report
from tests.gpucheck.machine import Machine, find_machine
from tests.gpucheck.parts import PARTS, Part, measure_all
from tests.gpucheck.predict import predict
from tests.gpucheck.settings import Settings, batch_that_fits
from tests.nullgpu.venv import ROOT

FOLDER = ROOT / "build" / "gpu-check"  # a disk with room for checkpoints, unlike many a /tmp


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    parts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Of the parts; all, if none is named."""
    out: Path = Path("gpu_report.json")
    """The file to write."""
    minutes: float = 8.0
    """After so many no other part begins, and the one that runs is ended."""
    quick: bool = False
    """A tiny model: shows that it works, and measures nothing worth knowing."""

    def __post_init__(self) -> None:
        cli.within("minutes", self.minutes, 0.1, 1440)
        if not self.out.parent.is_dir():  # said now, not after eight minutes
            raise BadInput(f"--out {self.out}: there is no folder {self.out.parent}")
        known = [part.name for part in PARTS]
        for name in self.parts:
            if name not in known:
                raise BadInput(f"gpu-check has no part {name!r}: there are {', '.join(known)}")


def main(arguments: Arguments) -> int:
    """Prints the table; the exit code."""
    machine = find_machine(sys.executable)
    batch = 2 if arguments.quick else batch_that_fits(machine.memory_bytes)
    settings = Settings(batch, machine.gpus, arguments.quick)
    print(machine.line(), flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        measured = measure_all(chosen(arguments.parts, machine), settings, Path(folder),
                               arguments.minutes)
    card = by_name(machine.gpu)
    if card is None:
        print(f"{machine.gpu} is not in kernels/cards.py: nothing is predicted for it")
    lines = report.rows(predict(card, settings), measured)
    report.write(arguments.out, machine, card, settings, lines, measured)
    print(f"\n{report.table(lines)}\n")
    for line in [*measured.get("steps", {}).get("said", []), *report.faults(measured),
                 report.note_on_versions(machine)]:
        if line:
            print(line)
    print(f"written to {arguments.out}")
    return 1 if report.faults(measured) else 0


def chosen(names: tuple[str, ...], machine: Machine) -> list[Part]:
    """The parts of these names; without names all, of which one needs several GPUs."""
    if names:
        return [part for part in PARTS if part.name in names]
    return [part for part in PARTS if part.name != "all GPUs" or machine.gpus > 1]


if __name__ == "__main__":
    run_command(lambda: main(flags.parse(Arguments)))
