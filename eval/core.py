"""CORE: DCLM's score over 22 tasks, by which the field says that GPT-2 is reached (2406.11794).

    python -m eval.core runs/gpt2-124m                       # fetches the tasks once: 162 MB
    python -m eval.core hf:gpt2 --data eval_bundle --details gpt2.jsonl
    torchrun --nproc_per_node=8 -m eval.core runs/gpt2-124m  # the same figures, on 8 GPUs

The accuracy of each task is centered, (accuracy - chance) / (1 - chance), so that guessing is 0
and knowing all is 1; CORE is the mean over tasks. The last line is JSON: n tasks core accuracy
centered.

Prompts and rules are nanochat's (nanochat/core_eval.py and scripts/base_eval.py), and so is the
bundle of tasks. A prompt is <|endoftext|>, a task's number of other rows as examples with their
right answers, and the row itself; where it exceeds the model's context, its end is read.
    multiple_choice     the choice of the lowest mean loss a token; what is judged is what follows
                        the beginning that the prompts of all choices share
    schema              the context after which the common end of all prompts has the lowest mean
    language_modeling   right where greedy decoding gives the whole continuation
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data.tokenizer import EOT, encode
from eval import choice
from eval.core_bundle import Row, Task, fetch, read_rows, read_tasks
from eval.likelihood import Request, negative_loglikelihoods
from eval.loss import require_numbers
from eval.published import SIZES
from launch import flags
from launch.config import ReadDtype
from launch.errors import BadInput, run_command
from launch.files import atomic_write
from launch.world import World, init_distributed
from model.gpt2 import GPT

# nanochat's seeds of Python's random: of the order of a task's rows, and, plus a row's number in
# it, of its examples.
ORDER_SEED, EXAMPLES_SEED = 1337, 1234
ALL_TASKS = 22
ROWS_AT_ONCE = 1024  # tokenised and scored together: bounds the memory


@dataclass(frozen=True)
class Answer:
    """What the model makes of a row."""

    right: bool
    losses: list[float]  # of each option: the mean over its judged tokens, in nats


@dataclass(frozen=True)
class Core:
    """The score, and what it is the mean of."""

    n: int  # rows of all tasks
    tasks: int
    core: float
    accuracy: dict[str, float]  # by task
    centered: dict[str, float]


def evaluate(
    model: GPT, tasks: list[Task], world: World, limit: int = 0
) -> tuple[Core, dict[str, list[Answer]]]:
    """The score, and every task's answers in the order of shuffled(); prints a line a task.

    limit: only so many rows of each task; 0 for all. The same on any number of ranks. Raises
    BadInput where a task's rows can't be used, Failed where a loss is no number.
    """
    answers: dict[str, list[Answer]] = {}
    accuracy: dict[str, float] = {}
    centered: dict[str, float] = {}
    for task in tasks:
        rows = world.broadcast_from_rank0(shuffled, task, limit)
        given = answer(model, task, rows, world)
        share = sum(a.right for a in given) / len(given)
        answers[task.label] = given
        accuracy[task.label] = share
        centered[task.label] = (share - task.chance) / (1 - task.chance)
        world.print0(f"{task.label:34} {len(rows):6,} rows  accuracy {share:.4f}  "
                     f"centered {centered[task.label]:7.4f}")
    n = sum(len(given) for given in answers.values())
    core = sum(centered.values()) / len(centered)
    return Core(n, len(tasks), core, accuracy, centered), answers


def shuffled(task: Task, limit: int = 0) -> list[Row]:
    """A task's rows in nanochat's order, the first `limit` if not 0: examples are of them, too."""
    rows = read_rows(task)
    random.Random(ORDER_SEED).shuffle(rows)
    if limit:
        rows = rows[:limit]
    if len(rows) <= task.examples:
        raise BadInput(f"{task.label} has {len(rows)} rows, and before each stand {task.examples} "
                       f"others as examples: {task.examples + 1} are the fewest (--limit)")
    return rows


def answer(model: GPT, task: Task, rows: list[Row], world: World) -> list[Answer]:
    """The model's answer to every row, on every rank the same."""
    answers: list[Answer] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        numbers = range(start, min(start + ROWS_AT_ONCE, len(rows)))
        judged = [list(judged_parts(task, rows, number, model.config.n_ctx)) for number in numbers]
        requests = [request for parts in judged for request in as_requests(parts)]
        sums, greedy = negative_loglikelihoods(model, requests, world)
        require_numbers(sums)
        place = 0
        for number, parts in zip(numbers, judged, strict=True):
            losses = [sums[place + i] / len(part) for i, (_context, part) in enumerate(parts)]
            if task.kind == "language_modeling":
                right = greedy[place] == 1
            else:
                right = losses.index(min(losses)) == rows[number].gold
            answers.append(Answer(right, losses))
            place += len(parts)
    return answers


