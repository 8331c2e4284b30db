"""Reads a checkpoint aloud.

    python -m eval.sample runs/demo --prompt "In the beginning"
    python -m eval.sample runs/demo                     # on a terminal: asks for prompts
    echo "In the beginning" | python -m eval.sample runs/demo
    python -m eval.sample hf:gpt2 --prompt "Hello, I'm a language model," --num 3
    python -m eval.sample hf:gpt2 --prompts prompts.txt --json True > samples.jsonl
    python -m eval.sample runs/chat --chat              # of a run with --data.chat: talks with it

Text goes to standard output, wrapped where that is a terminal and exact where it is a pipe or a
file; tokens/s go to standard error.
"""

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro

from data.chars import tokenizer_of
from data.tokenizer import GPT2, Tokenizer, stream_text
from eval.dialogue import Dialogue
from eval.wrap import console_width, wrap
from kernels import selfcheck
from launch import cli, flags, hints
from launch.config import ReadDtype
from launch.errors import BadInput, run_command
from launch.world import DTYPES, autocast, choose_device, choose_dtype, keep_freed_memory
from model.checkpoint import characters_of, load_resolved, resolve
from model.generate import CannotSample, SampleConfig, generate
from model.gpt2 import GPT
from model.network import use_operators
from model.reading import ready_to_read

ROWS_AT_ONCE = 32  # texts drawn side by side


@dataclass(frozen=True)
class Arguments(SampleConfig):
    """Continues prompts. Without one it asks for them on a terminal, or reads standard input."""

    checkpoint: Annotated[str, tyro.conf.Positional] = ""
    """A checkpoint folder, a run folder (its newest checkpoint), or hf:DIR."""
    prompt: str = ""
    """What to continue. Without it: standard input, or on a terminal what is typed there; where
    that is empty, a document from its beginning."""
    prompts: str = ""
    """A file of prompts, one a line, drawn side by side."""
    num: int = 1
    """Samples of each prompt; only a single one is streamed."""
    json: bool = False
    """One JSON object a line: prompt, text, tokens."""
    chat: bool = False
    """Talk: each line of standard input is said to the model, which remembers what was said."""
    dtype: ReadDtype = "auto"
    """Number format of the matrices and their products; int8: of the matrices alone, on a CPU."""


class Continuation(NamedTuple):
    """What a model made of a prompt."""

    prompt: str
    text: str  # without the prompt
    tokens: int  # drawn, the end of the text not counted


def load_for_sampling(
    checkpoint: str, dtype: ReadDtype, device: torch.device, several: bool = False
) -> tuple[GPT, Tokenizer]:
    """A checkpoint's model, as ready_to_read() makes it, and what its tokens stand for."""
    source = resolve(checkpoint)
    tokenizer = tokenizer_of(characters_of(source))
    model = ready_to_read(load_resolved(source), dtype, device, several)
    if device.type == "cuda":
        shape = model.config
        ops, _line = selfcheck.checked(
            "auto", device, shape.n_embd // shape.n_head, DTYPES[choose_dtype(dtype, device)],
            speedrun=shape.arch == "speedrun", training=False)
        use_operators(model, ops)
    return model, tokenizer


def prompt_tokens(prompt: str, n_ctx: int, tokenizer: Tokenizer = GPT2) -> list[int]:
    """The last n_ctx tokens of a prompt, as nanoGPT crops it; an empty one begins a document."""
    return (tokenizer.encode(prompt) or [tokenizer.first])[-n_ctx:]


def crop_note(tokens: int, n_ctx: int) -> str:
    """What is to be said of a prompt of so many tokens; '' for one that prompt_tokens() keeps."""
    if tokens <= n_ctx:
        return ""
    return (f"the prompt has {tokens:,} tokens, and the model's context {n_ctx:,}: the model "
            f"reads the last {n_ctx:,}")


