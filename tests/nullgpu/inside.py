"""Runs a row of rows.py in a process that has the stand-in for a GPU: started by running.py.

    python -m tests.nullgpu.inside 'gpt2-124m, h100' INPUTS OUT [--fault item] [--batch 32]

The program is the unchanged one. What is replaced here, and why, is all that stands between it and
a card that computes nothing; every patch has its reason beside it. OUT/found.json gets what the
log can't tell.
"""

import argparse
import ctypes
import json
import os
import runpy
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

import eval.evaluator
import eval.hellaswag
import kernels.race
import kernels.selfcheck
import model.fused_block
import model.parallel
import model.saving
from tests.nullgpu.collectives import use_counted_group
from tests.nullgpu.rows import PARTS, ROWS, SMALL, TIMED, Row

peaks: dict[str, float] = {}  # part -> MiB
marks: dict[str, int] = {}  # mark -> how often it was made
clock: list[tuple[str, float]] = []  # marks in their order, with the CPU seconds of the process


def peak_mib() -> float:
    """The most that tensors have taken since the latest beginning of a part."""
    return torch.cuda.max_memory_allocated() / 2**20


def mark(text: str) -> None:
    """Writes a line into the log of launches; begins and ends what PARTS count."""
    ctypes.CDLL(None).nullgpu_mark(text.encode())
    clock.append((text, time.process_time()))
    marks[text] = marks.get(text, 0) + 1
    for name, part in PARTS.items():
        if f"mark {text}" == part.end and marks[text] == part.nth_end:
            peaks[name] = peak_mib()
        if f"mark {text}" == part.begin and marks[text] == part.nth:
            torch.cuda.reset_peak_memory_stats()


# ---- marks: where a step, a token, an evaluation begins and ends ----

def mark_updates() -> None:
    """At each update."""
    real = model.parallel.ParallelModel.optimizer_step

    def marked(*args) -> None:
        mark("update")
        real(*args)

    model.parallel.ParallelModel.optimizer_step = marked


def mark_around(module, function: str, what: str) -> None:
    """Before and after each call of a module's function."""
    real = getattr(module, function)

    def marked(*args, **kwargs):
        mark(f"{what} begins")
        result = real(*args, **kwargs)
        mark(f"{what} ends")
        return result

    setattr(module, function, marked)


def mark_micro_steps() -> None:
    """Around forward and backward of a micro-step in which ranks exchange no gradients."""
    real = model.parallel.ParallelModel.gradient_sync

    @contextmanager
    def marked(self, enabled: bool):
        if not enabled:
            mark("unsynced begins")
        with real(self, enabled):
            yield
        if not enabled:
            mark("unsynced ends")

    model.parallel.ParallelModel.gradient_sync = marked


# ---- patches ----

def pass_the_self_checks() -> None:
    """They compare the kernels' numbers with the reference's, and are right: here all are wrong.
    What they would run is left out, what they decide by it stays the program's own."""
    kernels.selfcheck.compare = lambda *args: ({}, [])
    kernels.selfcheck.judge_differs = lambda *args: ""
    model.fused_block.check = lambda *args: ("not checked", "")
    # What is to be raced is checked first, and events here are 1 ms apart, whatever lies between
    # them: the first that is named wins, which is ours.
    kernels.race.check = lambda runs, fault_of: dict.fromkeys(runs, "")
    kernels.race.decide = lambda runs, *args: kernels.race.Result(next(iter(runs)), "not timed")


def find_as_many_as_there_can_be() -> None:
    """How many entries aren't zero is read from the card, which says none: HellaSwag would be
    scored without its last launches. All are found."""
    real = torch.Tensor.nonzero

    def nonzero(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        return found.new_zeros(self.numel(), self.dim()) if self.is_cuda else found

    torch.Tensor.nonzero = nonzero


def trust_the_other_ranks() -> None:
    """DDP compares the number of parameters of all ranks, read from a card that says 0."""
    torch.nn.parallel.distributed._verify_param_shape_across_processes = lambda *args: True


def save_nothing() -> None:
    """Rank 0 would wait for what the others write, and 1558M take 19 GB of the disk."""
    model.saving.Saver.save = lambda *args, **kwargs: None


def prepare(row: Row) -> None:
    """All marks and patches."""
    # cuDNN looks for a real card. torch then takes its own flash attention.
    torch.backends.cuda.enable_cudnn_sdp(False)
    mark_updates()
    mark_micro_steps()
    mark_around(eval.evaluator, "validation_loss", "validation")
    mark_around(eval.hellaswag, "evaluate", "HellaSwag")
    pass_the_self_checks()
    find_as_many_as_there_can_be()
    save_nothing()
    if row.ranks > 1:
        use_counted_group(mark)
        trust_the_other_ranks()


def found() -> dict:
    """What the log can't tell."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    recompiles = [m for m in get_compilation_metrics() if m.recompile_reason]
    return {"torch": torch.__version__, "graph_breaks": sum(counters["graph_break"].values()),
            "recompiles": len(recompiles), "peaks": peaks, "peak": peak_mib(), "clock": clock}


def run(row: Row, inputs: Path, out: Path) -> NoReturn:
    """Runs the program, writes OUT/found.json and ends the process as the program would."""
    leave = os._exit

    def write_and_leave(exit_code: int) -> NoReturn:  # one of many ranks leaves by os._exit
        (out / "found.json").write_text(json.dumps(found()))
        sys.stdout.flush()
        sys.stderr.flush()
        leave(exit_code)  # libraries that are taken down would ask the card once more

    prepare(row)
    os._exit = write_and_leave
    program, *arguments = row.command(inputs, out)
    sys.argv = [program, *arguments]
    try:
        runpy.run_path(program, run_name="__main__")
        os._exit(0)
    except SystemExit as done:
        os._exit(done.code if isinstance(done.code, int) else 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main() -> NoReturn:
    parser = argparse.ArgumentParser()
    parser.add_argument("row")
    parser.add_argument("inputs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fault", default="")
    parser.add_argument("--batch", type=int)
    arguments = parser.parse_args()
    if arguments.fault:
        from tests.nullgpu import faults

        getattr(faults, arguments.fault)()
    (row,) = [row for row in [*ROWS, SMALL, *TIMED] if row.name == arguments.row]
    run(replace(row, batch=arguments.batch or row.batch), arguments.inputs, arguments.out)


if __name__ == "__main__":
    main()
