"""What a request for completions may ask: OpenAI's fields, each within its bounds.

    request = parse_request(json.loads(body), model.config)

Raises BadInput, in one line that names the field, for what can't be done. Fields and meanings are
those of https://platform.openai.com/docs/api-reference/completions (the endpoint for models without
a chat format), with vLLM's top_k and truncate_prompt_tokens.
"""

import difflib
import secrets
from dataclasses import dataclass
from typing import Any

from data.tokenizer import GPT2, Tokenizer
from eval.sample import crop_note
from launch.errors import BadInput
from model.generate import SampleConfig
from model.gpt2 import GPTConfig

# What one request may ask for. A sample of GPT-2 1558M keeps up to 310 MB of keys and values.
MOST_TOKENS = 2048
MOST_SAMPLES = 8
MOST_PROMPTS = 64
MOST_STOPS = 4  # OpenAI's limits, as are the next two
MOST_LOGPROBS = 5
HOTTEST = 2.0
FIELDS = (
    "model", "prompt", "n", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop",
    "logprobs", "echo", "stream", "stream_options", "truncate_prompt_tokens", "user",
)
# OpenAI's other fields, and the values of them that ask for nothing.
NEUTRAL: dict[str, list[Any]] = {
    "best_of": [1], "frequency_penalty": [0], "presence_penalty": [0], "logit_bias": [{}],
    "suffix": [""],
}


@dataclass(frozen=True)
class CompletionRequest:
    """A request that can be done."""

    prompts: list[list[int]]  # tokens, 1 to n_ctx each
    echoed: list[list[int]]  # what is repeated of each before its continuation
    n: int  # samples of each prompt, drawn side by side
    sampling: SampleConfig
    stop: list[str]
    logprobs: int | None  # how many likely tokens beside each; None: no likelihoods
    stream: bool
    include_usage: bool  # the last event of a stream says how many tokens it took
    note: str  # what was done that wasn't asked in so many words
    tokenizer: Tokenizer = GPT2  # what the model's tokens stand for


def parse_request(
    body: Any, config: GPTConfig, tokenizer: Tokenizer = GPT2
) -> CompletionRequest:
    """The request in a JSON object. Raises BadInput, naming the field, for what can't be done."""
    if not isinstance(body, dict):
        raise BadInput("expected a JSON object with a prompt")
    given = {key: value for key, value in body.items() if value is not None}
    _refuse_unknown(given)
    sampling = SampleConfig(
        max_tokens=_integer(given, "max_tokens", 16, 0, MOST_TOKENS),
        temperature=_number(given, "temperature", 1.0, 0.0, HOTTEST),
        top_p=_number(given, "top_p", 1.0, 1e-9, 1.0),
        top_k=_integer(given, "top_k", 0, 0, config.n_vocab),
        seed=_integer(given, "seed", secrets.randbelow(2**31), 0, 2**63 - 1),
    )
    logprobs = None
    if given.get("logprobs", False) is not False:
        logprobs = _integer(given, "logprobs", 0, 0, MOST_LOGPROBS)
    keep = config.n_ctx
    if "truncate_prompt_tokens" in given:
        keep = min(keep, _integer(given, "truncate_prompt_tokens", keep, 1, 10**9))

    echo = _flag(given, "echo")
    prompts, echoed, note = [], [], ""
    for prompt in _prompts(given.get("prompt", "")):
        tokens = _prompt_tokens(prompt, tokenizer)
        if len(tokens) > keep:
            note = crop_note(len(tokens), keep)
            if "truncate_prompt_tokens" not in given:
                raise BadInput(f"prompt: {len(tokens):,} tokens, and the model's context is "
                               f"{config.n_ctx:,}: shorten it, or send truncate_prompt_tokens")
        tokens = tokens[-keep:]
        prompts.append(tokens or [tokenizer.first])  # an empty one begins a document
        echoed.append(tokens if echo else [])
    return CompletionRequest(
        prompts, echoed, _integer(given, "n", 1, 1, MOST_SAMPLES), sampling, _stops(given),
        logprobs, _flag(given, "stream"), _include_usage(given), note, tokenizer,
    )


def _refuse_unknown(given: dict[str, Any]) -> None:
    for field, value in given.items():
        if field in NEUTRAL:
            if value not in NEUTRAL[field]:
                raise BadInput(f"{field} is not done here: leave it out")
        elif field not in FIELDS:
            close = difflib.get_close_matches(field, FIELDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(FIELDS)}"
            raise BadInput(f"no field is called {field[:40]!r}: {hint}")


def _integer(given: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = given.get(name, default)
    if type(value) is not int or not low <= value <= high:  # True is an int, too
        raise BadInput(f"{name} {_short(value)}: expected a whole number, {low:,} to {high:,}")
    return value


def _number(given: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = given.get(name, default)
    if type(value) not in (int, float) or not low <= value <= high:  # nor is NaN
        raise BadInput(f"{name} {_short(value)}: expected a number, {low:g} to {high:g}")
    return float(value)


def _flag(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if type(value) is not bool:
        raise BadInput(f"{name} {_short(value)}: expected true or false")
    return value


def _short(value: Any) -> str:
    return repr(value)[:60]


def _stops(given: dict[str, Any]) -> list[str]:
    """The texts before which a continuation ends."""
    stops = given.get("stop", [])
    if isinstance(stops, str):
        stops = [stops]
    texts = isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)
    if not texts or len(stops) > MOST_STOPS:
        raise BadInput(f"stop {_short(stops)}: expected a text, or a list of up to {MOST_STOPS}")
    return stops


def _include_usage(given: dict[str, Any]) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or not options.keys() <= {"include_usage"}:
        raise BadInput(f"stream_options {_short(options)}: expected {{\"include_usage\": true}}")
    return _flag(options, "include_usage")


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request: a text or a list of tokens, or a list of these."""
    prompts = prompt
    if isinstance(prompt, str) or (isinstance(prompt, list) and _all_integers(prompt)):
        prompts = [prompt]
    if not isinstance(prompts, list):
        raise BadInput(f"prompt {_short(prompt)}: expected a text, a list of tokens, or a list of "
                       "either")
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise BadInput(f"prompt: {len(prompts):,} of them, expected 1 to {MOST_PROMPTS}")
    return prompts


def _prompt_tokens(prompt: Any, tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if not isinstance(prompt, list) or not prompt or not _all_integers(prompt):
        raise BadInput(f"prompt {_short(prompt)}: expected a text or a list of tokens")
    for token in prompt:
        if not 0 <= token < tokenizer.n_vocab:
            raise BadInput(f"prompt: token {_short(token)} is none of 0 to "
                           f"{tokenizer.n_vocab - 1:,}")
    return prompt


def _all_integers(values: list) -> bool:
    return bool(values) and all(type(value) is int for value in values)
