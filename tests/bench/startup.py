"""From the command to its answer: --help, and the first training step of GPT-2 124M.

    python -m tests.bench startup

Each turn is a process of its own. Beside --help stands what `import torch` alone takes; beside the
first step (B=1, T=64) a plain script that builds the same model and optimizer. Ours is what a run
imports and puts together, without its data, its evaluation and its checkpoint of step 0, and as in
its command Python doesn't look for garbage in what is imported.
"""

import subprocess
import sys
from functools import partial

from launch.world import choose_device, choose_dtype
from model.config import GPTConfig
from tests.bench.pairs import Done, Row, Work
from tests.bench.training import QUICK
from tests.running import ROOT

LEAVE = "import os; os._exit(0)"  # what is timed ends with the step, not when all is taken down


def rows(quick: bool = False) -> list[Row]:
    """The table's rows of starting."""
    dtype = choose_dtype("auto", choose_device())
    config, name = (QUICK, "quick") if quick else (GPTConfig(), "124M")
    plain = f"from model.config import GPTConfig; from tests.bench import plain; " \
            f"plain.first_step({config!r}, 1, 64); {LEAVE}"
    ours = f"import gc; gc.disable(); import train_gpt2; from model.config import GPTConfig; " \
           f"from tests.bench import training; " \
           f"training.our_first_step({config!r}, 1, 64, {dtype!r}); {LEAVE}"
    return [
        Row("train_gpt2.py --help (plain: import torch)", "starts",
            partial(command, ["-c", "import torch"]), partial(command, ["train_gpt2.py", "--help"]),
            limit=partial(command, ["-c", "import tyro"])),
        Row(f"first step, {name}, {dtype}", "starts", partial(command, ["-c", plain]),
            partial(command, ["-c", ours]),
            limit=partial(command, ["-c", f"import gc; gc.disable(); import torch; {LEAVE}"])),
    ]


def command(words: list[str]) -> Work:
    """Python with these words, from the root."""
    def work() -> Done:
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return Done(1)

    return work
