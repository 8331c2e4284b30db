"""Where documents come from: local parquet, jsonl (plain, .gz, .zst) and txt files, or the Hub.

A source is a list of files, and a file a row of pieces: some megabytes of documents that are read
and decoded by any thread. A position is (file, document in it), so reading starts anywhere. The
Hub's parquet is streamed: `datasets` finds the files of a pinned revision, and each piece is a
range request of the text column alone, tried again on its own when the network fails.
"""

import functools
import glob
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from launch.errors import BadInput, Failed

if TYPE_CHECKING:
    import pyarrow as pa

PIECE_BYTES = 1 << 23  # of text: some thousand documents, some milliseconds of every core
LARGE_GROUP_BYTES = 1 << 26  # a row group above this is read in order, batch by batch
TEXT_FILE_BYTES = 1 << 27  # a .txt is one document, held in memory
ATTEMPTS = 4  # at a piece of a file on the Hub, 1, 2 and 4 seconds apart
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ENDINGS = (".parquet", *JSON_LINES, ".txt")


class BadFile(Exception):
    """A file that can't be decoded: the job stops, or goes on without the rest of it."""


@dataclass(frozen=True)
class File:
    """A file of documents. open() gives a new handle; size in bytes, as stored."""

    name: str
    size: int
    open: Callable[[], Any]
    remote: bool = False


@dataclass(frozen=True)
class Piece:
    """Documents [first, first + count) of a file; load() reads them as an Arrow large_string."""

    file: int
    first: int
    count: int
    load: Callable[[], "pa.Array"]


def local_files(pattern: str) -> list[File]:
    """The files that a path, folder or glob names, sorted. Raises BadInput where there are none."""
    import pyarrow as pa

    folder = os.path.join(pattern, "*") if os.path.isdir(pattern) else pattern
    paths = sorted(path for path in glob.glob(folder, recursive=True) if os.path.isfile(path))
    if not paths:
        raise BadInput(f"--source {pattern}: no such file (put a pattern with * in quotes)")
    known = [path for path in paths if path.endswith(ENDINGS)]
    if len(known) < len(paths) and (not known or not os.path.isdir(pattern)):
        strange = next(path for path in paths if path not in known)
        raise BadInput(f"{strange}: documents are read from {', '.join(ENDINGS)} files")
    return [
        File(Path(path).name, os.path.getsize(path), functools.partial(pa.OSFile, path))
        for path in known
    ]


def hub_files(repo: str, name: str, revision: str) -> tuple[list[File], str]:
    """(the training files of a data set on the Hub, the commit they are pinned to).

    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured. Raises BadInput for a data set or
    revision that isn't there or in offline mode, Failed where the Hub can't be reached.
    """
    try:
        import datasets
        from huggingface_hub import HfApi, HfFileSystem
        from huggingface_hub import errors as hub
    except ImportError:
        raise BadInput("reading from the Hub takes `pip install datasets`; "
                       "--source reads local files") from None
    try:
        commit = HfApi().dataset_info(repo, revision=revision or None).sha or ""
        datasets.disable_progress_bars()
        builder = datasets.load_dataset_builder(repo, name, revision=commit)
        names = [str(path) for path in builder.config.data_files["train"]]
        system = HfFileSystem()
        sizes = [int(system.info(path)["size"]) for path in names]
    except hub.OfflineModeIsEnabled:
        raise BadInput("HF_HUB_OFFLINE is set, so the Hub isn't asked: "
                       "--source reads local files") from None
    except hub.RevisionNotFoundError:
        raise BadInput(f"{repo} has no revision {revision!r} on the Hub") from None
    except (hub.RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError):
        raise BadInput(f"there is no data set {repo} on the Hub, or it needs a token") from None
    except ValueError as error:  # an unknown configuration; datasets lists those there are
        raise BadInput(f"{repo}: {str(error).splitlines()[0]}") from None
    except Exception as error:  # every library below has connection errors of its own
        raise Failed(f"can't list the files of {repo} on the Hub: {one_line(error)}") from None

    files = [
        File(path.rsplit(f"@{commit}/", 1)[-1], size, remote=True,
             open=functools.partial(system.open, path, cache_type="none"))
        for path, size in zip(names, sizes, strict=True)
    ]
    for file in files:
        if not file.name.endswith(".parquet"):
            raise BadInput(f"{repo}: {file.name} is no parquet file; download it and use --source")
    return files, commit


