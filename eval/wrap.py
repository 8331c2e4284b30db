"""A model's text on a console: lines broken between words, control characters shown as such.

    print("".join(wrap(["What a ", "model says"], width=8)))   # pieces may come one by one

For reading only: what is piped or written to metrics.jsonl is the exact text.
"""

import shutil
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator

WIDEST = 100  # columns; longer lines are hard to read


def console_width() -> int:
    """Columns of a line of text: the terminal's, but not more than can be read with ease."""
    return min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)


def wrap(pieces: Iterable[str], width: int) -> Iterator[str]:
    """The text as its pieces come, a word as soon as it is whole, no line longer than `width`.

    Line breaks of the text's own stay. A word that is longer than a line is broken.
    """
    column, gap, word = 0, "", ""  # gap: the spaces before the word
    for piece in pieces:
        shown = ""
        for character in visible(piece):
            if character not in " \n" and len(word) < width:
                word += character
                continue
            text, column = _place(gap, word, column, width)
            shown += text
            if word:
                gap, word = "", ""
            if character == "\n":
                shown += "\n"
                column, gap = 0, ""
            elif character == " ":
                gap += " "
            else:
                word = character
        yield shown
    yield _place(gap, word, column, width)[0]


def _place(gap: str, word: str, column: int, width: int) -> tuple[str, int]:
    """A word after its gap, or on the next line; and the column after it."""
    if not word:
        return "", column
    if column + len(gap) + len(word) <= width:
        return gap + word, column + len(gap) + len(word)
    if column == 0:
        return word, len(word)
    return "\n" + word, len(word)


def indented(text: str) -> str:
    """A text as a block of its own, four columns from the left."""
    lines = "".join(wrap([text], console_width() - 4))
    return textwrap.indent(lines, "    ")


def visible(text: str) -> str:
    r"""Control characters as \x1b, so that no text moves the cursor or colours the console."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if unicodedata.category(character) != "Cc" or character == "\n":
        return character
    return character.encode("unicode_escape").decode()
