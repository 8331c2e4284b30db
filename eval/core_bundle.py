"""The tasks of CORE: nanochat's bundle, fetched once or brought along, and what its files say.

    eval_bundle/core.yaml             the tasks: kind, rows, examples before a prompt
                eval_meta_data.csv    "Random baseline": what guessing gives, in percent
                eval_data/            the rows, a JSON object a line
"""

import csv
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import yaml

from eval import choice
from launch.errors import BadInput, Failed
from launch.files import download, offered_size

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"
LARGEST = 10**9  # bytes; it has about 162 MB
DEFAULT_PATH = Path("eval_bundle")

Kind = Literal["multiple_choice", "schema", "language_modeling"]


@dataclass(frozen=True)
class Task:
    """One of core.yaml's tasks."""

    label: str
    kind: Kind
    path: Path  # of its rows
    examples: int  # other rows that stand before each row's prompt
    delimiter: str  # between a context and its continuation
    chance: float  # the share right by guessing


@dataclass(frozen=True)
class Row:
    """A row of any kind: contexts with their continuations, one of which is right."""

    options: list[tuple[str, str]]  # (context, continuation)
    gold: int


def fetch() -> Path:
    """The folder of tasks, downloaded once. Raises Failed where that can't be done."""
    if DEFAULT_PATH.exists():
        return DEFAULT_PATH
    archive = DEFAULT_PATH.with_name("eval_bundle.zip")
    try:
        download(URL, archive, SHA256, offered_size(URL, LARGEST))
    except Failed as error:
        raise Failed(f"{error}; --data names a folder of tasks that is here already") from None
    work = DEFAULT_PATH.with_name(".eval_bundle.tmp")
    try:
        shutil.rmtree(work, ignore_errors=True)
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(work)
        (work / "eval_bundle").rename(DEFAULT_PATH)
        archive.unlink()
    except (OSError, zipfile.BadZipFile) as error:
        raise Failed(f"could not unpack {archive}: {error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return DEFAULT_PATH


def read_tasks(folder: Path) -> list[Task]:
    """The tasks of a bundle, in core.yaml's order. Raises BadInput where it is none."""
    chances = _read_chances(folder / "eval_meta_data.csv")
    path = folder / "core.yaml"
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8-sig"))["icl_tasks"]
        tasks = [_task(entry, folder, chances) for entry in entries]
    except KeyError as error:
        raise BadInput(f"{path}: there is no {error}") from None
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError) as error:
        raise BadInput(f"can't read {path}: {error}".replace("\n", " ")) from None
    labels = [task.label for task in tasks]
    if not tasks or len(set(labels)) < len(labels):
        raise BadInput(f"{path} names no task, or one twice: {', '.join(labels) or 'none'}")
    return tasks


def _read_chances(path: Path) -> dict[str, float]:
    """What guessing gives in each task, as a share."""
    if not path.is_file():
        raise BadInput(f"{path.parent} is no bundle of CORE's tasks: there is no {path.name}; "
                       f"the published one is {URL}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise BadInput(f"can't read {path}: expected columns 'Eval Task' and 'Random baseline', in "
                       f"percent ({error!r})") from None


def _task(entry: dict[str, Any], folder: Path, chances: dict[str, float]) -> Task:
    """Raises KeyError, ValueError or TypeError for an entry that is no task."""
    label, kind = str(entry["label"]), entry["icl_task_type"]
    if kind not in get_args(Kind):
        raise ValueError(f"{label} is of the kind {kind!r}: expected {', '.join(get_args(Kind))}")
    place = PurePosixPath(entry["dataset_uri"])
    if place.is_absolute() or ".." in place.parts:
        raise ValueError(f"the rows of {label} lie outside of eval_data/: {place}")
    if label not in chances or not 0 <= chances[label] < 1:
        raise ValueError(f"eval_meta_data.csv has no baseline of 0 to 99 percent for {label}")
    shots = entry["num_fewshot"]
    if not isinstance(shots, list) or len(shots) != 1 or int(shots[0]) < 0:
        raise ValueError(f"num_fewshot of {label} is {shots!r}: expected a list of one number")
    delimiter = str(entry.get("continuation_delimiter", " "))
    return Task(label, kind, folder / "eval_data" / place, int(shots[0]), delimiter, chances[label])


def read_rows(task: Task) -> list[Row]:
    """A task's rows, in the file's order. Raises BadInput with the number of a wrong line."""
    read = {"multiple_choice": _multiple_choice, "schema": _schema,
            "language_modeling": _language_modeling}
    return choice.read_rows(task.path, read[task.kind])


def _multiple_choice(row: dict) -> Row:
    context, choices = _text(row["query"]), _texts(row["choices"])
    return Row([(context, ending) for ending in choices], choice.label(row["gold"], len(choices)))


def _schema(row: dict) -> Row:
    contexts, ending = _texts(row["context_options"]), _text(row["continuation"])
    return Row([(context, ending) for context in contexts],
               choice.label(row["gold"], len(contexts)))


def _language_modeling(row: dict) -> Row:
    return Row([(_text(row["context"]).strip(), _text(row["continuation"]))], gold=0)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{str(value)[:40]!r} is no list of texts to choose from")
    return [_text(item) for item in value]


def _text(value: Any) -> str:
    """A text, perhaps empty, or a number, which nanochat's templates print as such."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{str(value)[:40]!r} is no text")
    return str(value)