def pieces(
    files: list[File], column: str, file: int = 0, document: int = 0
) -> Iterator[Piece]:
    """All pieces from the one that holds this document on, in order.

    A damaged file ends in a piece whose load() raises BadFile. Raises BadInput where the column is
    missing.
    """
    for number in range(file, len(files)):
        start = document if number == file else 0
        name = files[number].name
        try:
            if name.endswith(".parquet"):
                yield from _parquet(files[number], number, column, start)
            elif name.endswith(".txt"):
                yield _text(files[number], number)
            else:
                yield from _json_lines(files[number], number, column, start)
        except BadFile as problem:
            yield Piece(number, start, 0, _raiser(problem))


def text_share(file: File, column: str) -> float:
    """About how many bytes of text a byte of such a file holds; from the footer of parquet."""
    if file.name.endswith(".parquet"):
        metadata, index = _footer(file, column)
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        return sum(g.column(index).total_uncompressed_size for g in groups) / max(1, file.size)
    return 3.0 if file.name.endswith((".gz", ".zst")) else 1.0


def _parquet(file: File, number: int, column: str, start: int) -> Iterator[Piece]:
    metadata, index = _footer(file, column)
    groups: list[int] = []
    first = end = size = 0  # documents [first, end) in `groups`, `size` bytes of text
    for group in range(metadata.num_row_groups):
        about = metadata.row_group(group)
        if end + about.num_rows <= start:  # all of it before the position asked for
            first = end = end + about.num_rows
            continue
        bytes_here = about.column(index).total_uncompressed_size
        if groups and size + bytes_here > PIECE_BYTES:
            yield Piece(number, first, end - first, _group_reader(file, metadata, groups, column))
            groups, first, size = [], end, 0
        if bytes_here > LARGE_GROUP_BYTES:
            yield from _large_group(file, metadata, number, group, first, column, start)
            first = end = end + about.num_rows
            continue
        groups = [*groups, group]
        end, size = end + about.num_rows, size + bytes_here
    if groups:
        yield Piece(number, first, end - first, _group_reader(file, metadata, groups, column))


