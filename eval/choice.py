"""Multiple choice: which one does the model find likeliest? Shared by all such tests.

    questions = read_rows(path, hellaswag.question)         # a JSONL file, one question a line
    answers = answer(model, questions, world)               # the losses of every choice
    print(score(questions, answers))

Three ways of comparing choices, each by the sum of the losses of a choice's tokens:
    acc        as it is
    acc_norm   divided by the choice's length: in tokens for HellaSwag, as build-nanogpt and llm.c
               do; in characters everywhere else, as lm-evaluation-harness does
    acc_bytes  divided by its length in bytes (of an ASCII text: its characters), as the harness
"""

import json
import lzma
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from eval.likelihood import Request, negative_loglikelihoods
from eval.loss import require_numbers
from launch.config import ReadDtype
from launch.errors import BadInput
from launch.files import atomic_write
from launch.world import World, autocast, choose_dtype
from model.checkpoint import characters_of, load_resolved, resolve
from model.gpt2 import GPT
from model.reading import ready_to_read

Row = TypeVar("Row")


@dataclass(frozen=True)
class Question:
    """One question, tokenised. Its choices are the requests' continuations, in their order."""

    requests: list[Request]  # one for all choices, or one for each where contexts differ
    norm_lengths: list[int]  # what acc_norm divides each choice's loss by: tokens, or characters
    byte_lengths: list[int]
    label: int  # the right choice

    @property
    def token_lengths(self) -> list[int]:
        """Tokens of each choice."""
        return [len(tokens) for request in self.requests for tokens in request.continuations]


class Answer(NamedTuple):
    """What the model makes of a question: the choice taken by each way of comparing."""

    losses: list[float]  # nats, summed over the choice's tokens
    acc: int
    acc_norm: int
    acc_bytes: int


@dataclass(frozen=True)
class Score:
    """Shares of questions answered rightly, by three ways of comparing choices."""

    n: int
    acc: float
    acc_norm: float
    acc_stderr: float
    acc_bytes: float


def answer(
    model: GPT, questions: list[Question], world: World, stop: Callable[[], bool] = lambda: False
) -> list[Answer]:
    """The model's answers, on every rank the same. Stopped where `stop` says so between passes.

    Raises Failed where a loss is no number.
    """
    requests = [request for question in questions for request in question.requests]
    losses, _greedy = negative_loglikelihoods(model, requests, world, stop)
    require_numbers(losses)
    answers, start = [], 0
    for question in questions:
        sums = losses[start : start + len(question.byte_lengths)]
        start += len(sums)
        answers.append(Answer(
            sums,
            acc=sums.index(min(sums)),
            acc_norm=_likeliest(sums, question.norm_lengths),
            acc_bytes=_likeliest(sums, question.byte_lengths),
        ))
    return answers


def _likeliest(losses: list[float], lengths: list[int]) -> int:
    """The choice of the smallest loss for its length; of equals the first."""
    values = [loss / length for loss, length in zip(losses, lengths, strict=True)]
    return values.index(min(values))


def score(questions: list[Question], answers: list[Answer]) -> Score:
    """Shares of right answers; acc_stderr is the standard error of acc."""
    n = len(questions)
    right = dict.fromkeys(WAYS, 0)
    for question, given in zip(questions, answers, strict=True):
        for way in WAYS:
            right[way] += getattr(given, way) == question.label
    acc = right["acc"] / n
    stderr = math.sqrt(acc * (1 - acc) / max(1, n - 1))
    return Score(n, acc, right["acc_norm"] / n, stderr, right["acc_bytes"] / n)


WAYS = ("acc", "acc_norm", "acc_bytes")


def read_rows(path: Path, read: Callable[[dict], Row], limit: int = 0) -> list[Row]:
    """What `read` makes of the rows of a JSONL file (or .jsonl.xz); the first `limit` if not 0.

    `read` raises KeyError for a missing field and ValueError or TypeError for a wrong one. Raises
    BadInput with the line's number where a row can't be used, and where there is none.
    """
    rows: list[Row] = []
    try:
        with _open_text(path) as file:
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


