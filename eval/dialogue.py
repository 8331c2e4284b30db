"""A conversation with a model that was fine-tuned on some (--data.chat).

    dialogue = Dialogue(model, SampleConfig(max_tokens=200), device)
    for piece in dialogue.answer("What is a bird?"):     # as it is drawn
        print(piece, end="")

What was said stays in the model's context, spelled as data/chat.py spells it; where the context is
full, the oldest questions are forgotten together with their answers.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace

import torch

from data.chat import question_tokens
from data.tokenizer import EOT, stream_text
from model.generate import SampleConfig, generate
from model.gpt2 import GPT


class Dialogue:
    """turns: the tokens of each question and its answer that are remembered."""

    def __init__(self, model: GPT, config: SampleConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        n_ctx = model.config.n_ctx
        self.room = n_ctx - min(config.max_tokens, n_ctx // 2)  # for what was said before
        self.turns: list[list[int]] = []
        self.answers = 0

    def answer(self, text: str) -> Generator[str, None, None]:
        """What the model says to this, piece by piece. What is drawn until somebody stops listening
        counts as said."""
        self.turns.append(question_tokens(text))
        while len(self.turns) > 1 and sum(map(len, self.turns)) > self.room:
            self.turns.pop(0)
        try:
            yield from without_first_space(stream_text(self._draw()))
        finally:
            self.turns[-1].append(EOT)
            self.answers += 1

    def _draw(self) -> Iterator[int]:
        """Tokens up to the end of the answer; they are remembered."""
        context = [token for turn in self.turns for token in turn][-self.room :]
        idx = torch.tensor([context], device=self.device)  # (1, T)
        # Another seed for each answer, or the same question would get the same one again.
        config = replace(self.config, seed=(self.config.seed + self.answers) % 2**63)
        for step in generate(self.model, idx, config, EOT):
            if int(step) != EOT:
                self.turns[-1].append(int(step))
                yield int(step)


def without_first_space(pieces: Iterable[str]) -> Iterator[str]:
    """A text without the blank that its first token begins with."""
    started = False
    for piece in pieces:
        yield piece if started else piece.removeprefix(" ")
        started = started or piece != ""
