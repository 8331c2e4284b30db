"""A text by its characters: a vocabulary of some dozens, and no tokenizer to train or to fetch.

    python train_gpt2.py shakespeare-char-cpu
    python train_gpt2.py demo --data.text input.txt --data.vocab char

As nanoGPT's data/shakespeare_char/prepare.py: the vocabulary is the text's different characters,
sorted, and a character's id its place among them; the first nine tenths are trained on, the last
tenth is held out. There is no end of text and there are no documents: all is one stream. A run's
config.json, and with it every checkpoint, says which characters they are ("characters").
"""

from collections.abc import Sequence

import numpy as np

from data.tokenizer import GPT2, Tokenizer
from launch.errors import BadInput

MOST = 2**16  # characters that uint16 can number


def tokenizer_of(characters: str) -> Tokenizer:
    """The tokenizer of a vocabulary of these characters, in their order; '' stands for GPT-2's."""
    if not characters:
        return GPT2
    ids = {character: i for i, character in enumerate(characters)}

    def encode(text: str) -> list[int]:
        unknown = sorted(set(text) - ids.keys())
        if unknown:
            shown = ", ".join(map(repr, unknown[:5]))
            raise BadInput(f"the model reads {len(ids)} characters, and {shown} is none of them: "
                           f"{shown_characters(characters)}")
        return [ids[character] for character in text]

    def decode(tokens: Sequence[int]) -> str:
        return "".join(characters[token] for token in tokens)

    def token_bytes(token: int) -> bytes:
        return characters[token].encode()

    # nanoGPT's samples begin with a line break.
    first = ids.get("\n", 0)
    return Tokenizer(len(characters), None, first, encode, decode, token_bytes, characters)


def shown_characters(characters: str) -> str:
    """A vocabulary for one line of a message: line breaks and the like as they are escaped, and
    not more than some dozens of them."""
    shown = "".join(repr(character)[1:-1] for character in characters[:100])
    return shown + " ..." * (len(characters) > 100)


def char_tokens(text: str, source: object) -> tuple[np.ndarray, np.ndarray, str]:
    """(train, validation, characters): uint16 tokens of the first nine tenths and of the last.

    Raises BadInput where the text has more characters than a token can number. source: its name.
    """
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")  # (characters,)
    different, tokens = np.unique(code_points, return_inverse=True)
    if len(different) > MOST:
        raise BadInput(f"{source} has {len(different):,} different characters, and {MOST:,} are "
                       "the most: --data.vocab gpt2 takes any text")
    split = int(len(text) * 0.9)
    tokens = tokens.astype(np.uint16)
    return tokens[:split], tokens[split:], "".join(map(chr, different))
