"""A model's folder on the Hugging Face Hub: which commit it is, how large, and its files here.

    folder, commit = locate("gpt2")                # ~/.cache/huggingface/..., 607a30d783df...
    folder, commit = locate("gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e")    # pinned
"""

import os
import shlex
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from launch.errors import BadInput, Failed
from launch.progress import Bar
from model.formats import foreign

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
SHARDS = {SAFETENSORS: "model-*-of-*.safetensors", PICKLE: "pytorch_model-*-of-*.bin"}
# GPT-2 1558M is 6.2 GB in fp32; what is much larger is something else.
LARGEST_DOWNLOAD = 16e9  # bytes


def locate(source: str, allow_pickle: bool = False) -> tuple[Path, str]:
    """The folder that `source` names, and its commit if it's one of the Hub's.

    source: a folder here, a name on the Hub, or NAME@REVISION. What comes from the Hub may change
    there any day, so the commit is printed.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder, ""
    if folder.is_file():
        raise BadInput(foreign.advice(folder))
    name, _, revision = source.partition("@")
    folder = _fetch(name, revision or None, allow_pickle)
    commit = folder.name  # of .../snapshots/COMMIT
    if os.environ.get("RANK", "0") == "0":
        print(f"hf:{name} is hf:{name}@{commit}", file=sys.stderr)
    return folder, commit


def _fetch(name: str, revision: str | None, allow_pickle: bool) -> Path:
    """The folder in huggingface_hub's cache, downloaded if it isn't there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted, other = _patterns(SAFETENSORS), _patterns(PICKLE)
    try:
        try:
            there = snapshot_download(
                name, revision=revision, allow_patterns=["config.json", *wanted, *other],
                dry_run=True, tqdm_class=cast(Any, Bar),
            )
        except DryRunError:  # no network: what the cache holds will do; what it lacks is said below
            there = []
        sizes = {file.filename: file.file_size or 0 for file in there}
        if not _matching(sizes, wanted) and _matching(sizes, other):
            if not allow_pickle:
                raise only_a_pickle(name)
            wanted = other
        wanted = ["config.json", *wanted]
        size = sum(sizes[file] for file in _matching(sizes, wanted))
        if size > LARGEST_DOWNLOAD:
            raise BadInput(f"{name!r} is {size / 1e9:,.0f} GB on the Hub, and no GPT-2 is more "
                           f"than {LARGEST_DOWNLOAD / 1e9:.0f}: nothing was downloaded")
        if there:
            revision = there[0].commit_hash  # what was measured is what is fetched
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted,
                                      tqdm_class=cast(Any, Bar)))
    except RevisionNotFoundError:
        raise BadInput(f"{name!r} has no revision {revision!r} on the Hub") from None
    except (HFValidationError, RepositoryNotFoundError):
        raise BadInput(f"{name!r} is neither a folder here nor a model on the Hub") from None
    except LocalEntryNotFoundError:
        at = f" --revision {revision}" if revision else ""
        raise Failed(
            f"hf:{name} is not in the cache, and the Hub can't be reached. Where there is a "
            f"network: hf download {name} config.json {SAFETENSORS}{at} --local-dir copied; bring "
            "the folder here and name hf:copied"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise Failed(f"could not fetch {name!r} from the Hub: {type(error).__name__}") from None


def _patterns(name: str) -> list[str]:
    """What to download: the file of this name, or its shards and their index."""
    return [name, f"{name}.index.json", SHARDS[name]]


def _matching(names: Iterable[str], patterns: list[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def only_a_pickle(source: str) -> BadInput:
    """What is said of a folder, or a name on the Hub, without safetensors."""
    command = f"python -m model.convert {shlex.quote('hf:' + source)} NEW --to ours"
    return BadInput(f"{source} holds no {SAFETENSORS}, only {PICKLE}, a pickle, which may run code "
                    f"when it's read. `{command} --allow_pickle True` reads its tensors and runs "
                    "nothing")
