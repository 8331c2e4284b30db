"""OpenAI's text completions, out of a GPT, token by token.

    for pieces in complete(model, parse_request(body, model.config)):   # one step of the model each
        ...                                                  # a Piece for each choice that grew

A generator: who asks may stop between any two tokens, and nothing more is computed. The text of a
request doesn't depend on what else the model is asked at the time.
"""

import codecs
import secrets
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.tokenizer import GPT2, Tokenizer
from eval.completion_request import CompletionRequest
from eval.loss import require_numbers
from kernels.constants import CHUNK_ELEMENTS
from model.generate import generate, generate_with_logits
from model.gpt2 import GPT

# A token's log-probability and those of the likeliest in its place; None where nobody asked.
Likelihood = tuple[float | None, dict[str, float] | None]


class Token(NamedTuple):
    """What a token adds to a text, and how likely it was."""

    text: str  # a character of several tokens comes with the last of them
    logprob: float | None  # natural logarithm, at temperature 1; None: not asked, or the first
    likeliest: dict[str, float] | None  # the tokens that were likeliest in its place


class Piece(NamedTuple):
    """What a step adds to a choice, one of the texts that a request gets."""

    choice: int  # its number
    tokens: list[Token]
    finish_reason: str | None  # stop (its document's end, or a stop text), length, or None yet
    drawn: int  # tokens that the model drew for it in this step


def complete(model: GPT, request: CompletionRequest) -> Iterator[list[Piece]]:
    """The answer, one step of the model at a time; a step may add to no choice.

    Prompts come one after the other, the n samples of one side by side. Raises CannotSample.
    """
    for number, prompt in enumerate(request.prompts):
        choices = [Choice(number * request.n + i, request.stop, request.tokenizer)
                   for i in range(request.n)]
        echoed = _prompt_as_tokens(model, request, number)
        if echoed:
            yield [Piece(choice.index, echoed, None, 0) for choice in choices]
        idx = torch.tensor([prompt] * request.n, device=model.wte.weight.device)  # (n, T)
        for tokens, likelihoods in _steps(model, idx, request):
            pieces = []
            rows = zip(choices, tokens.tolist(), likelihoods, strict=True)
            for choice, token, likelihood in rows:
                if choice.finish_reason is None:
                    pieces.append(choice.add(token, likelihood))
            yield pieces
            if all(choice.finish_reason for choice in choices):
                break
        yield [choice.end() for choice in choices if choice.finish_reason is None]


def _steps(
    model: GPT, idx: Tensor, request: CompletionRequest
) -> Iterator[tuple[Tensor, list[Likelihood]]]:
    """The (n,) tokens of each step, and with logprobs how likely they were. idx: (n, T)."""
    sampling, eot = request.sampling, request.tokenizer.eot
    if request.logprobs is None:  # on a GPU the faster way, which keeps no logits
        for tokens in generate(model, idx, sampling, eot):
            yield tokens, [(None, None)] * request.n
    else:
        for tokens, logits in generate_with_logits(model, idx, sampling, eot):
            yield tokens, token_logprobs(logits, tokens, request.logprobs, request.tokenizer)


class Choice:
    """A continuation that grows: whole characters only, and nothing past a stop text."""

    def __init__(self, index: int, stops: list[str], tokenizer: Tokenizer = GPT2) -> None:
        self.index, self.stops, self.tokenizer = index, stops, tokenizer
        self.finish_reason: str | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[Token] = []  # may be part of a character, or of a stop text

    def add(self, token: int, likelihood: Likelihood) -> Piece:
        """What can be shown now that this token has been drawn."""
        if token == self.tokenizer.eot:
            self.finish_reason = "stop"
            return Piece(self.index, self._rest(), "stop", 0)
        text = self._decoder.decode(self.tokenizer.token_bytes(token))
        self._held.append(Token(text, *likelihood))
        waiting = "".join(held.text for held in self._held)
        found = [waiting.find(stop) for stop in self.stops if stop in waiting]
        if found:
            self.finish_reason = "stop"
            self._cut(min(found))
            shown, self._held = self._held, []
        else:
            shown = self._release(len(waiting) - _beginning_of_a_stop(waiting, self.stops))
        return Piece(self.index, shown, self.finish_reason, 1)

    def end(self) -> Piece:
        """What is left when no more tokens are drawn."""
        self.finish_reason = "length"
        return Piece(self.index, self._rest(), "length", 0)

    def _rest(self) -> list[Token]:
        """All that was held; bytes that became no character are shown as U+FFFD."""
        broken = self._decoder.decode(b"", final=True)
        if broken:
            self._held[-1] = self._held[-1]._replace(text=self._held[-1].text + broken)
        rest, self._held = self._held, []
        return rest

    def _cut(self, length: int) -> None:
        """Keeps this many characters of what is held."""
        kept = []
        for token in self._held:
            if length <= 0:
                break
            kept.append(token._replace(text=token.text[:length]))
            length -= len(token.text)
        self._held = kept

    def _release(self, length: int) -> list[Token]:
        """The tokens that lie in the first `length` characters; not one with half a character."""
        ready = list(self._held)
        if self._decoder.getstate()[0]:  # bytes that wait for the rest of their character
            ready.pop()
        count = end = 0
        for number, token in enumerate(ready, 1):
            end += len(token.text)
            if token.text and end <= length:
                count = number
        shown, self._held = self._held[:count], self._held[count:]
        return shown


