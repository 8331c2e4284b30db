"""What a run is judged on while it trains: validation loss, HellaSwag, a sample read aloud."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from data.loader import Data, Stream, validation_sequences
from data.tokenizer import EOT, decode
from eval import hellaswag
from eval.likelihood import Stopped
from eval.loss import validation_loss
from eval.sample import prompt_tokens
from launch import cli
from launch.errors import Failed
from launch.world import World
from model.generate import SampleConfig, generate
from model.gpt2 import GPT


@dataclass(frozen=True)
class ExamConfig:
    """When a run is judged, and on what."""

    eval_every: int = 250
    """Steps between evaluations: validation loss, HellaSwag, a sample."""
    val_tokens: int = 10_485_760
    """The fixed validation set: the first tokens of the validation shard (20 x 2^19)."""
    hellaswag: str = "auto"
    """A JSONL file of questions, off, or auto: downloaded for runs on GPUs."""
    prompt: str = "Hello, I'm a language model,"
    """What the samples continue."""

    def __post_init__(self) -> None:
        cli.within("eval_every", self.eval_every, 1, cli.MOST_STEPS)
        cli.within("val_tokens", self.val_tokens, 1, 10**12)

    def check(self, n_ctx: int) -> None:
        """Raises BadInput where this is no exam for a model with this context."""
        prompt_tokens(self.prompt, n_ctx)


@dataclass(frozen=True)
class Exam:
    """The same for the whole run. val_set says what the validation loss is the loss of."""

    stream: Stream
    sequences: int
    val_set: str
    micro_batch: int
    questions: list[hellaswag.Question]
    prompt: str


def set_exam(config: ExamConfig, data: Data, T: int, micro_batch: int, world: World) -> Exam:
    """Opens what the exam needs. Raises BadInput where the validation set or a file is unusable."""
    sequences = world.together(lambda: validation_sequences(data.val, T, config.val_tokens))
    val_set = f"{data.name}, {sequences * T:,} tokens"
    rows = open_questions(config.hellaswag, world)
    return Exam(data.val, sequences, val_set, micro_batch, rows, config.prompt)


def open_questions(source: str, world: World) -> list[hellaswag.Question]:
    """HellaSwag's questions; or none, and unless that was asked for a line that says why."""
    if source == "off":
        return []
    if source == "auto" and world.device.type != "cuda":
        world.print("no HellaSwag in this run: minutes on a CPU; --hellaswag FILE asks for it")
        return []
    if source != "auto":
        return world.together(lambda: hellaswag.read_questions(Path(source)))
    try:
        return world.on_main(lambda: hellaswag.read_questions(hellaswag.fetch()))
    except Failed as error:
        world.print(f"no HellaSwag in this run: {error}")
        return []


def examine(
    model: GPT, exam: Exam, world: World, stop: Callable[[], bool], with_questions: bool
) -> dict | None:
    """Judges a model on all ranks; returns a row for metrics.jsonl and prints it.

    `stop` is asked, by all ranks together, between batches and tokens; None where it said so.
    """
    loss = validation_loss(model, exam.stream, exam.sequences, exam.micro_batch, world, stop)
    if loss is None:
        return None
    world.print(f"val loss {loss:.4f} ({exam.val_set})")
    row = {"val_loss": loss, "val_set": exam.val_set}
    with torch.compiler.set_stance("force_eager"):  # every sentence has another length
        if with_questions and exam.questions:
            try:
                score = hellaswag.evaluate(model, exam.questions, world, stop)
            except Stopped:
                return None
            row |= {"hellaswag_acc": score.acc, "hellaswag_acc_norm": score.acc_norm}
            world.print(f"HellaSwag acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f}, "
                        f"{score.n} questions")
        text = read_aloud(model, exam.prompt, world, stop)
    if text is None:
        return None
    row["sample"] = exam.prompt + text
    world.print(f"sample: {row['sample']!r}")
    return row


def read_aloud(model: GPT, prompt: str, world: World, stop: Callable[[], bool]) -> str | None:
    """A continuation of the prompt; None where `stop` said so.

    Every rank asks `stop` equally often, even where rounding let one draw an early end of text.
    """
    idx = torch.tensor([prompt_tokens(prompt, model.config.n_ctx)], device=world.device)  # (1, T)
    config, drawn = SampleConfig(), []
    stream = generate(model, idx, config, eot=EOT)
    for _ in range(config.max_tokens):
        tokens = next(stream, None)
        if tokens is not None:
            drawn.append(int(tokens))
        if stop():
            return None
    return decode(drawn[: drawn.index(EOT)] if EOT in drawn else drawn)