def judged_parts(
    task: Task, rows: list[Row], number: int, n_ctx: int
) -> Iterator[tuple[list[int], list[int]]]:
    """For each option of a row, the tokens before what is judged, and what is judged.

    At least one token is judged: where one prompt is the beginning of another, nothing would be
    left, and the reference divides by zero.
    """
    examples = [rows[other] for other in example_rows(task.examples, number, len(rows))]
    before = "".join(_prompt(task, example, example.gold) + "\n\n" for example in examples)
    row = rows[number]
    options = range(len(row.options))
    prompts = [[EOT, *encode(before + _prompt(task, row, option))] for option in options]
    if task.kind == "language_modeling":
        question = before + row.options[0][0] + task.delimiter
        start = common_length(prompts + [[EOT, *encode(question.strip())]])
        judged = [len(prompt) - start for prompt in prompts]
    elif task.kind == "multiple_choice":
        start = common_length(prompts)
        judged = [len(prompt) - start for prompt in prompts]
    else:
        judged = [common_length([prompt[::-1] for prompt in prompts])] * len(prompts)
    if min(judged) == 0:
        judged = [count + 1 for count in judged]
    for prompt, count in zip(prompts, judged, strict=True):
        read = prompt[-n_ctx:]
        count = min(count, len(read) - 1)
        yield read[:-count], read[-count:]


def _prompt(task: Task, row: Row, option: int) -> str:
    context, continuation = row.options[option]
    return context + task.delimiter + continuation


def example_rows(count: int, number: int, rows: int) -> list[int]:
    """Which rows stand before row `number`: nanochat draws from the list of all others."""
    drawn = random.Random(EXAMPLES_SEED + number).sample(range(rows - 1), count)
    return [other + (other >= number) for other in drawn]


def common_length(sequences: list[list[int]]) -> int:
    """How many tokens all of them begin with."""
    for length, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return length
    return min(len(tokens) for tokens in sequences)


def as_requests(parts: list[tuple[list[int], list[int]]]) -> list[Request]:
    """One for all options with the same context, which then is computed once."""
    requests: list[Request] = []
    for context, judged in parts:
        if requests and requests[-1].context == context:
            requests[-1].continuations.append(judged)
        else:
            requests.append(Request(context, [judged]))
    return requests


def published(core: Core, limit: int) -> str:
    """What OpenAI's checkpoints reach, to be printed beside a score.

    As nanochat publishes it. Its code of June 2026 gave 0.1084 for the first (its issue 772).
    """
    line = "CORE of OpenAI's GPT-2: "
    line += ", ".join(f"{size.core} ({size.name})" for size in SIZES.values())
    if core.tasks == ALL_TASKS and not limit:
        return line
    return f"{line}. This is over {core.tasks} tasks, {core.n:,} rows: not to be compared"


def write_details(path: Path, answers: dict[str, list[Answer]]) -> None:
    """Every row's answer, a JSON object a line; rows are numbered in the order of shuffled()."""
    lines = []
    for label, given in answers.items():
        for number, one in enumerate(given):
            details = {"task": label, "row": number, "right": one.right, "losses": one.losses}
            lines.append(json.dumps(details, allow_nan=False) + "\n")
    try:
        atomic_write(path, "".join(lines))
    except OSError as error:
        raise BadInput(f"can't write {path}: {error.strerror}") from None


def main(
    checkpoint: Annotated[str, tyro.conf.Positional],
    data: str = "",
    limit: int = 0,
    dtype: ReadDtype = "auto",
    details: str = "",
) -> None:
    """Scores a checkpoint on CORE's 22 tasks.

    Args:
        checkpoint: A checkpoint folder, a run folder, or hf:DIR.
        data: Folder of tasks, nanochat's eval_bundle; downloaded if not given.
        limit: Only so many rows of each task; 0 for all.
        dtype: Number format of the matrix products; int8: of the matrices, on a CPU.
        details: File to write every row's answer to.
    """
    if limit < 0:
        raise BadInput(f"--limit {limit}: expected 0 (all) or more")
    world = init_distributed()
    choice.require_folder(checkpoint, world)
    folder = Path(data) if data else world.broadcast_from_rank0(fetch)
    tasks = world.broadcast_from_rank0(read_tasks, folder)
    with choice.open_model(checkpoint, dtype, world) as model:
        core, answers = evaluate(model, tasks, world, limit)
    if details:
        world.broadcast_from_rank0(write_details, Path(details), answers)
    world.print0(published(core, limit))
    world.print0(choice.as_json(core))
    world.destroy()


if __name__ == "__main__":
    run_command(lambda: flags.parse(main))
