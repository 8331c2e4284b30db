"""Where documents come from: local parquet, JSON lines and txt files, or the Hub.

A source is a list of files, and a file a row of pieces: some megabytes of documents that are read
and decoded by any thread. A position is (file, document in it), so reading starts anywhere. The
Hub's parquet is streamed: `datasets` finds the files of a pinned revision, and each piece is a
range request of the text column alone, tried again on its own when the network fails.
"""

import functools
import glob
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from data.documents import BadFile, File, Piece, one_line, unreadable_piece
from data.lines import count_borders, json_pieces, json_share, text_pieces
from data.parquet import parquet_pieces, parquet_share
from launch import cli
from launch.errors import BadInput, Failed
from launch.files import refuse_lfs_pointer

PIECE_BYTES = 1 << 23  # of text: some thousand documents, some milliseconds of every core
KINDS = {  # endings of file names; .json.gz is what C4 calls its JSON lines
    "parquet": (".parquet",),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst"),
    "txt": (".txt",),
}
ENDINGS = ", ".join(ending for endings in KINDS.values() for ending in endings)
SHOWN = 5  # names of files in a line
NO_DOCUMENTS = ("readme", "license", "licence", "notice")  # .txt files about a folder of others


def local_files(source: str) -> list[File]:
    """The files that a path, folder or pattern names, sorted; prints what is read and left out.

    A folder is read with all below it, but for hidden files. Raises BadInput where there are no
    files, a link leads nowhere, or a folder holds more than one kind.
    """
    paths, folder = _matches(source)
    if not paths and folder:
        raise BadInput(f"--source {source} holds no files, or hidden ones alone")
    if not paths:
        raise BadInput(f"--source {source}: no such file (put a pattern with * in quotes)")
    _refuse_dangling_links(paths)
    read = _documents_once(paths, folder)
    left_out = [path for path in paths if path not in read]
    if not read:
        raise BadInput(f"{left_out[0]}: documents are read from {ENDINGS} files, and "
                       "from no folders, pipes or devices called so")
    if folder:
        _refuse_mixed_kinds(folder, read)
    for path in read:
        refuse_lfs_pointer(Path(path))
    print(f"reading {_listed(read)}" + (f"; leaving out {_listed(left_out)}" if left_out else ""))
    above = os.path.commonpath([os.path.dirname(path) for path in read]) or "."
    return [
        File(Path(os.path.relpath(path, above)).as_posix(), os.path.getsize(path),
             functools.partial(_open, path))
        for path in read
    ]


def _open(path: str) -> Any:
    """The file as one of Arrow's, which other threads read meanwhile, if Arrow takes its name."""
    import pyarrow as pa

    try:
        return pa.OSFile(path)
    except UnicodeEncodeError:  # a name that is no UTF-8
        return pa.PythonFile(open(path, "rb"), mode="r")


def kind(name: str) -> str:
    """parquet, jsonl, txt, or empty for a file that holds no documents."""
    name = name.lower()
    return next((kind for kind, endings in KINDS.items() if name.endswith(endings)), "")


def _matches(source: str) -> tuple[list[str], str]:
    """(what a source names but for folders, sorted; the source, if it names folders alone)."""
    literal = pattern = ""
    for part in Path(source).parts or ["."]:
        literal = os.path.join(literal, part)
        # What is there is no pattern: `[v1] data/*.parquet` names a folder with brackets.
        pattern = os.path.join(pattern, glob.escape(part) if os.path.lexists(literal) else part)
    found = sorted(glob.glob(pattern, recursive=True))
    files = [path for path in found if not os.path.isdir(path)]
    if files:
        return files, ""
    seen: set[str] = set()
    below = sorted(path for folder in found for path in _below(folder, seen))
    return below, source if found else ""


def _below(folder: str, seen: set[str]) -> Iterator[str]:
    """All that isn't hidden in a folder and its subfolders; links are followed, once."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise BadInput(f"can't read {folder}: {error.strerror}") from None
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            yield from _below(path, seen)
        else:
            yield path


def _refuse_dangling_links(paths: list[str]) -> None:
    for path in paths:
        if not os.path.exists(path):
            raise BadInput(f"{path} is a link to {os.readlink(path)}, which isn't there: finish "
                           "the download, or remove the link")


def _documents_once(paths: list[str], folder: str) -> dict[str, None]:
    """The paths of documents, each file by one of its names alone, in their order."""
    read: dict[str, None] = {}
    seen: set[str] = set()
    for path in paths:
        stem = Path(path).stem.lower()
        about_others = folder and kind(path) == "txt" and stem in NO_DOCUMENTS
        real = os.path.realpath(path)
        if os.path.isfile(path) and kind(path) and not about_others and real not in seen:
            seen.add(real)
            read[path] = None
    return read


def _refuse_mixed_kinds(folder: str, paths: Iterable[str]) -> None:
    kinds = Counter(kind(path) for path in paths)
    if len(kinds) > 1:
        found = ", ".join(f"{count:,} {name}" for name, count in kinds.items())
        ending = KINDS[max(kinds, key=kinds.__getitem__)][0]
        pattern = os.path.join(folder, "**", f"*{ending}")
        raise BadInput(f"{folder} holds files of several kinds ({found}): a pattern says which "
                       f"are meant, for instance --source {cli.quoted(pattern)}")


def _listed(paths: Collection[str]) -> str:
    """How many files, and the names of some."""
    names = list(paths)[:SHOWN]
    more = len(paths) - len(names)
    files = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
    return f"{files}: {', '.join(names)}" + (f" and {more:,} more" if more else "")


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
    files: list[File], column: str, file: int = 0, document: int = 0, split_text: bool = True
) -> Iterator[Piece]:
    """All pieces from the one that holds this document on, in order.

    What can't be read of a file is named by its pieces. Raises BadInput where the column is
    missing.
    """
    for number in range(file, len(files)):
        start = document if number == file else 0
        here = files[number]
        try:
            if kind(here.name) == "parquet":
                yield from parquet_pieces(here, number, column, start, PIECE_BYTES)
            elif kind(here.name) == "txt":
                yield from text_pieces(here, number, split_text, start, PIECE_BYTES)
            else:
                yield from json_pieces(here, number, column, start, PIECE_BYTES)
        except BadFile as problem:
            yield unreadable_piece(number, start, str(problem))


def expected_bytes(files: list[File], column: str) -> int:
    """About how many bytes of text there are, judged by the largest undamaged file of each kind."""
    shares: dict[str, float] = {}
    for file in sorted(files, key=lambda file: file.size, reverse=True):
        if shares.get(kind(file.name)):
            continue
        try:
            shares[kind(file.name)] = text_share(file, column)
        except BadFile:
            continue  # named when its turn comes
    return int(sum(shares.get(kind(file.name), 1.0) * file.size for file in files))


def text_share(file: File, column: str) -> float:
    """About how many bytes of text a byte of such a file holds. May raise BadFile."""
    if kind(file.name) == "parquet":
        return parquet_share(file, column)
    if kind(file.name) == "txt":
        return 1.0
    return json_share(file, column)


def text_borders(files: list[File]) -> int:
    """How often `<|endoftext|>` stands in the .txt files among these."""
    return sum(count_borders(file) for file in files if kind(file.name) == "txt")