def _footer(file: File, column: str) -> tuple[Any, int]:
    """(a parquet file's metadata, the number of the column). Raises BadInput without the column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read() -> Any:
        with file.open() as handle:
            parquet = pq.ParquetFile(handle)
            return parquet.metadata, parquet.schema_arrow

    metadata, schema = _patiently(file, read)
    if column not in schema.names:
        raise BadInput(f"{file.name} has no column {column!r}; --column takes one of: "
                       f"{', '.join(schema.names)}")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadInput(f"column {column!r} of {file.name} holds {kind}, and documents are strings")
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    return metadata, names.index(column)


def _group_reader(
    file: File, metadata: Any, groups: list[int], column: str
) -> Callable[[], "pa.Array"]:
    import pyarrow.parquet as pq

    def read() -> "pa.Array":
        with file.open() as handle:
            # pre_buffer: the column's pages come in one request, the others not at all.
            parquet = pq.ParquetFile(
                handle, metadata=metadata, pre_buffer=True, page_checksum_verification=True
            )
            return _strings(
                parquet.read_row_groups(groups, columns=[column], use_threads=False).column(column)
            )

    return lambda: _patiently(file, read)


def _large_group(
    file: File, metadata: Any, number: int, group: int, first: int, column: str, start: int
) -> Iterator[Piece]:
    """A row group that shouldn't be in memory whole, as batches read one after the other."""
    import pyarrow.parquet as pq

    about = metadata.row_group(group)
    rows = max(1, about.num_rows * PIECE_BYTES // max(1, about.total_byte_size))
    try:
        with file.open() as handle:
            parquet = pq.ParquetFile(
                handle, metadata=metadata, pre_buffer=False, page_checksum_verification=True
            )
            for batch in parquet.iter_batches(
                rows, row_groups=[group], columns=[column], use_threads=False
            ):
                if first + len(batch) > start:
                    texts = _strings(batch.column(0))
                    yield Piece(number, first, len(batch), functools.partial(_same, texts))
                first += len(batch)
    except (OSError, ValueError) as error:
        raise BadFile(f"{file.name}: {one_line(error)}") from None


def _strings(column: Any) -> "pa.Array":
    """Any Arrow column of strings as one large_string array without nulls."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = column.cast(pa.large_string())
    if column.null_count:  # filling imports pandas where it's installed: half a second
        column = pc.fill_null(column, "")
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _json_lines(file: File, number: int, column: str, start: int) -> Iterator[Piece]:
    import pyarrow as pa

    first = 0
    lines: list[bytes] = []
    size = 0
    try:
        with file.open() as handle:
            for line in _lines(handle, file.name):
                lines.append(line)
                size += len(line)
                if size >= PIECE_BYTES:
                    if first + len(lines) > start:
                        yield Piece(number, first, len(lines),
                                    _json_reader(file.name, lines, first, column))
                    first, lines, size = first + len(lines), [], 0
    except (OSError, EOFError, pa.ArrowException) as error:
        raise BadFile(f"{file.name}: {one_line(error)}") from None
    if lines:
        yield Piece(number, first, len(lines), _json_reader(file.name, lines, first, column))


def _lines(handle: Any, name: str) -> Iterator[bytes]:
    """The lines of a file that aren't blank, decompressed."""
    import pyarrow as pa

    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(name).suffix)
    if compression:
        handle = pa.CompressedInputStream(handle, compression)
    reader: IO[bytes] = io.BufferedReader(handle, 1 << 20)
    return (line for line in reader if not line.isspace())


def _json_reader(
    name: str, lines: list[bytes], first: int, column: str
) -> Callable[[], "pa.Array"]:
    import pyarrow as pa

    def read() -> "pa.Array":
        texts = []
        for i, line in enumerate(lines, start=first + 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise BadFile(f"{name}, document {i:,}: {one_line(error)}") from None
            if not isinstance(record, dict) or column not in record:
                fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise BadInput(f"{name}, document {i:,} has no {column!r}; --column takes one of: "
                               f"{fields}")
            text = record[column]
            if text is not None and not isinstance(text, str):
                raise BadInput(f"{name}, document {i:,}: {column!r} is a "
                               f"{type(text).__name__}, and documents are strings")
            texts.append(_whole_characters(text or ""))
        return pa.array(texts, pa.large_string())

    return read


def _whole_characters(text: str) -> str:
    """JSON can spell half a surrogate pair; it becomes U+FFFD, as in tiktoken."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _text(file: File, number: int) -> Piece:
    import pyarrow as pa

    if file.size > TEXT_FILE_BYTES:
        raise BadInput(f"{file.name} is {file.size:,} bytes long, and a .txt file is one document: "
                       "split it, or write a jsonl file with a document a line")

    def read() -> "pa.Array":
        try:
            with file.open() as handle:
                return pa.array([handle.read().decode("utf-8-sig")], pa.large_string())
        except (OSError, UnicodeDecodeError) as error:
            raise BadFile(f"{file.name}: {one_line(error)}") from None

    return Piece(number, 0, 1, read)


def _patiently(file: File, read: Callable[[], Any]) -> Any:
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
        except pa.ArrowException as error:
            problem: Exception = BadFile(f"{file.name}: {one_line(error)}")
        except Exception as error:
            if isinstance(error, OSError) and not file.remote:
                raise BadFile(f"{file.name}: {one_line(error)}") from None
            if not file.remote:
                raise
            problem = Failed(f"can't read {file.name} from the Hub: {one_line(error)}; the same "
                             "command goes on from the last finished shard")
    raise problem


def _same(texts: "pa.Array") -> "pa.Array":
    return texts


def _raiser(problem: Exception) -> Callable[[], Any]:
    def load() -> Any:
        raise problem

    return load


def one_line(error: Exception) -> str:
    """An error's first line, or its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
