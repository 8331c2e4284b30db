"""Files, pieces of them, and the documents in a piece: what the readers of every format share.

A document that can't be read never costs more than itself: a reader hands back those that can
be, each with its number in the file, and beside them a line for each that can't.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.errors import Failed

if TYPE_CHECKING:
    import pyarrow as pa

ATTEMPTS = 4  # at a piece of a file on the Hub, 1, 2 and 4 seconds apart


class BadFile(Exception):
    """Bytes that can't be decoded. The message names the file."""


@dataclass(frozen=True)
class File:
    """A file of documents. open() gives a new handle; size in bytes, as stored."""

    name: str
    size: int
    open: Callable[[], Any]
    remote: bool = False


@dataclass(frozen=True)
class Unreadable:
    """A document, or a row of them, that can't be read.

    document: the number, from 0, of the first of them in its file; problem: a line that names
    the file, the documents and what is wrong with them.
    """

    document: int
    problem: str


@dataclass(frozen=True)
class Documents:
    """The documents of a piece.

    texts: (documents,) Arrow large_string without nulls, all of it UTF-8; numbers: (documents,)
    int64, rising, where each stands in its file, from 0.
    """

    texts: "pa.Array"
    numbers: np.ndarray
    unreadable: list[Unreadable]


@dataclass(frozen=True)
class Piece:
    """Documents [first, first + count) of a file, those that can't be read included."""

    file: int
    first: int
    count: int
    load: Callable[[], Documents]


def from_column(column: Any, name: str, first: int) -> Documents:
    """The documents in an Arrow column of any string-like type; a null is an empty document."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # By way of bytes, for a cast of bytes to strings stops at the first that are no UTF-8.
    column = column.cast(pa.large_binary())
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if column.null_count:  # filling imports pandas where it's installed: half a second
        column = pc.fill_null(column, b"")
    texts = column.view(pa.large_string())
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return _only_utf8(column.to_pylist(), name, first)
    return Documents(texts, np.arange(first, first + len(texts)), [])


def _only_utf8(contents: list[bytes], name: str, first: int) -> Documents:
    texts, numbers, unreadable = [], [], []
    for number, content in enumerate(contents, start=first):
        try:
            texts.append(content.decode())
            numbers.append(number)
        except UnicodeDecodeError as error:
            problem = f"{name}, document {number + 1:,}: {one_line(error)}"
            unreadable.append(Unreadable(number, problem))
    return from_texts(texts, numbers, unreadable)


def from_texts(
    texts: list[str], numbers: list[int], unreadable: list[Unreadable]
) -> Documents:
    """Python's strings, all of whole characters, as the documents of a piece."""
    import pyarrow as pa

    return Documents(
        pa.array(texts, pa.large_string()), np.array(numbers, dtype=np.int64), unreadable
    )


def joined(parts: list[Documents]) -> Documents:
    """Several pieces' documents, one after the other; at least one piece."""
    import pyarrow as pa

    return Documents(
        pa.concat_arrays([part.texts for part in parts]),
        np.concatenate([part.numbers for part in parts]),
        [problem for part in parts for problem in part.unreadable],
    )


def unreadable_piece(file: int, first: int, problem: str) -> Piece:
    """A piece without documents that says what is wrong from document `first` on."""
    nothing = from_texts([], [], [Unreadable(first, problem)])
    return Piece(file, first, 0, functools.partial(same, nothing))


def same(documents: Documents) -> Documents:
    """What the load() of a piece that is in memory already gives."""
    return documents


def patiently(file: File, read: Callable[[], Any]) -> Any:
    """read(), again and again where the file lies on the Hub.

    Raises BadFile if the bytes that come can't be decoded, Failed if none come.
    """
    import pyarrow as pa

    attempts = ATTEMPTS if file.remote else 1
    for attempt in range(attempts):
        if attempt:
            time.sleep(2.0 ** (attempt - 1))
        try:
            return read()
        except (pa.ArrowException, UnicodeDecodeError) as error:  # the second of a column's name
            problem: Exception = BadFile(f"{file.name}: {one_line(error)}")
        except Exception as error:
            if isinstance(error, OSError) and not file.remote:
                raise BadFile(f"{file.name}: {one_line(error)}") from None
            if not file.remote:
                raise
            problem = Failed(f"can't read {file.name} from the Hub: {one_line(error)}; the same "
                             "command goes on from the last finished shard")
    raise problem


def one_line(error: Exception) -> str:
    """An error's first line, or its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
