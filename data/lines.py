"""Documents in text files: JSON lines (plain, .gz, .zst), and .txt that `<|endoftext|>` may split.

Files of any size and any compression are read in bounded memory: 1 MB at a time, and no document
is longer than RECORD_BYTES.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data.documents import (
    Documents,
    File,
    Piece,
    Unreadable,
    from_texts,
    one_line,
    unreadable_piece,
)
from data.tokenizer import EOT_TEXT
from launch.errors import BadInput

RECORD_BYTES = 1 << 26  # a document, or its line of JSON; a long novel has 3 MB
READ_BYTES = 1 << 20
SAMPLE_BYTES = 1 << 22  # of JSON, that say how much of it is text
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
DECODER_BYTES = 1 << 16  # what Arrow hands a decoder at once
BORDER = EOT_TEXT.encode()

Record = bytes | None  # None stands for one that is longer than RECORD_BYTES
Parse = Callable[[list[Record], int], Documents]  # records, the number of the first


def json_pieces(
    file: File, number: int, column: str, start: int, piece_bytes: int
) -> Iterator[Piece]:
    """The pieces of a file of JSON lines from the one that holds document `start` on.

    load() raises BadInput where none of the first documents has the column.
    """

    def parse(records: list[Record], first: int) -> Documents:
        return _parse_json(file.name, records, first, column)

    content = Content(file)
    return _pieces(number, content, _json_lines(content), parse, start, piece_bytes)


def text_pieces(
    file: File, number: int, split_text: bool, start: int, piece_bytes: int
) -> Iterator[Piece]:
    """The pieces of a text: one document, or with split_text one from border to border."""

    def parse(records: list[Record], first: int) -> Documents:
        return _parse_text(file.name, records, first)

    content = Content(file)
    texts = _between_borders(content, BORDER if split_text else b"")
    return _pieces(number, content, texts, parse, start, piece_bytes)


def count_borders(file: File) -> int:
    """How often `<|endoftext|>` stands in a file."""
    return sum(1 for _ in split(Content(file), BORDER)) - 1


def json_share(file: File, column: str) -> float:
    """About how many bytes of text a byte of the file holds, judged by its first megabytes."""
    content = Content(file)
    lines: list[Record] = []
    size = 0
    for line in _json_lines(content):
        lines.append(line)
        size += len(line or b"")
        if size >= SAMPLE_BYTES:
            break
    texts = _parse_json(file.name, lines, 0, column).texts
    decompressed = content.given / max(1, content.taken)
    return texts.nbytes / max(1, size) * decompressed


class Content:
    """The bytes of a file, decompressed, a megabyte at a time, as far as they can be read.

    problem: what ended them early, or empty. given: bytes that came out so far. taken: bytes of
    the file that they were, rounded up to a decoder's portion.
    """

    def __init__(self, file: File) -> None:
        self.file = file
        self.compression = COMPRESSIONS.get(Path(file.name).suffix.lower())
        self.problem, self.given, self.taken = "", 0, 0

    def __iter__(self) -> Iterator[bytes]:
        """A decoder that meets damage drops what it had decoded in that call.

        So what lies before the damage is asked for again in smaller portions, and in the end
        both what goes in and what comes out is a single byte.
        """
        import pyarrow as pa

        problem = ""
        undamaged = self.file.size
        for portion in (READ_BYTES, 1024, 1):
            try:
                with self.file.open() as handle:
                    yield from self._parts(handle, portion, undamaged)
                return
            except (OSError, EOFError, pa.ArrowException) as error:
                problem = one_line(error)
                undamaged = max(0, self.taken - DECODER_BYTES)
        self.problem = problem

    def _parts(self, handle: Any, portion: int, undamaged: int) -> Iterator[bytes]:
        """What comes after the bytes that were given already."""
        import pyarrow as pa

        stream = handle
        if self.compression:
            source = pa.PythonFile(_Source(handle, undamaged), mode="r")
            stream = pa.CompressedInputStream(source, self.compression)
        known = 0
        while known < self.given:
            known += len(stream.read(min(READ_BYTES, self.given - known)))
        while part := self._read(handle, stream, portion):
            self.given += len(part)
            yield part

    def _read(self, handle: Any, stream: Any, portion: int) -> bytes:
        try:
            return stream.read(portion)
        finally:
            self.taken = handle.tell()


class _Source:
    """A file for Arrow's decoder, which gets it byte by byte from `undamaged` on."""

    closed = False

    def __init__(self, handle: Any, undamaged: int) -> None:
        self.handle, self.undamaged = handle, undamaged

    def read(self, size: int) -> bytes:
        left = self.undamaged - self.handle.tell()
        return self.handle.read(min(size, left) if left > 0 else 1)

    def close(self) -> None:
        self.closed = True