def _beginning_of_a_stop(text: str, stops: list[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop text."""
    longest = 0
    for stop in stops:
        for length in range(1, min(len(stop), len(text) + 1)):
            if text.endswith(stop[:length]):
                longest = max(longest, length)
    return longest


# ---- likelihoods ----


def token_logprobs(
    logits: Tensor, tokens: Tensor, likeliest: int, tokenizer: Tokenizer = GPT2
) -> list[Likelihood]:
    """Log-probability of each token, and of the likeliest in its place. (B, V), (B,) -> B pairs.

    As OpenAI's, the likeliest include the token itself. Raises Failed where they are no numbers.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    logp = logits.to(exact).log_softmax(-1)  # (B, V)
    own = logp.gather(1, tokens[:, None])[:, 0]  # (B,)
    top, ids = logp.topk(likeliest)  # each (B, likeliest)
    require_numbers(own.tolist())
    pairs: list[Likelihood] = []
    for row, token in enumerate(tokens.tolist()):
        names = [token_name(i, tokenizer) for i in [*ids[row].tolist(), token]]
        values = [*top[row].tolist(), own[row].item()]
        pairs.append((values[-1], dict(zip(names, values, strict=True))))
    return pairs


@torch.no_grad()
def _prompt_as_tokens(model: GPT, request: CompletionRequest, number: int) -> list[Token]:
    """The part of a prompt that is repeated, with its likelihoods where they are asked for."""
    echoed = request.echoed[number]
    likelihoods: list[Likelihood] = [(None, None)] * len(echoed)
    if request.logprobs is not None and len(echoed) > 1:
        idx = torch.tensor([echoed], device=model.wte.weight.device)  # (1, T)
        x = model.hidden(idx)[0, :-1]  # (T - 1, C): each predicts the token after it
        targets = idx[0, 1:]  # (T - 1,)
        rows = max(1, CHUNK_ELEMENTS // model.config.n_vocab)
        for start in range(0, len(targets), rows):
            here = slice(start, start + rows)
            likelihoods[here.start + 1 : here.stop + 1] = token_logprobs(
                model.logits(x[here]), targets[here], request.logprobs, request.tokenizer
            )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tokens = []
    for place, token in enumerate(echoed):
        final = place == len(echoed) - 1
        text = decoder.decode(request.tokenizer.token_bytes(token), final)
        tokens.append(Token(text, *likelihoods[place]))
    return tokens


def token_name(token: int, tokenizer: Tokenizer = GPT2) -> str:
    r"""A token alone as OpenAI spells it: its text, or bytes:\xe2\x98 where that is none."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Answer:
    """What a request gets, in OpenAI's shape."""

    def __init__(self, asked: CompletionRequest, model: str) -> None:
        self.asked = asked
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion",
                     "created": int(time.time()), "model": model}
        if asked.note:
            self.head["note"] = asked.note
        self.with_logprobs = asked.logprobs is not None
        count = len(asked.prompts) * asked.n
        self.pieces: list[list[Piece]] = [[] for _ in range(count)]
        self.sent = [0] * count  # characters of each choice
        self.drawn = 0

    def add(self, pieces: list[Piece]) -> None:
        """Keeps what a step added."""
        for piece in pieces:
            self.pieces[piece.choice].append(piece)
            self.drawn += piece.drawn

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [choice_json(i, own, self.with_logprobs) for i, own in enumerate(self.pieces)]
        return self.head | {"choices": choices, "usage": self.usage()}

    def chunk(self, pieces: list[Piece]) -> dict[str, Any] | None:
        """What a step added; None where that is nothing to be shown."""
        choices = []
        for piece in pieces:
            self.drawn += piece.drawn
            if piece.tokens or piece.finish_reason:
                number = piece.choice
                choice = choice_json(number, [piece], self.with_logprobs, self.sent[number])
                self.sent[number] += len(choice["text"])
                choices.append(choice)
        return self.head | {"choices": choices} if choices else None

    def usage(self) -> dict[str, int]:
        """Tokens that were read, and drawn."""
        read = sum(len(prompt) for prompt in self.asked.prompts)
        return {"prompt_tokens": read, "completion_tokens": self.drawn,
                "total_tokens": read + self.drawn}


def choice_json(index: int, pieces: list[Piece], with_logprobs: bool, offset: int = 0) -> dict:
    """Pieces of a choice in OpenAI's shape. offset: characters of it that were sent before."""
    tokens = [token for piece in pieces for token in piece.tokens]
    logprobs: dict[str, Any] | None = None
    if with_logprobs:
        logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            logprobs["tokens"].append(token.text)
            logprobs["token_logprobs"].append(token.logprob)
            logprobs["top_logprobs"].append(token.likeliest)
            logprobs["text_offset"].append(offset)
            offset += len(token.text)
    return {
        "index": index,
        "text": "".join(token.text for token in tokens),
        "logprobs": logprobs,
        "finish_reason": pieces[-1].finish_reason if pieces else None,
    }
