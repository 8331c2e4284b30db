"""What a run is judged on while it trains: validation loss, HellaSwag, a sample read aloud."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.loader import Data, Stream, validation_sequences
from eval import hellaswag
from eval.loss import validation_loss
from eval.sample import sample_texts
from launch.errors import Failed
from launch.world import World
from model.generate import SampleConfig
from model.gpt2 import GPT


@dataclass(frozen=True)
class Exam:
    """The same for the whole run. val_set says what the validation loss is the loss of."""

    stream: Stream
    sequences: int
    val_set: str
    micro_batch: int
    questions: list[hellaswag.Question]
    prompt: str


def set_exam(
    data: Data, T: int, val_tokens: int, micro_batch: int, questions: str, prompt: str, world: World
) -> Exam:
    """Opens what the exam needs. Raises BadInput where the validation set or a file is unusable.

    questions: a JSONL file of HellaSwag rows, "off", or "auto": downloaded for runs on GPUs.
    """
    sequences = world.together(lambda: validation_sequences(data.val, T, val_tokens))
    val_set = f"{data.name}, {sequences * T:,} tokens"
    rows = open_questions(questions, world)
    return Exam(data.val, sequences, val_set, micro_batch, rows, prompt)


def open_questions(source: str, world: World) -> list[hellaswag.Question]:
    """HellaSwag's questions; none, and a line that says so, where they can't be downloaded."""
    if source == "off" or (source == "auto" and world.device.type != "cuda"):
        return []
    if source != "auto":
        return world.together(lambda: hellaswag.read_questions(Path(source)))
    try:
        return world.on_main(lambda: hellaswag.read_questions(hellaswag.fetch()))
    except Failed as error:
        world.print(f"no HellaSwag in this run: {error}")
        return []


def examine(model: GPT, exam: Exam, world: World, with_questions: bool) -> dict:
    """Judges a model on all ranks; returns a row for metrics.jsonl and prints it."""
    loss = validation_loss(model, exam.stream, exam.sequences, exam.micro_batch, world)
    world.print(f"val loss {loss:.4f} ({exam.val_set})")
    row = {"val_loss": loss, "val_set": exam.val_set}
    with torch.compiler.set_stance("force_eager"):  # every sentence has another length
        if with_questions and exam.questions:
            score = hellaswag.evaluate(model, exam.questions, world)
            row |= {"hellaswag_acc": score.acc, "hellaswag_acc_norm": score.acc_norm}
            world.print(f"HellaSwag acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f}, "
                        f"{score.n} questions")
        text = sample_texts(model, exam.prompt, 1, SampleConfig(), world.device)[0]
    row["sample"] = exam.prompt + text
    world.print(f"sample: {row['sample']!r}")
    return row
