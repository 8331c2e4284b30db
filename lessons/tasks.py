"""Lesson 8's questions, each answered by a program: nothing is labelled by hand.

    question = ask("spell", "zoe", rng)       # "spell zoe"
    solve(question)                           # "z-o-e"
    encode("<spell zoe>z-o-e")                # numbers of symbols, 0 to 49
    reply(model, [question], 1.0, seed=0)     # ["z-o-e"], as long as the model is right

Templates make the questions, so nothing here needs a licence; the same program that answers judges.
"""

import random
import string

import torch
from torch import Tensor

from model.generate import SampleConfig, generate
from model.gpt2 import GPT

SYMBOLS = "\n " + string.ascii_lowercase + string.digits + "+:?.,;'-!&<>"
NUMBER = {symbol: i for i, symbol in enumerate(SYMBOLS)}
END = 0  # newline ends an answer, and pads
LONGEST = 22  # symbols of an answer
TASKS = ("reverse", "spell", "count", "last", "double")


def ask(task: str, word: str, rng: random.Random) -> str:
    """A question about a word. Three letters in four that are to be counted are the word's."""
    if task == "count":
        letter = rng.choice(word if rng.random() < 0.75 else string.ascii_lowercase)
        return f"count {letter} in {word}"
    return f"last of {word}" if task == "last" else f"{task} {word}"


def solve(question: str) -> str:
    """The right answer to what ask() asks."""
    task, *rest = question.split()
    word = rest[-1]
    answers = {
        "reverse": word[::-1],
        "spell": "-".join(word),
        "count": str(word.count(rest[0])),
        "last": word[-1],
        "double": word + word,
    }
    return answers[task]


def questions(words: list[str], n: int, rng: random.Random) -> list[str]:
    """n questions, tasks and words drawn alike."""
    return [ask(rng.choice(TASKS), rng.choice(words), rng) for _ in range(n)]


def encode(text: str) -> list[int]:
    """Numbers of symbols. Raises KeyError for one that isn't among SYMBOLS."""
    return [NUMBER[symbol] for symbol in text]


def pad(rows: list[list[int]]) -> Tensor:
    """(B, T), END behind the shorter ones."""
    T = max(len(row) for row in rows)
    return torch.tensor([row + [END] * (T - len(row)) for row in rows])


def conversations(pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """(question, answer) pairs, one a row: `<question>answer`, and END unless it has LONGEST.

    Ids (B, T), and how many symbols are each question's (B,), and the whole conversation's (B,).
    """
    rows = []
    for question, answer in pairs:
        end = "\n" if len(answer) < LONGEST else ""
        rows.append(encode(f"<{question}>{answer}{end}"))
    asked = torch.tensor([len(question) + 2 for question, _ in pairs])
    return pad(rows), asked, torch.tensor([len(row) for row in rows])


def reply(model: GPT, asked: list[str], temperature: float, seed: int) -> list[str]:
    """An answer to each question; one that does not end keeps LONGEST symbols."""
    prompts = [encode(f"<{question}>") for question in asked]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    config = SampleConfig(LONGEST, temperature, top_k=0, seed=seed)
    drawn = torch.stack(list(generate(model, pad(prompts), config, END, lengths=lengths)), 1)
    replies = []
    for row, prompt in zip(drawn.tolist(), prompts, strict=True):  # drawn: (B, t)
        row = row[len(prompt) - int(lengths.min()) :][:LONGEST]  # the rest of its prompt goes
        replies.append("".join(SYMBOLS[i] for i in row).split("\n")[0])
    return replies