def read_stdin() -> str:
    """Standard input as one prompt, without the line break that ends it. Raises BadInput."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"can't read a prompt from standard input: {error}") from None
    return text.removesuffix("\n").removesuffix("\r")


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that aren't empty. Raises BadInput where there are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"can't read prompts from {path}: {error}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{path} holds no prompt: one a line is expected")
    return prompts


def continue_prompts(
    model: GPT, prompts: list[str], config: SampleConfig, device: torch.device,
    tokenizer: Tokenizer = GPT2,
) -> list[Continuation]:
    """A continuation of each prompt, drawn side by side. Prompts may differ in length."""
    eot = tokenizer.eot
    rows = [prompt_tokens(prompt, model.config.n_ctx, tokenizer) for prompt in prompts]
    lengths = [len(row) for row in rows]
    shortest, longest = min(lengths), max(lengths)
    filled = [row + [tokenizer.first] * (longest - len(row)) for row in rows]
    idx = torch.tensor(filled, device=device)  # (B, T)
    steps = []  # the token of each row, step by step
    for tokens in generate(
        model, idx, config, eot, lengths=torch.tensor(lengths, device=device)
    ):
        steps.append(tokens.tolist())
    texts = []
    for i, prompt in enumerate(prompts):
        first = lengths[i] - shortest  # a longer prompt's own tokens come before it
        drawn = [step[i] for step in steps[first : first + config.max_tokens]]
        if eot in drawn:
            drawn = drawn[: drawn.index(eot)]
        texts.append(Continuation(prompt, tokenizer.decode(drawn), len(drawn)))
    return texts


def print_text(pieces: Iterable[str]) -> None:
    """Prints a text as it comes: wrapped on a terminal, exact in a pipe or a file."""
    if sys.stdout.isatty():
        pieces = wrap(pieces, console_width())
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)  # an error or the next prompt begins on a line of its own


def stream(
    model: GPT, prompt: str, config: SampleConfig, device: torch.device,
    tokenizer: Tokenizer = GPT2,
) -> int:
    """Prints a prompt and its continuation as it is drawn; returns the number of tokens."""
    idx = torch.tensor([prompt_tokens(prompt, model.config.n_ctx, tokenizer)], device=device)
    drawn: list[int] = []

    def tokens() -> Iterator[int]:
        for step in generate(model, idx, config, tokenizer.eot):
            if int(step) != tokenizer.eot:
                drawn.append(int(step))
                yield drawn[-1]

    print_text(itertools.chain([prompt], stream_text(tokens(), tokenizer)))
    return len(drawn)


def answer(
    model: GPT, prompts: list[str], arguments: Arguments, device: torch.device,
    tokenizer: Tokenizer = GPT2,
) -> None:
    """Prints what the arguments ask for, and on standard error how fast it came."""
    for prompt in prompts:
        note = crop_note(len(tokenizer.encode(prompt)), model.config.n_ctx)
        if note:
            print(f"note: {note}", file=sys.stderr)
    start, count = time.perf_counter(), 0
    asked = [prompt for prompt in prompts for _ in range(arguments.num)]
    if len(asked) == 1 and not arguments.json:
        count = stream(model, asked[0], arguments, device, tokenizer)
    else:
        for first in range(0, len(asked), ROWS_AT_ONCE):
            # Another seed for each batch, or the same prompt would get the same text again.
            config = replace(arguments, seed=(arguments.seed + first) % 2**63)
            batch = asked[first : first + ROWS_AT_ONCE]
            texts = continue_prompts(model, batch, config, device, tokenizer)
            for i, made in enumerate(texts, first):
                if arguments.json:
                    print(json.dumps(made._asdict()), flush=True)
                else:
                    if i > 0:
                        print("---")
                    print_text([made.prompt + made.text])
                count += made.tokens
    taken = time.perf_counter() - start
    print(f"{count:,} tokens in {taken:.2f} s: {count / taken:,.1f} tokens/s", file=sys.stderr)


def converse(
    model: GPT, arguments: Arguments, device: torch.device, tokenizer: Tokenizer = GPT2
) -> None:
    """Asks for prompts until the end of input. Ctrl-C stops the text that is being drawn."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then has a history and can be edited
    print("What is typed is continued; an empty line begins a document; Ctrl-D leaves.")
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            answer(model, [prompt], arguments, device, tokenizer)
        except CannotSample:  # nor would the next prompt's
            raise
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            pass


def read_lines(ask: bool) -> Iterator[str]:
    """The lines of standard input that say something; `ask`: on a terminal, with a prompt."""
    if ask:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then has a history and can be edited
        print("What is typed is said to the model; Ctrl-C stops its answer, Ctrl-D leaves.")
    while True:
        try:
            line = input("> " if ask else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise BadInput(f"can't read standard input: {error}") from None
        if line.strip():
            yield line


def chat(
    model: GPT, said: Iterable[str], arguments: Arguments, device: torch.device
) -> None:
    """Prints an answer to each of these. Ctrl-C stops the one that is being drawn."""
    dialogue = Dialogue(model, arguments, device)
    for text in said:
        with contextlib.suppress(KeyboardInterrupt), closing(dialogue.answer(text)) as pieces:
            print_text(pieces)


def read_flags() -> Arguments:
    """The command line; of nanoGPT's names the line says what they are here."""
    given = [flags.name_of(word.partition("=")[0]) for word in sys.argv[1:]]
    if line := hints.translate(given, hints.NANOGPT_SAMPLE):
        raise BadInput(line)
    return flags.parse(Arguments)


def main(arguments: Arguments) -> None:
    if not arguments.checkpoint:
        raise BadInput("which checkpoint? python -m eval.sample CHECKPOINT --prompt TEXT")
    cli.within("num", arguments.num, 1, 1_000_000)
    if arguments.prompt and arguments.prompts:
        raise BadInput("--prompt and --prompts: give one of them")
    if arguments.chat and (arguments.prompts or arguments.json or arguments.num > 1):
        raise BadInput("--chat is one conversation: leave out --prompts, --json and --num")
    prompts, ask = [arguments.prompt], False
    if arguments.prompts:
        prompts = read_prompts(Path(arguments.prompts))
    elif arguments.chat:
        ask = sys.stdin.isatty() and sys.stdout.isatty()
    elif not arguments.prompt and not sys.stdin.isatty():
        prompts = [read_stdin()]
    elif not arguments.prompt and not arguments.json:
        ask = sys.stdout.isatty()
    device = choose_device()
    keep_freed_memory()
    dtype = choose_dtype(arguments.dtype, device)
    several = len(prompts) * arguments.num > 1
    model, tokenizer = load_for_sampling(
        arguments.checkpoint, arguments.dtype, device, several)
    with autocast(device, dtype):
        if arguments.chat and tokenizer.characters:
            raise BadInput(f"--chat is in GPT-2's tokens: {arguments.checkpoint} reads characters")
        if arguments.chat:
            said = [arguments.prompt] if arguments.prompt else read_lines(ask)
            chat(model, said, arguments, device)
        elif ask:
            converse(model, arguments, device, tokenizer)
        else:
            answer(model, prompts, arguments, device, tokenizer)


if __name__ == "__main__":
    run_command(lambda: main(read_flags()))
