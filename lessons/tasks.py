"""Lesson 8's questions, each answered by a program: nothing is labelled by hand.

    question = ask("spell", "zoe", rng)       # "spell zoe"
    solve(question)                           # "z-o-e"

Templates make the questions, so nothing here needs a licence; the same program that answers judges.
"""

import random
import string

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
