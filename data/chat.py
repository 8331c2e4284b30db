r"""Conversations, to fine-tune a trained model on: it learns to say what the assistant says.

    python train_gpt2.py gpt2-124m --init hf:gpt2 --data.chat chat.jsonl ...

chat.jsonl holds one conversation a line, as most sets of them have it:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}

In GPT-2's tokens, with no token of its own:

    System: Be brief.\nUser: Hi\nAssistant: Hello!<|endoftext|>User: Bye\nAssistant: ...
                                           tttttttttttttttttttt                     ttt

Loss is on the targets t alone: what the assistant says, and the <|endoftext|> that ends its turn.
All other tokens are read, and carry no gradient. One conversation stands in a row, filled up with
<|endoftext|>: nothing sees another conversation. A row is T + 1 tokens; a token that is read and
is no target is kept as ~token, which is negative (inputs_and_targets).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.corpus import HELD_OUT
from data.tokenizer import EOT, encode
from kernels.constants import IGNORE
from launch.console import print0
from launch.errors import BadInput

NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}  # of the roles, as spelled
Message = tuple[str, str]  # role, text


def turn_tokens(role: str, text: str) -> tuple[list[int], list[int]]:
    """(before, said) of one message: who speaks, which is read only; and what the assistant says,
    which is learnt. What others say is read only, too."""
    if role == "assistant":
        return encode(f"{NAMES[role]}:"), [*encode(f" {text.strip()}"), EOT]
    return encode(f"{NAMES[role]}: {text.strip()}\n"), []


def question_tokens(text: str) -> list[int]:
    """What the user says, and the beginning of the answer."""
    answer_begins, _said = turn_tokens("assistant", "")
    return turn_tokens("user", text)[0] + answer_begins


def question_text(text: str) -> str:
    """The same as it reads."""
    return f"{NAMES['user']}: {text.strip()}\n{NAMES['assistant']}:"


def conversation_tokens(messages: list[Message]) -> list[int]:
    """A conversation's tokens, those that are no targets as ~token."""
    tokens: list[int] = []
    for role, text in messages:
        before, said = turn_tokens(role, text)
        tokens += [~token for token in before] + said
    return tokens


def inputs_and_targets(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T + 1) -> (B, T) tokens to read, and (B, T) tokens to predict, IGNORE where none is.

    Rows of a stream predict every token; in a conversation's, ~token is only read.
    """
    inputs = torch.where(rows < 0, ~rows, rows)[:, :-1]
    targets = torch.where(rows < 0, IGNORE, rows)[:, 1:]
    return inputs, targets


def chat_rows(path: Path, T: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) rows of a file of conversations: (conversations, T + 1) int32 each.

    Every 20th conversation is held out, the last where there are fewer. What is longer than T + 1
    tokens is cut, and left out where nothing of the assistant's is left; both are counted in a
    line. Raises BadInput that names the line where the file holds anything else.
    """
    conversations = [conversation_tokens(messages) for messages in read_conversations(path)]
    cut = sum(len(tokens) > T + 1 for tokens in conversations)
    rows = np.full((len(conversations), T + 1), ~EOT, dtype=np.int32)
    for row, tokens in zip(rows, conversations, strict=True):
        row[: len(tokens)] = tokens[: T + 1]
    answered = (rows[:, 1:] >= 0).any(axis=1)  # (conversations,)
    if cut:
        print0(f"{path}: {cut:,} of {len(rows):,} conversations are longer than {T + 1:,} tokens: "
               f"cut there, {int((~answered).sum()):,} of them left out, for the assistant comes "
               "later")
    rows = rows[answered]
    if len(rows) < 2:
        raise BadInput(f"{path} has {len(rows)} conversations to train on, and one more is held "
                       "out: 2 are the fewest")
    held_out = np.arange(len(rows)) % HELD_OUT == HELD_OUT // 2
    if not held_out.any():
        held_out[-1] = True
    return rows[~held_out], rows[held_out]


def read_conversations(path: Path) -> list[list[Message]]:
    """The conversations of a JSONL file. Raises BadInput that names the line."""
    if path.is_fifo():
        raise BadInput(f"{path} is a pipe: a file is read by every rank and at every start")
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            raise BadInput(f"{path} is compressed: unpack it first (gunzip)")
        lines = data.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise BadInput(f"can't read the conversations {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no UTF-8 text: offset {error.start:,}") from None
    conversations = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                conversations.append(_messages(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}, line {number:,}: {_reason(error)}") from None
    return conversations


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON ({error.msg}): a conversation a line is expected"
    return "brackets in brackets without end" if isinstance(error, RecursionError) else str(error)


def _messages(row: Any) -> list[Message]:
    """A conversation out of a line. Raises ValueError where it is none."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected {"messages": [{"role": ..., "content": ...}, ...]}')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is no object with role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in NAMES:
            raise ValueError(f"message {number} has the role {str(role)[:40]!r}: expected system, "
                             "user or assistant")
        if not isinstance(content, str):
            raise ValueError(f"message {number} has no content that is a text")
        if any("\ud800" <= letter <= "\udfff" for letter in content):
            raise ValueError(f"message {number} holds half of a surrogate pair, no character")
        if message.get("weight", 1) != 1:
            raise ValueError(f"message {number} has the weight {message['weight']}: all that the "
                             "assistant says is learnt alike; leave the field out")
        if message.get("tool_calls") or message.get("function_call"):
            raise ValueError(f"message {number} calls a tool, for which there are no words here")
    found = [(message["role"], message["content"]) for message in messages]
    if all(role != "assistant" for role, _text in found):
        raise ValueError("the assistant says nothing in it, so there is nothing to learn")
    return found
