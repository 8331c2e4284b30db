"""Multiple choice: which option does the model find likeliest? Shared by all such tests.

    questions = read_rows(path, hellaswag.question)         # a JSONL file, one question a line
    answers = answer(model, questions, world)               # the losses of every option
    print(score(questions, answers))

Three ways of comparing options: by the sum of the token losses (`acc`), by their mean a token
(`acc_norm`, as build-nanogpt and llm.c), by the sum per byte of the option's text (`acc_bytes`, as
lm-evaluation-harness, which counts characters in its acc_norm and bytes in its acc_bytes).
"""

import json
import lzma
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from eval.likelihood import Fork, likelihoods
from launch.errors import BadInput
from launch.files import atomic_write
from launch.world import DTYPES, Dtype, World, autocast, choose_dtype
from model.checkpoint import load_resolved, resolve
from model.generate import store_in
from model.gpt2 import GPT

Row = TypeVar("Row")


@dataclass(frozen=True)
class Question:
    """One question, tokenised. Options are the forks' endings, one after the other."""

    forks: list[Fork]  # one for all options, or one for each where contexts differ
    sizes: list[int]  # bytes of each option's text
    label: int  # the right option

    @property
    def lengths(self) -> list[int]:
        """Tokens of each option."""
        return [len(ending) for fork in self.forks for ending in fork.endings]


class Answer(NamedTuple):
    """What the model makes of a question: the option chosen by each way of comparing."""

    losses: list[float]  # nats, summed over the option's tokens
    acc: int
    acc_norm: int
    acc_bytes: int


@dataclass(frozen=True)
class Score:
    """Shares of questions answered rightly, by three ways of comparing options."""

    n: int
    acc: float
    acc_norm: float
    acc_stderr: float
    acc_bytes: float


def answer(
    model: GPT, questions: list[Question], world: World, stop: Callable[[], bool] = lambda: False
) -> list[Answer]:
    """The model's answers, on every rank the same. Stopped where `stop` says so between passes."""
    losses, _ = likelihoods(model, [fork for q in questions for fork in q.forks], world, stop)
    answers, start = [], 0
    for question in questions:
        own = losses[start : start + len(question.sizes)]
        start += len(own)
        mean = [loss / n for loss, n in zip(own, question.lengths, strict=True)]
        per_byte = [loss / n for loss, n in zip(own, question.sizes, strict=True)]
        best = [values.index(min(values)) for values in (own, mean, per_byte)]
        answers.append(Answer(own, *best))
    return answers


def score(questions: list[Question], answers: list[Answer]) -> Score:
    """Shares of right answers; acc_stderr is the standard error of acc."""
    n = len(questions)
    pairs = list(zip(questions, answers, strict=True))
    acc, acc_norm, acc_bytes = (
        sum(getattr(a, way) == q.label for q, a in pairs) / n for way in WAYS
    )
    return Score(n, acc, acc_norm, math.sqrt(acc * (1 - acc) / max(1, n - 1)), acc_bytes)


WAYS = ("acc", "acc_norm", "acc_bytes")


def read_rows(path: Path, read: Callable[[dict], Row], limit: int = 0) -> list[Row]:
    """What `read` makes of the rows of a JSONL file (or .jsonl.xz); the first `limit` if not 0.

    `read` raises KeyError for a missing field and ValueError or TypeError for a wrong one. Raises
    BadInput with the line's number where a row can't be used, and where there is none.
    """
    rows: list[Row] = []
    try:
        with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
            for number, line in enumerate(file, 1):
                if limit and len(rows) == limit:
                    break
                if line.strip():
                    rows.append(_row(line, read, f"{path}, line {number}"))
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise BadInput(f"can't read {path}: {error}") from None
    if not rows:
        raise BadInput(f"{path} is empty: expected a JSON object a line")
    return rows


def _row(line: str, read: Callable[[dict], Row], where: str) -> Row:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where}: no JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{where}: no JSON object, but {line.strip()[:40]}")
    try:
        return read(content)
    except KeyError as error:
        have = ", ".join(content) or "nothing"
        raise BadInput(f"{where}: there is no {error.args[0]!r}, only {have}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{where}: {error}") from None


def texts(value: Any, name: str) -> list[str]:
    """A field that holds at least two texts, none empty. Raises ValueError."""
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError(f"{name} is no list of texts that aren't empty")
    if len(value) < 2:
        raise ValueError(f"{len(value)} {name}: expected at least 2 to choose from")
    return value


def text(value: Any, name: str) -> str:
    """A field that holds a text, not empty. Raises ValueError."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is no text, or empty")
    return value


def label(value: Any, options: int) -> int:
    """The number of the right option, as a number or its digits. Raises ValueError."""
    if isinstance(value, bool) or str(value) not in map(str, range(options)):
        raise ValueError(f"label {value!r}: expected 0 to {options - 1}")
    return int(value)


@contextmanager
def open_model(checkpoint: str, dtype: Dtype, world: World) -> Iterator[GPT]:
    """The model of a checkpoint, ready to be asked inside this context.

    bf16 and fp16 are what training computes with: matrices in that format, the rest in fp32.
    """
    chosen = choose_dtype(dtype, world.device)
    source = world.broadcast_from_rank0(resolve, checkpoint)
    with world.fail_together():
        model = load_resolved(source)
    model.to(torch.float64 if chosen == "fp64" else torch.float32)
    if chosen in ("bf16", "fp16"):
        store_in(model, DTYPES[chosen])  # cast once, and not in every pass
    with autocast(world.device, chosen):
        yield model.to(world.device).eval()


def write_details(path: Path, questions: list[Question], answers: list[Answer]) -> None:
    """Every question's answer, a JSON object a line."""
    rows = [
        {"row": row, "label": q.label, "tokens": q.lengths, "bytes": q.sizes, **a._asdict()}
        for row, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]
    try:
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise BadInput(f"can't write {path}: {error.strerror}") from None


def compare(first: Path, second: Path) -> str:
    """What two files of details disagree about: a line per question, then the counts.

    Raises BadInput where they are not of the same questions.
    """
    fields = ("row", "label", "tokens", "bytes")

    def read(row: dict) -> dict:
        return {key: row[key] for key in (*fields, *WAYS)}

    a, b = read_rows(first, read), read_rows(second, read)
    if [[x[f] for f in fields] for x in a] != [[y[f] for f in fields] for y in b]:
        raise BadInput(f"{first} and {second} are not of the same questions: rows, labels, tokens "
                       "and bytes have to agree")
    lines = []
    for x, y in zip(a, b, strict=True):
        changes = [f"{way} {x[way]} -> {y[way]}" for way in WAYS if x[way] != y[way]]
        if changes:
            lines.append(f"row {x['row']}, label {x['label']}: {', '.join(changes)}")
    for way in WAYS:
        differ = [(x, y) for x, y in zip(a, b, strict=True) if x[way] != y[way]]
        lost = sum(x[way] == x["label"] for x, _ in differ)
        won = sum(y[way] == y["label"] for _, y in differ)
        lines.append(f"{way}: {len(differ)} of {len(a)} answers differ; right in {first} alone "
                     f"{lost}, in {second} alone {won}")
    return "\n".join(lines)


def as_json(result: Any) -> str:
    """The last line of an evaluation: a dataclass as JSON, shares to six digits."""
    return json.dumps({key: round(value, 6) for key, value in asdict(result).items()})
