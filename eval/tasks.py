"""More evaluations of a checkpoint, each on a local file; the last line is JSON.

    python -m eval.tasks lambada CHECKPOINT --data lambada.jsonl     # n acc acc_stderr ppl
    python -m eval.tasks piqa CHECKPOINT --data piqa.jsonl  # n acc acc_norm acc_stderr acc_bytes
    python -m eval.tasks arc_easy CHECKPOINT --data arc_easy.jsonl
    python -m eval.tasks winogrande CHECKPOINT --data winogrande.jsonl
    python -m eval.tasks bits_per_byte CHECKPOINT --data any.txt     # tokens bytes bits_per_byte

A row of JSONL is
    lambada      {"text": ...}, whose last word is asked, or {"context": ..., "continuation": ...}
    piqa         {"query": ..., "choices": [...], "gold": 0}
    arc_easy     {"query": ..., "choices": [...], "gold": 0}
    winogrande   {"context_options": [...], "continuation": ..., "gold": 0}
Prompts are those of lm-evaluation-harness without examples: "Question: QUERY\\nAnswer:", a space, a
choice (piqa, arc_easy); OPTION, a space, the continuation (winogrande, partial scoring).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data.tokenizer import encode
from eval import choice
from eval.choice import Question
from eval.likelihood import Request, negative_loglikelihoods, rolling_requests
from launch.errors import BadInput, one_line_errors
from launch.world import Dtype, World, start_world
from model.gpt2 import GPT

Task = Literal["lambada", "piqa", "arc_easy", "winogrande", "bits_per_byte"]


@dataclass(frozen=True)
class Cloze:
    """LAMBADA: the share of last words guessed right, and the perplexity of a last word."""

    n: int
    acc: float
    acc_stderr: float
    ppl: float


@dataclass(frozen=True)
class Compression:
    """What a text costs: comparable between tokenizers, as a loss per token is not."""

    tokens: int
    bytes: int
    bits_per_byte: float


def query(row: dict) -> Question:
    """A row of PIQA or ARC: a question and its possible answers."""
    asked, choices = choice.text(row["query"], "query"), choice.texts(row["choices"], "choices")
    bare = asked.removeprefix("Question: ").removesuffix("Answer:").strip()
    answers = [option.strip() for option in choices]
    context = encode(f"Question: {bare}\nAnswer:")
    request = Request(context, [encode(" " + answer) for answer in answers])
    sizes = [len(answer.encode()) for answer in answers]
    return Question([request], sizes, choice.label(row["gold"], len(choices)))


def schema(row: dict) -> Question:
    """A row of Winogrande: the same continuation after two contexts (arXiv 1806.02847)."""
    contexts = choice.texts(row["context_options"], "context_options")
    rest = choice.text(row["continuation"], "continuation").strip()
    requests = [
        Request(encode(context.strip()), [encode(" " + rest)]) for context in contexts
    ]
    sizes = [len(rest.encode())] * len(contexts)
    return Question(requests, sizes, choice.label(row["gold"], len(contexts)))


def last_word(row: dict) -> Request:
    """A row of LAMBADA (arXiv 1606.06031), in OpenAI's version: a passage and its last word."""
    if "text" in row:
        context, space, word = choice.text(row["text"], "text").strip().rpartition(" ")
        if not space:
            raise ValueError("text is a single word: expected a passage")
    else:
        context = choice.text(row["context"], "context").strip()
        word = choice.text(row["continuation"], "continuation").strip()
    return Request(encode(context), [encode(" " + word)])


def cloze(model: GPT, requests: list[Request], world: World) -> Cloze:
    """How often greedy decoding gives the continuation, and exp of its mean loss."""
    losses, is_greedy = negative_loglikelihoods(model, requests, world)
    n = len(requests)
    acc = sum(is_greedy) / n
    stderr = math.sqrt(acc * (1 - acc) / max(1, n - 1))
    return Cloze(n, acc, stderr, math.exp(min(700.0, sum(losses) / n)))


def compression(model: GPT, text: str, world: World) -> Compression:
    """Bits a byte of UTF-8, each token predicted once from up to n_ctx tokens before it."""
    tokens, size = encode(text), len(text.encode())
    requests = rolling_requests(tokens, model.config.n_ctx)
    losses, _ = negative_loglikelihoods(model, requests, world)
    return Compression(len(tokens), size, sum(losses) / math.log(2) / size)


def read_text(path: Path) -> str:
    """A text file. Raises BadInput where it is none."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"can't read {path}: {error}") from None
    if not text:
        raise BadInput(f"{path} is empty: expected a text")
    return text


def read(task: Task, path: Path, limit: int) -> Any:
    """What a task asks: a text, requests, or questions. Raises BadInput."""
    if task == "bits_per_byte":
        return read_text(path)
    rows = {"lambada": last_word, "piqa": query, "arc_easy": query, "winogrande": schema}
    return choice.read_rows(path, rows[task], limit)


def judge(task: Task, model: GPT, asked: Any, world: World) -> Cloze | Compression | choice.Score:
    """The model's result; `asked` is what read() gave."""
    if task == "bits_per_byte":
        return compression(model, asked, world)
    if task == "lambada":
        return cloze(model, asked, world)
    return choice.score(asked, choice.answer(model, asked, world))


def main(
    task: Annotated[Task, tyro.conf.Positional],
    checkpoint: Annotated[str, tyro.conf.Positional],
    data: Path,
    limit: int = 0,
    dtype: Dtype = "auto",
) -> None:
    """Judges a checkpoint by one of the field's small evaluations.

    Args:
        task: Which evaluation.
        checkpoint: A checkpoint folder, a run folder, or hf:DIR.
        data: The file: JSONL (or .jsonl.xz), any text for bits_per_byte.
        limit: Only the first rows; 0 for all.
        dtype: Number format of the matrix products.
    """
    if limit < 0:
        raise BadInput(f"--limit {limit}: expected 0 (all) or more")
    world = start_world()
    asked = world.together(lambda: read(task, data, limit))
    with choice.open_model(checkpoint, dtype, world) as model:
        world.print(choice.as_json(judge(task, model, asked, world)))
    world.close()


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main)