def split(chunks: Iterable[bytes], separator: bytes) -> Iterator[Record]:
    """What lies between the separators, as bytes.split, in bounded memory.

    An empty separator splits nothing. Chunks are cut anywhere, also within a separator.
    """
    cut_off = max(0, len(separator) - 1)  # bytes that may begin a separator
    opened: list[bytes] = []  # of the record that has no end yet, but for its last bytes, `tail`
    size, tail = 0, b""
    for chunk in chunks:
        content = tail + chunk
        *ended, content = content.split(separator) if separator else [content]
        for record in ended:
            opened.append(record)
            yield b"".join(opened) if size + len(record) <= RECORD_BYTES else None
            opened, size = [], 0
        known = max(0, len(content) - cut_off)
        opened.append(content[:known])
        size, tail = size + known, content[known:]
        if size > RECORD_BYTES:
            opened = []
    opened.append(tail)
    yield b"".join(opened) if size + len(tail) <= RECORD_BYTES else None


def _json_lines(content: Content) -> Iterator[Record]:
    """The lines that aren't blank. What damage has cut off is one only if it is whole JSON."""
    for line in split(content, b"\n"):
        if line is not None and _blank(line):
            continue
        if not content.problem or _is_json(line):
            yield line


def _between_borders(content: Content, border: bytes) -> Iterator[Record]:
    """The documents of a text. White space alone is none, but where it's the whole text."""
    borders, text = -1, None
    for text in split(content, border):
        if content.problem:  # and this text is cut off
            return
        borders += 1
        if text is None or not _blank(text):
            yield text
    if borders == 0 and text is not None and _blank(text):
        yield text


def _blank(content: bytes) -> bool:
    return not content or content.isspace()


def _pieces(
    number: int, content: Content, records: Iterator[Record], parse: Parse, start: int,
    piece_bytes: int,
) -> Iterator[Piece]:
    first = size = 0
    held: list[Record] = []
    for record in records:
        held.append(record)
        size += len(record or b"")
        if size >= piece_bytes:
            if first + len(held) > start:
                yield Piece(number, first, len(held), functools.partial(parse, held, first))
            first, held, size = first + len(held), [], 0
    if held:
        yield Piece(number, first, len(held), functools.partial(parse, held, first))
    if content.problem:
        first += len(held)
        problem = f"{content.file.name}: {content.problem} (document {first + 1:,} and all after)"
        yield unreadable_piece(number, first, problem)


class _NoColumn(ValueError):
    """A line of JSON without the field that holds the documents."""


def _parse_json(name: str, lines: list[Record], first: int, column: str) -> Documents:
    """Raises BadInput where a file begins with several documents and none has the column."""
    texts: list[str] = []
    numbers: list[int] = []
    unreadable: list[Unreadable] = []
    without_column = 0
    for number, line in enumerate(lines, start=first):
        where = f"{name}, document {number + 1:,}"
        try:
            texts.append(_json_text(line, column))
            numbers.append(number)
        except _NoColumn as error:
            without_column += 1
            unreadable.append(Unreadable(number, f"{where} {error}"))
        except (ValueError, RecursionError) as error:
            unreadable.append(Unreadable(number, f"{where}: {one_line(error)}"))
    if first == 0 and without_column == len(lines) > 1:
        raise BadInput(unreadable[0].problem)
    return from_texts(texts, numbers, unreadable)


def _json_text(line: Record, column: str) -> str:
    """The document in a line of JSON; null is an empty one. Raises ValueError or RecursionError."""
    if line is None:
        raise ValueError(f"longer than {RECORD_BYTES:,} bytes; is there a line for each document?")
    record = json.loads(line)
    if not isinstance(record, dict):
        raise _NoColumn(f"has no {column!r}: it is a {type(record).__name__}")
    if column not in record:
        raise _NoColumn(f"has no {column!r}; --column takes one of: {', '.join(record)}")
    text = record[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{column!r} is a {type(text).__name__}, and documents are strings")
    return _whole_characters(text)


def _is_json(line: Record) -> bool:
    try:
        return line is not None and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _whole_characters(text: str) -> str:
    """JSON can spell half a surrogate pair; it becomes U+FFFD, as in tiktoken."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _parse_text(name: str, contents: list[Record], first: int) -> Documents:
    texts: list[str] = []
    numbers: list[int] = []
    unreadable: list[Unreadable] = []
    for number, content in enumerate(contents, start=first):
        where = name if first == 0 and len(contents) == 1 else f"{name}, document {number + 1:,}"
        if content is None:
            problem = f"{where}: longer than {RECORD_BYTES:,} bytes, without {EOT_TEXT} in it"
            unreadable.append(Unreadable(number, problem))
            continue
        try:
            # A byte order mark can only begin a file.
            text = content.decode("utf-8" if number else "utf-8-sig")
            if "\0" in text:
                raise ValueError("a zero byte, so it is UTF-16 or no text")
            texts.append(text)
            numbers.append(number)
        except ValueError as error:
            unreadable.append(Unreadable(number, f"{where}: {one_line(error)}"))
    return from_texts(texts, numbers, unreadable)
