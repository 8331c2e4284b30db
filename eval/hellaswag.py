"""HellaSwag: which of four endings does the model find likeliest? (arXiv 1905.07830)

    python -m eval.hellaswag runs/gpt2-124m      # the last line is JSON

Completion style, as build-nanogpt and llm.c score it: context + " " + ending; the sum of the
ending's token losses decides `acc`, their mean `acc_norm`, the sum per byte of the ending
`acc_bytes`. OpenAI's checkpoints reach an acc_norm of 0.294463 (124M), 0.375224 (350M), 0.431986
(774M) and 0.488946 (1558M) on the 10,042 validation rows (llm.c, dev/vislog.ipynb); guessing 0.25.
"""

import json
import lzma
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro

from data.tokenizer import encode
from launch.errors import BadInput, one_line_errors
from launch.files import download
from launch.world import Dtype, World, autocast, choose_dtype, start_world
from model.checkpoint import load_model
from model.gpt2 import GPT

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE = 12_246_618  # bytes
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
DEFAULT_PATH = Path("hellaswag/hellaswag_val.jsonl")
ROWS_AT_ONCE = 64  # sequences in a forward pass: sixteen questions


@dataclass(frozen=True)
class Question:
    """One row, tokenised."""

    context: list[int]
    endings: list[list[int]]  # four
    ending_bytes: list[int]
    label: int  # the right ending


@dataclass(frozen=True)
class Score:
    """Shares of questions answered rightly, by three ways of comparing endings."""

    n: int
    acc: float
    acc_norm: float
    acc_stderr: float
    acc_bytes: float


def fetch() -> Path:
    """The validation file, downloaded once. Raises Failed where that can't be done."""
    if not DEFAULT_PATH.exists():
        download(URL, DEFAULT_PATH, SHA256, SIZE)
    return DEFAULT_PATH


def read_questions(path: Path, limit: int = 0) -> list[Question]:
    """The rows of a JSONL file (or .jsonl.xz); the first `limit` if that isn't 0."""
    questions: list[Question] = []
    try:
        with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
            for number, line in enumerate(file, 1):
                if limit and len(questions) == limit:
                    break
                if not line.strip():
                    continue
                questions.append(_question(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise BadInput(f"can't read HellaSwag's rows from {path}: {error}") from None
    if not questions:
        raise BadInput(f"{path} holds no HellaSwag row")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
        context, endings, label = encode(row["ctx"]), row["endings"], int(row["label"])
        tokens = [encode(" " + ending) for ending in endings]
        sizes = [len(ending.encode()) for ending in endings]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{where}: no HellaSwag row with ctx, endings, label: {error!r}") from None
    if len(endings) != 4 or not all(sizes) or label not in range(4):
        raise BadInput(f"{where}: {len(endings)} endings, label {label}; expected 4 that aren't "
                       "empty, and 0 to 3")
    return Question(context, tokens, sizes, label)


@torch.no_grad()
def ending_losses(model: GPT, questions: list[Question], device: torch.device) -> torch.Tensor:
    """(len(questions), 4) summed losses, in nats, of each ending after its context."""
    n_ctx = model.config.n_ctx
    rows: list[tuple[list[int], int]] = []  # tokens, and how many of them are the ending
    for question in questions:
        for ending in question.endings:
            tokens = (question.context + ending)[-(n_ctx + 1) :]  # as much context as fits
            rows.append((tokens, min(len(ending), len(tokens) - 1)))
    longest = max(len(tokens) for tokens, _ in rows) - 1
    idx = torch.zeros(len(rows), longest, dtype=torch.long)
    counted = torch.zeros(len(rows), longest, dtype=torch.bool)
    targets = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, (tokens, length) in enumerate(rows):
        end = len(tokens) - 1
        idx[i, :end], targets[i, :end] = torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])
        counted[i, end - length : end] = True
    idx, counted, targets = idx.to(device), counted.to(device), targets.to(device)
    # Padding stands after the ending, and attention looks back only, so it changes nothing. The
    # head, most of the work of a small model, runs on the endings' positions alone.
    logits = model.logits(model.hidden(idx)[counted])  # (endings' tokens, V)
    exact = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(logits.to(exact), targets[counted], reduction="none")
    row_of = counted.nonzero()[:, 0]
    sums = torch.zeros(len(rows), dtype=exact, device=device).index_add_(0, row_of, losses)
    return sums.view(-1, 4)


def evaluate(model: GPT, questions: list[Question], world: World) -> Score:
    """The score over all questions, the same on any number of ranks."""
    # Like lengths side by side, so that little is padding.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].context))
    right = [0, 0, 0]  # by sum, mean, sum per byte
    mine = [questions[i] for i in order[world.rank :: world.size]]
    for start in range(0, len(mine), ROWS_AT_ONCE // 4):
        batch = mine[start : start + ROWS_AT_ONCE // 4]
        sums = ending_losses(model, batch, world.device).double().cpu()
        tokens = torch.tensor([[len(e) for e in q.endings] for q in batch])
        sizes = torch.tensor([q.ending_bytes for q in batch])
        labels = torch.tensor([q.label for q in batch])
        for i, losses in enumerate((sums, sums / tokens, sums / sizes)):
            right[i] += int((losses.argmin(1) == labels).sum())
    n = len(questions)
    acc, acc_norm, acc_bytes = (count / n for count in world.sum(*right))
    stderr = math.sqrt(acc * (1 - acc) / max(1, n - 1))
    return Score(n, acc, acc_norm, stderr, acc_bytes)


def main(
    checkpoint: Annotated[str, tyro.conf.Positional],
    data: str = "",
    limit: int = 0,
    dtype: Dtype = "auto",
) -> None:
    """Scores a checkpoint on HellaSwag.

    Args:
        checkpoint: A checkpoint folder, a run folder, or hf:DIR.
        data: JSONL file of questions; downloaded if not given.
        limit: Only the first questions; 0 for all.
        dtype: Number format of the matrix products.
    """
    if limit < 0:
        raise BadInput(f"--limit {limit}: expected 0 (all) or more")
    world = start_world()
    questions = read_questions(Path(data) if data else world.on_main(fetch), limit)
    model = load_model(checkpoint).to(world.device).eval()
    chosen = choose_dtype(dtype, world.device)
    if chosen == "fp64":
        model = model.double()
    with autocast(world.device, chosen):
        score = evaluate(model, questions, world)
    world.print(json.dumps({key: round(value, 6) for key, value in vars(score).items()}))
    world.close()


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main)
