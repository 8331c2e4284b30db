"""What is run on the stand-in for a GPU: a row of counted.json each.

A row runs the unchanged program for some steps, as one rank of `ranks`; the others are not there,
and every collective operation returns at once (collectives.py).
"""

from dataclasses import dataclass
from pathlib import Path

STEPS = 14  # DDP times its first ten, and waits for the card to do so
VAL_TOKENS = 65_536  # one batch of 64 sequences of 1,024
SHORT = ("--steps", "2", "--val_tokens", "1024")  # enough to know whether a run fits
QUESTIONS = 64  # of HellaSwag


@dataclass(frozen=True)
class Part:
    """The stretch of a run that is counted: from a line of the log to another, the n-th of each."""

    begin: str
    end: str
    nth: int = 1
    nth_end: int = 1


PARTS = {
    # From the beginning of an update to that of the next: whatever a step does, it does once.
    "step": Part("mark update", "mark update", 12, 13),
    "validation": Part("mark validation begins", "mark validation ends"),
    "HellaSwag": Part("mark HellaSwag begins", "mark HellaSwag ends"),
    # Of sampling: from a replay of its graph to the next, and what was captured into that.
    "token": Part("graph", "graph", 3, 4),
    "graph": Part("capture begins", "capture ends"),
}


@dataclass(frozen=True)
class Row:
    """A run. card: as cards.c calls it. batch: sequences a rank and step. arguments: more flags."""

    name: str
    card: str
    preset: str = "gpt2-124m"
    batch: int = 64
    ranks: int = 1
    arguments: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("step",)

    def command(self, inputs: Path, out: Path) -> list[str]:
        """The program's words. inputs: what write_inputs() made."""
        return ["train_gpt2.py", self.preset, "--steps", str(STEPS),
                "--batch_tokens", str(self.batch * 1024 * self.ranks),
                "--micro_batch", str(self.batch), "--data.text", str(inputs / "text.txt"),
                "--val_tokens", str(VAL_TOKENS), "--hellaswag", "off",
                "--out_dir", str(out), "--name", "run", *self.arguments]


class Sampling(Row):
    """A row that reads a model aloud."""

    def command(self, inputs: Path, out: Path) -> list[str]:
        return ["eval/sample.py", str(inputs / "model"), "--prompt", "The first thing",
                "--max_tokens", "20"]


class Evaluated(Row):
    """A row whose run is asked HellaSwag's questions at its end, as runs on a GPU are."""

    def command(self, inputs: Path, out: Path) -> list[str]:
        return [*super().command(inputs, out), "--hellaswag", str(inputs / "questions.jsonl")]


class Largest(Row):
    """A row whose number is its largest batch: runs of it fit and don't (largest.py)."""


# The longest first: two run at a time.
ROWS = [
    Row("gpt2-1558m, fsdp, 8 h100", "h100", "gpt2-1558m", batch=8, ranks=8,
        arguments=("--parallel", "fsdp")),
    Row("gpt2-124m, --kernels torch, h100", "h100", arguments=("--kernels", "torch")),
    Row("speedrun, h100", "h100", "speedrun"),
    Row("gpt2-124m, --compile True, h100", "h100", arguments=("--compile", "True")),
    Largest("largest micro-batch of gpt2-124m, h100", "h100", arguments=SHORT, parts=()),
    Largest("largest micro-batch of gpt2-124m, 4090", "4090", arguments=SHORT, parts=()),
    Row("gpt2-124m, a100", "a100"),
    Row("gpt2-124m, b200", "b200"),
    Row("gpt2-124m, h100", "h100"),
    Row("gpt2-124m, two micro-steps, h100", "h100", batch=128, arguments=("--micro_batch", "64")),
    Row("gpt2-124m, --deterministic, h100", "h100", arguments=("--deterministic", "True")),
    Row("gpt2-124m, --activation_checkpointing, h100", "h100",
        arguments=("--activation_checkpointing", "True")),
    Row("gpt2-124m, ddp, 8 h100", "h100", ranks=8),
    Row("gpt2-124m, zero1, 8 h100", "h100", ranks=8, arguments=("--parallel", "zero1")),
    Row("gpt2-124m, fsdp, 8 h100", "h100", ranks=8, arguments=("--parallel", "fsdp")),
    Row("gpt2-124m, ddp, --reduce_dtype bf16, 8 h100", "h100", ranks=8,
        arguments=("--reduce_dtype", "bf16")),
    Row("gpt2-124m, fsdp, --reduce_dtype bf16, 8 h100", "h100", ranks=8,
        arguments=("--parallel", "fsdp", "--reduce_dtype", "bf16")),
    Evaluated("gpt2-124m judged while it trains, h100", "h100",
              parts=("step", "validation", "HellaSwag")),
    Sampling("gpt2-124m sampled, h100", "h100", parts=("token", "graph")),
]

# For tests: what is planted in it has to be found.
SMALL = Row("small", "h100", batch=2,
            arguments=("--model.n_layer", "1", "--compile", "True", "--val_tokens", "2048"))

# For host.py: the host's time where a GPU has little to do. DDP looks at its first ten steps.
FEW = ("--steps", "200", "--val_tokens", "2048")
FSDP = ("--parallel", "fsdp", "--steps", "40", "--val_tokens", "65536",
        "--batch_tokens", str(2 * 8 * 8 * 1024))  # two micro-steps
TIMED = [
    Row("timed gpt2-124m, h100", "h100", batch=8, arguments=FEW),
    Row("timed gpt2-124m, ddp, 8 h100", "h100", batch=8, ranks=8,
        arguments=(*FEW, "--val_tokens", "65536")),
    Row("timed gpt2-1558m, fsdp, 8 h100", "h100", "gpt2-1558m", batch=8, ranks=8,
        arguments=FSDP),
    Row("timed gpt2-1558m, fsdp, compiled, 8 h100", "h100", "gpt2-1558m", batch=8, ranks=8,
        arguments=(*FSDP, "--compile", "True")),
]
