"""More evaluations of a checkpoint, each on a local file; the last line is JSON.

    python -m eval.tasks lambada CHECKPOINT --data lambada.jsonl     # n acc acc_stderr ppl
    python -m eval.tasks piqa CHECKPOINT --data piqa.jsonl  # n acc acc_norm acc_stderr acc_bytes
    python -m eval.tasks arc_easy CHECKPOINT --data arc_easy.jsonl
    python -m eval.tasks winogrande CHECKPOINT --data winogrande.jsonl
    python -m eval.tasks bits_per_byte CHECKPOINT --data any.txt     # tokens bytes bits_per_byte

A row of JSONL is
    lambada      {"text": ...}, with its last word; or {"context": ..., "continuation": ...}
    piqa         {"query": ..., "choices": [...], "gold": 0}
    arc_easy     {"query": ..., "choices": [...], "gold": 0}
    winogrande   {"context_options": [...], "continuation": ..., "gold": 0}
Prompts are those of lm-evaluation-harness without examples: "Question: QUERY\\nAnswer:", a space, a
choice (piqa, arc_easy); OPTION, a space, the continuation (winogrande, partial scoring). So are the
figures: acc_norm divides a choice's loss by its characters, acc_bytes by its bytes, which for ASCII
are as many (in winogrande both are acc, for the choices end alike); ppl is the harness's perplexity
of a last word, null where it is beyond what a float holds.
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
from eval.loss import require_numbers
from launch import flags
from launch.config import ReadDtype
from launch.errors import BadInput, run_command
from launch.world import World, init_distributed
from model.gpt2 import GPT

Task = Literal["lambada", "piqa", "arc_easy", "winogrande", "bits_per_byte"]


@dataclass(frozen=True)
class Cloze:
    """LAMBADA: the share of last words guessed right, and the perplexity of a last word."""

    n: int
    acc: float
    acc_stderr: float
    ppl: float | None


@dataclass(frozen=True)
class Compression:
    """What a text costs: comparable between tokenizers, as a loss per token is not."""

    tokens: int
    bytes: int
    bits_per_byte: float


def query(row: dict) -> Question:
    """A row of PIQA or ARC: a question and its possible answers."""
    text, choices = choice.text(row["query"], "query"), choice.texts(row["choices"], "choices")
    bare = text.removeprefix("Question: ").removesuffix("Answer:")
    if bare != text:  # some files hold the prompt
        text = bare.strip()
    prompt = encode(f"Question: {text}\nAnswer:")
    request = Request(prompt, [encode(" " + option) for option in choices])
    return Question(
        [request],
        norm_lengths=[len(option) for option in choices],
        byte_lengths=[len(option.encode()) for option in choices],
        label=choice.label(row["gold"], len(choices)),
    )


def schema(row: dict) -> Question:
    """A row of Winogrande: the same continuation after two contexts (arXiv 1806.02847)."""
    contexts = choice.texts(row["context_options"], "context_options")
    continuation = choice.text(row["continuation"], "continuation").strip()
    requests = [Request(encode(text.strip()), [encode(" " + continuation)]) for text in contexts]
    return Question(
        requests,
        norm_lengths=[len(continuation)] * len(contexts),
        byte_lengths=[len(continuation.encode())] * len(contexts),
        label=choice.label(row["gold"], len(contexts)),
    )


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
    """How often greedy decoding gives the ending, and exp of the mean loss of an ending."""
    losses, greedy = negative_loglikelihoods(model, requests, world)
    require_numbers(losses)
    n = len(requests)
    acc = sum(greedy) / n
    stderr = math.sqrt(acc * (1 - acc) / max(1, n - 1))
    try:
        ppl = math.exp(sum(losses) / n)
    except OverflowError:  # more than 709 nats an ending: long ones, and a model that knows nothing
        ppl = None
    return Cloze(n, acc, stderr, ppl)


def compression(model: GPT, text: str, world: World) -> Compression:
    """Bits a byte of UTF-8, each token predicted once from up to n_ctx tokens before it."""
    tokens, size = encode(text), len(text.encode())
    requests = rolling_requests(tokens, model.config.n_ctx)
    losses, _greedy = negative_loglikelihoods(model, requests, world)
    require_numbers(losses)
    return Compression(len(tokens), size, sum(losses) / math.log(2) / size)


def read_text(path: Path) -> str:
    """A text file, without its byte order mark. Raises BadInput where it is none."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"can't read {path}: {error}") from None
    if not text:
        raise BadInput(f"{path} is empty: expected a text")
    return text


def read_docs(task: Task, path: Path, limit: int) -> Any:
    """A task's documents: a text, requests, or questions. Raises BadInput."""
    if task == "bits_per_byte":
        return read_text(path)
    read = {"lambada": last_word, "piqa": query, "arc_easy": query, "winogrande": schema}
    return choice.read_rows(path, read[task], limit)


def evaluate(task: Task, model: GPT, docs: Any, world: World) -> Cloze | Compression | choice.Score:
    """The model's result on what read_docs gave. Raises Failed where a loss is no number."""
    if task == "bits_per_byte":
        return compression(model, docs, world)
    if task == "lambada":
        return cloze(model, docs, world)
    return choice.score(docs, choice.answer(model, docs, world))


def main(
    task: Annotated[Task, tyro.conf.Positional],
    checkpoint: Annotated[str, tyro.conf.Positional],
    data: Path,
    limit: int = 0,
    dtype: ReadDtype = "auto",
) -> None:
    """Judges a checkpoint by one of the field's small evaluations.

    Args:
        task: Which evaluation.
        checkpoint: A checkpoint folder, a run folder, or hf:DIR.
        data: The file: JSONL (or .jsonl.xz), any text for bits_per_byte.
        limit: Only the first rows; 0 for all.
        dtype: Number format of the matrix products; int8: of the matrices, on a CPU.
    """
    if limit < 0:
        raise BadInput(f"--limit {limit}: expected 0 (all) or more")
    world = init_distributed()
    with world.fail_together():
        docs = read_docs(task, data, limit)
    with choice.open_model(checkpoint, dtype, world) as model:
        world.print0(choice.as_json(evaluate(task, model, docs, world)))
    world.destroy()


if __name__ == "__main__":
    run_command(lambda: flags.parse(main))
