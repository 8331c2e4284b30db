"""Documents in parquet: some row groups are a piece, which is read and decoded by any thread.

Of a damaged file everything is read that decodes: every row group that can be, and of one that
can't be, the rows before the damage.

Arrow leaves its own type of a column in the file, and where that is a dictionary, one value that is
no UTF-8 fails the whole row group. So what fails is read once more as parquet alone knows it.
"""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data.documents import (
    BadFile,
    Documents,
    File,
    Piece,
    Unreadable,
    from_column,
    from_texts,
    joined,
    one_line,
    patiently,
    same,
    unreadable_piece,
)
from launch.errors import BadInput

if TYPE_CHECKING:
    import pyarrow as pa

LARGE_GROUP_BYTES = 1 << 26  # a row group above this is read in order, batch by batch
SAMPLE_ROWS = 1000  # of a file on a disk, that say how long its texts are


def parquet_pieces(
    file: File, number: int, column: str, start: int, piece_bytes: int
) -> Iterator[Piece]:
    """The pieces of a file from the one that holds document `start` on.

    Raises BadFile for a damaged footer, BadInput where the column is missing or holds no strings.
    """
    metadata, _ = _footer(file, column)
    groups: list[int] = []
    first = end = size = 0  # documents [first, end) in `groups`, `size` bytes of text
    for group in range(metadata.num_row_groups):
        about = metadata.row_group(group)
        if end + about.num_rows <= start:  # all of it before the position asked for
            first = end = end + about.num_rows
            continue
        # Of all columns: asking a damaged footer for one of them can abort the process (Arrow 26).
        bytes_here = about.total_byte_size
        if groups and size + bytes_here > piece_bytes:
            yield _Groups(file, metadata, column, groups, first).piece(number)
            groups, first, size = [], end, 0
        # From the Hub a group comes whole, for only a whole one can be asked for again.
        if bytes_here > LARGE_GROUP_BYTES and not file.remote:
            rows = max(1, about.num_rows * piece_bytes // bytes_here)
            large = _Groups(file, metadata, column, [group], first)
            yield from large.in_batches(number, rows, start)
            first = end = end + about.num_rows
            continue
        groups = [*groups, group]
        end, size = end + about.num_rows, size + bytes_here
    if groups:
        yield _Groups(file, metadata, column, groups, first).piece(number)


def parquet_share(file: File, column: str) -> float:
    """About how many bytes of text a byte of the file holds.

    On a disk its first rows say so. On the Hub they would be a download, and the footer does.
    """
    metadata, index = _footer(file, column)
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    if file.remote:
        text_bytes = sum(group.column(index).total_uncompressed_size for group in groups)
        return text_bytes / max(1, file.size)
    for group, about in enumerate(groups):
        if about.num_rows:
            texts = _Groups(file, metadata, column, [group], 0).first_rows()
            if len(texts):  # of those that are UTF-8
                return texts.nbytes / len(texts) * metadata.num_rows / max(1, file.size)
    return 0.0


def _footer(file: File, column: str) -> tuple[Any, int]:
    """(a parquet file's metadata, the number of the column). Raises BadInput without the column."""
    import pyarrow.parquet as pq

    def read() -> Any:
        with file.open() as handle:
            parquet = pq.ParquetFile(handle)
            return parquet.metadata, parquet.schema_arrow

    metadata, schema = patiently(file, read)
    if column not in schema.names:
        raise BadInput(f"{file.name} has no column {column!r}; --column takes one of: "
                       f"{', '.join(schema.names)}")
    if schema.names.count(column) > 1:
        raise BadInput(f"{file.name} has {schema.names.count(column)} columns called {column!r}, "
                       "and documents are read from one: rename the others")
    kind = schema.field(column).type
    if not _string_like(kind):
        raise BadInput(f"column {column!r} of {file.name} holds {kind}, and documents are strings")
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    return metadata, names.index(column)


def _string_like(kind: "pa.DataType") -> bool:
    """Whether a column is of strings, of bytes that may be some, or of nothing but nulls."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):  # JSON, for one, is text in a type of its own
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_null(kind)
    )


class _Groups:
    """One column of some row groups of a file, whose first document has the number `first`."""

    def __init__(
        self, file: File, metadata: Any, column: str, groups: list[int], first: int
    ) -> None:
        self.file, self.metadata, self.column = file, metadata, column
        self.groups, self.first = groups, first
        self.count = sum(metadata.row_group(group).num_rows for group in groups)

    def piece(self, number: int) -> Piece:
        return Piece(number, self.first, self.count, self.load)

    def load(self) -> Documents:
        try:
            return patiently(self.file, self._read)
        except BadFile:
            return self._what_decodes()

    def in_batches(self, number: int, rows: int, start: int) -> Iterator[Piece]:
        """Pieces of a row group that shouldn't be in memory whole, read one after the other.

        What fails is asked for again, at last row by row: damage costs no row before it.
        """
        import pyarrow as pa

        given = max(self.first, start)  # the documents before this one are out
        problem = ""
        reader = self
        for size in (rows, rows, 1):
            if problem:
                reader = self._without_arrow_schema()
            at = self.first
            try:
                for column in reader._batches(size):
                    new = column.slice(max(0, given - at))
                    at += len(column)
                    if len(new):
                        documents = from_column(new, self.file.name, given)
                        yield Piece(number, given, len(new), functools.partial(same, documents))
                        given = at
                return
            except (OSError, pa.ArrowException) as error:
                problem = self._problem(given, error)
        yield unreadable_piece(number, given, problem)

    def first_rows(self) -> "pa.Array":
        def read() -> "pa.Array":
            for column in self._batches(SAMPLE_ROWS):
                return from_column(column, self.file.name, 0).texts
            return from_texts([], [], []).texts

        return patiently(self.file, read)

    def _open(self, handle: Any, pre_buffer: bool) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(handle, metadata=self.metadata, pre_buffer=pre_buffer,
                              page_checksum_verification=True)

    def _read(self) -> Documents:
        with self.file.open() as handle:
            # pre_buffer: the column's pages come in one request, the others not at all.
            table = self._open(handle, pre_buffer=True).read_row_groups(
                self.groups, columns=[self.column], use_threads=False
            )
            return from_column(table.column(self.column), self.file.name, self.first)

    def _batches(self, rows: int) -> Iterator["pa.Array"]:
        with self.file.open() as handle:
            parquet = self._open(handle, pre_buffer=False)
            for batch in parquet.iter_batches(
                rows, row_groups=self.groups, columns=[self.column], use_threads=False
            ):
                yield batch.column(self.column)

    def _what_decodes(self) -> Documents:
        """The row groups that can be read, and the beginning of each that can't."""
        parts: list[Documents] = []
        first = self.first
        plain = self._without_arrow_schema()
        for group in self.groups:
            alone = _Groups(self.file, plain.metadata, self.column, [group], first)
            try:
                parts.append(patiently(self.file, alone._read))
            except BadFile:
                parts += alone._until_damage()
            first += alone.count
        return joined(parts)

    def _until_damage(self) -> list[Documents]:
        """Row by row, so that the damage costs no row before it."""
        import pyarrow as pa

        parts: list[Documents] = []
        first = self.first
        try:
            for column in self._batches(1):
                parts.append(from_column(column, self.file.name, first))
                first += len(column)
        except (OSError, pa.ArrowException) as error:
            lost = Unreadable(first, self._problem(first, error))
            parts.append(from_texts([], [], [lost]))
        return parts

    def _without_arrow_schema(self) -> "_Groups":
        """The same, its columns of the types that parquet knows, and no dictionaries."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        def read() -> Any:
            with self.file.open() as handle:
                handle.seek(self.file.size - 8)  # the footer's length, and PAR1
                length = int.from_bytes(handle.read(4), "little")
                handle.seek(self.file.size - 8 - length)
                footer = handle.read(length + 8).replace(b"ARROW:schema", b"arrow_schema")
            return pq.read_metadata(pa.BufferReader(b"PAR1" + footer))

        try:
            metadata = patiently(self.file, read)
        except BadFile:  # which can be read no more
            return self
        return _Groups(self.file, metadata, self.column, self.groups, self.first)

    def _problem(self, first: int, error: Exception) -> str:
        """What is wrong with the documents from number `first` to the last of these groups."""
        last = self.first + self.count
        return f"{self.file.name}: {one_line(error)} (documents {first + 1:,} to {last:,})"
