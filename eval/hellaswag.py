"""HellaSwag: which of four endings does the model find likeliest? (arXiv 1905.07830)

    python -m eval.hellaswag runs/gpt2-124m                        # the last line is JSON
    python -m eval.hellaswag hf:gpt2 --details gpt2.jsonl          # every question's answer
    python -m eval.hellaswag --compare gpt2.jsonl ours.jsonl       # the questions that differ
    torchrun --nproc_per_node=8 -m eval.hellaswag runs/gpt2-124m   # the same figures, on 8 GPUs

Completion style, as build-nanogpt and llm.c score it: context + " " + ending. The JSON holds
    n           questions
    acc         share right where the sum of an ending's token losses decides
    acc_norm    where their mean a token decides: build-nanogpt's and llm.c's acc_norm, the figure
                that GPT-2 runs are compared by. lm-evaluation-harness (and eval.tasks) mean another
                thing by this name: the sum divided by the ending's characters
    acc_stderr  standard error of acc
    acc_bytes   where the sum divided by the ending's bytes decides: the harness's acc_bytes, and
                for endings in ASCII its acc_norm
The harness's own HellaSwag asks another text (with the activity's label, and cleaned), so its
figures for the same model are 0.5 to 2 points higher.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from data.tokenizer import encode
from eval import choice
from eval.choice import Question, Score
from eval.likelihood import Request
from eval.published import SIZES
from launch import flags
from launch.config import ReadDtype
from launch.errors import BadInput, run_command
from launch.files import download
from launch.world import World, init_distributed
from model.gpt2 import GPT

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE = 12_246_618  # bytes
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
DEFAULT_PATH = Path("hellaswag/hellaswag_val.jsonl")
ALL_ROWS = 10_042


def fetch() -> Path:
    """The validation file, downloaded once. Raises Failed where that can't be done."""
    if not DEFAULT_PATH.exists():
        download(URL, DEFAULT_PATH, SHA256, SIZE)
    return DEFAULT_PATH


def read_questions(path: Path, limit: int = 0) -> list[Question]:
    """The rows of a JSONL file (or .jsonl.xz); the first `limit` if that isn't 0."""
    return choice.read_rows(path, _question, limit)


def _question(row: dict) -> Question:
    context, endings = choice.text(row["ctx"], "ctx"), choice.texts(row["endings"], "endings")
    if len(endings) != 4:
        raise ValueError(f"{len(endings)} endings, expected 4")
    request = Request(encode(context), [encode(" " + ending) for ending in endings])
    return Question(
        [request],
        norm_lengths=[len(tokens) for tokens in request.continuations],
        byte_lengths=[len(ending.encode()) for ending in endings],
        label=choice.label(row["label"], 4),
    )


def evaluate(
    model: GPT, questions: list[Question], world: World, stop: Callable[[], bool] = lambda: False
) -> Score:
    """The score over all questions, the same on any number of ranks.

    Raises Stopped where `stop`, called between passes, says so, Failed where a loss is no number.
    """
    return choice.score(questions, choice.answer(model, questions, world, stop))


def published(n: int) -> str:
    """What OpenAI's checkpoints reach, to be printed beside a score of n questions.

    Another number format moves some ten answers: llm.c's dev/data/hellaswag.py names 0.2955 and
    0.4893 for the first and the last.
    """
    line = "acc_norm of OpenAI's GPT-2 on all 10,042 questions: "
    line += ", ".join(f"{size.hellaswag} ({size.name})" for size in SIZES.values())
    line += "; guessing: 0.25"
    return line if n == ALL_ROWS else f"{line}. These are {n:,} questions: not to be compared"


def main(
    checkpoint: Annotated[str, tyro.conf.Positional] = "",
    data: str = "",
    limit: int = 0,
    dtype: ReadDtype = "auto",
    details: str = "",
    compare: tuple[Path, Path] | None = None,
) -> None:
    """Scores a checkpoint on HellaSwag.

    Args:
        checkpoint: A checkpoint folder, a run folder, or hf:DIR.
        data: JSONL file of questions; downloaded if not given.
        limit: Only the first questions; 0 for all.
        dtype: Number format of the matrix products; int8: of the matrices, on a CPU.
        details: File to write every question's answer to.
        compare: Two such files: lists the questions that they answer differently.
    """
    if compare:
        print(choice.compare(*compare))
        return
    if not checkpoint:
        raise BadInput("which checkpoint? python -m eval.hellaswag CHECKPOINT")
    if limit < 0:
        raise BadInput(f"--limit {limit}: expected 0 (all) or more")
    world = init_distributed()
    choice.require_folder(checkpoint, world)
    path = Path(data) if data else world.broadcast_from_rank0(fetch)
    with world.fail_together():
        questions = read_questions(path, limit)
    with choice.open_model(checkpoint, dtype, world) as model:
        answers = choice.answer(model, questions, world)
    if details:
        world.broadcast_from_rank0(choice.write_details, Path(details), questions, answers)
    world.print0(published(len(questions)))
    world.print0(choice.as_json(choice.score(questions, answers)))
    world.destroy()


if __name__ == "__main__":
    run_command(lambda: flags.parse(main))
