"""Reads a checkpoint aloud.

    python -m eval.sample runs/demo --prompt "In the beginning"
    python -m eval.sample hf:gpt2 --prompt "Hello, I'm a language model," --num 3
"""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from data.tokenizer import EOT, decode, encode, encoding
from launch.errors import BadInput, one_line_errors
from launch.world import Dtype, autocast, choose_device, choose_dtype, keep_freed_memory
from model.checkpoint import load_model
from model.generate import SampleConfig, generate
from model.gpt2 import GPT


@dataclass(frozen=True)
class Arguments(SampleConfig):
    """Continues a prompt, streaming."""

    checkpoint: Annotated[str, tyro.conf.Positional] = ""
    """A checkpoint folder, a run folder (its newest checkpoint), or hf:DIR."""
    prompt: str = ""
    """What to continue; nothing: a document from its beginning."""
    num: int = 1
    """Samples, drawn side by side; only a single one is streamed."""
    dtype: Dtype = "auto"
    """Number format of the matrix products."""


def prompt_tokens(prompt: str, n_ctx: int) -> list[int]:
    """A prompt's tokens; an empty one begins a document. Raises BadInput where it's too long."""
    tokens = encode(prompt) or [EOT]
    if len(tokens) > n_ctx:
        raise BadInput(f"the prompt has {len(tokens):,} tokens, and the model's context {n_ctx:,}: "
                       "shorten it")
    return tokens


def sample_texts(
    model: GPT, prompt: str, num: int, config: SampleConfig, device: torch.device
) -> list[str]:
    """`num` continuations of a prompt, drawn side by side, without the prompt."""
    tokens = prompt_tokens(prompt, model.config.n_ctx)
    idx = torch.tensor([tokens] * num, device=device)  # (num, T)
    drawn = [step.tolist() for step in generate(model, idx, config, eot=EOT)]
    rows = ([step[i] for step in drawn] for i in range(num))
    return [decode(row[: row.index(EOT)] if EOT in row else row) for row in rows]


def stream_text(tokens: Iterable[int]) -> Iterator[str]:
    """Text as its tokens come; bytes wait until their character is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(encoding().decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def main(arguments: Arguments) -> None:
    if not arguments.checkpoint:
        raise BadInput("which checkpoint? python -m eval.sample CHECKPOINT --prompt TEXT")
    if arguments.num < 1:
        raise BadInput(f"--num {arguments.num}: expected at least 1")
    device = choose_device()
    keep_freed_memory()
    model = load_model(arguments.checkpoint).to(device).eval()
    dtype = choose_dtype(arguments.dtype, device)
    if dtype == "fp64":
        model = model.double()
    with autocast(device, dtype):
        if arguments.num > 1:
            texts = sample_texts(model, arguments.prompt, arguments.num, arguments, device)
            print("\n---\n".join(arguments.prompt + text for text in texts))
            return
        idx = torch.tensor([prompt_tokens(arguments.prompt, model.config.n_ctx)], device=device)
        drawn = (int(step) for step in generate(model, idx, arguments, eot=EOT))
        print(arguments.prompt, end="", flush=True)
        for piece in stream_text(token for token in drawn if token != EOT):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments, config=(tyro.conf.FlagConversionOff,)))