def _open_text(path: Path) -> TextIO:
    """A text file, packed by xz or not, with a byte order mark or without."""
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


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
    """The number of the right choice, as a number or its digits. Raises ValueError."""
    if isinstance(value, bool) or str(value) not in map(str, range(options)):
        raise ValueError(f"label {value!r}: expected 0 to {options - 1}")
    return int(value)


@contextmanager
def open_model(checkpoint: str, dtype: ReadDtype, world: World) -> Iterator[GPT]:
    """The model of a checkpoint, ready for evaluation inside this context.

    bf16 and fp16 are what training computes with: matrices in that format, the rest in fp32. int8
    is of the matrices alone, on CPUs. Raises BadInput for one that reads characters: every question
    is asked in GPT-2's tokens.
    """
    chosen = choose_dtype(dtype, world.device)
    source = world.broadcast_from_rank0(resolve, checkpoint)
    with world.fail_together():
        if characters_of(source):
            raise BadInput(f"{source} reads characters (--data.vocab char), and this evaluation "
                           "asks in GPT-2's tokens: its run's validation loss and eval.sample "
                           "judge it")
        model = ready_to_read(load_resolved(source), dtype, world.device)
    with autocast(world.device, chosen):
        yield model


def require_folder(checkpoint: str, world: World) -> None:
    """Raises BadInput for what is no folder, and so no checkpoint: before anything is downloaded
    for it. open_model() looks into it."""
    if not checkpoint.startswith("hf:") and not Path(checkpoint).is_dir():
        world.broadcast_from_rank0(resolve, checkpoint)


def write_details(path: Path, questions: list[Question], answers: list[Answer]) -> None:
    """Every question's answer, a JSON object a line."""
    lines = []
    for row, (question, given) in enumerate(zip(questions, answers, strict=True)):
        details = {"row": row, "label": question.label, "tokens": question.token_lengths,
                   "bytes": question.byte_lengths}
        lines.append(json.dumps(details | given._asdict(), allow_nan=False) + "\n")
    try:
        atomic_write(path, "".join(lines))
    except OSError as error:
        raise BadInput(f"can't write {path}: {error.strerror}") from None


def compare(first: Path, second: Path) -> str:
    """What two files of details disagree about: a line per question, then the counts.

    Raises BadInput where they are not of the same questions.
    """
    fields = ("row", "label", "tokens", "bytes")

    def read(row: dict) -> dict:
        return {key: row[key] for key in (*fields, *WAYS)}

    rows_a, rows_b = read_rows(first, read), read_rows(second, read)
    if [_pick(row, fields) for row in rows_a] != [_pick(row, fields) for row in rows_b]:
        raise BadInput(f"{first} and {second} are not of the same questions: rows, labels, tokens "
                       "and bytes have to agree")
    pairs = list(zip(rows_a, rows_b, strict=True))
    lines = []
    for a, b in pairs:
        changes = [f"{way} {a[way]} -> {b[way]}" for way in WAYS if a[way] != b[way]]
        if changes:
            lines.append(f"row {a['row']}, label {a['label']}: {', '.join(changes)}")
    for way in WAYS:
        differ = [(a, b) for a, b in pairs if a[way] != b[way]]
        right_a = sum(a[way] == a["label"] for a, _ in differ)
        right_b = sum(b[way] == b["label"] for _, b in differ)
        lines.append(f"{way}: {len(differ)} of {len(pairs)} answers differ; right in {first} alone "
                     f"{right_a}, in {second} alone {right_b}")
    return "\n".join(lines)


def _pick(row: dict, fields: Iterable[str]) -> list:
    return [row[field] for field in fields]


def as_json(result: Any) -> str:
    """The last line of an evaluation: a dataclass as JSON, shares to six digits."""
    return json.dumps(_rounded(asdict(result)), allow_nan=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, 6) if isinstance(value, float) else value
