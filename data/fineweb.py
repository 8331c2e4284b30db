"""FineWeb to shards: on all cores, resumable at any moment, the same bytes every time.

    python -m data.fineweb --dataset fineweb-edu --sample 10BT --out edufineweb10B   # from the Hub
    python -m data.fineweb --source 'mirror/*.parquet' --out fineweb10B              # from a disk
    python -m data.fineweb --source my_documents --name mine --out mine   # documents of one's own
    python -m data.fineweb --pretokenised True --out fineweb10B    # ready-made shards, 20 GB

Documents keep their order, each begins with EOT and none is dropped. The first tokens, by default
as many as in a shard, are the validation shard, and the rest follows in train shards; manifest.json
comes last and names the source, its revision and each shard's sha256. A stopped job goes on from
its last finished shard, with any number of workers.
"""

import errno
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.counts import count_duplicates, in_words
from data.documents import File
from data.job import HASHES, Job
from data.progress import (
    PROGRESS,
    Progress,
    read_progress,
    refuse_changes,
    refuse_shards_of_others,
)
from data.shard_file import HEADER_BYTES
from data.shards import read_manifest
from data.sizes import BYTES_PER_TOKEN, choose_shard_tokens, refuse_too_large
from data.sources import expected_bytes, hub_files, local_files, text_borders
from data.tokenise import encoder
from data.tokenizer import EOT_TEXT, RANKS_SHA256
from launch import cli, flags
from launch.errors import BadInput, Failed, run_command
from launch.files import atomic_write, folder_lock, free_bytes, human_size

REPOS = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
LONGEST_NAME = 50
NAME = re.compile(rf"[^\W_][\w.-]{{0,{LONGEST_NAME - 1}}}")
LOCK_WAIT = 5.0  # seconds that a restarted job gives its predecessor


@dataclass(frozen=True)
class FineWebConfig:
    """Turns FineWeb or FineWeb-Edu into shards of GPT-2 tokens."""

    out: Path
    """Folder for the shards and manifest.json."""
    dataset: Literal["fineweb", "fineweb-edu"] = "fineweb"
    """Data set on the Hub; with --source and no --name only what the shards are called."""
    sample: Literal["10BT", "100BT", "350BT", "full"] = "10BT"
    """Published sample of it, in billions of its authors' tokens."""
    source: str = ""
    """Local files instead of the Hub: a path, folder or quoted pattern (parquet, jsonl, txt)."""
    name: str = ""
    """What documents of your own are called, in shards' names and beside every loss."""
    split_text: bool = True
    """In .txt files `<|endoftext|>` ends a document; False leaves it there as text."""
    column: str = "text"
    """Column of parquet, or field of jsonl, that holds the documents."""
    revision: str = ""
    """Commit, branch or tag on the Hub; empty takes main's newest commit and records it."""
    shard_tokens: int | None = None
    """Tokens in a shard, 2 bytes each; not given: 100,000,000, or a 20th of a small source."""
    val_tokens: int | None = None
    """Tokens of the validation shard, the stream's first; not given: as many as in a shard."""
    workers: int = os.cpu_count() or 1
    """Threads that tokenise. The shards don't depend on it."""
    skip_bad_files: bool = False
    """Go on without the documents that can't be decoded, and name them in the manifest."""
    pretokenised: bool = False
    """Download shards that others have made of the data set, checked against the Hub's hashes."""


def make(config: FineWebConfig) -> None:
    """Makes the folder of shards, or what is missing of it. Raises BadInput or Failed."""
    for name in ("shard_tokens", "val_tokens"):
        value = getattr(config, name)
        if value is not None:
            cli.within(name, value, 1, 2**31 - 1)  # an int32 in the header
    cli.within("workers", config.workers, 1, 1024)
    _check_name(config)
    with folder_lock(config.out, wait=LOCK_WAIT):
        try:
            if config.pretokenised:
                from data.pretokenised import fetch  # the Hub's library, which shards don't need

                fetch(config.dataset, config.sample, config.revision, config.out)
            else:
                _make(config)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise Failed(f"the disk of {config.out} is full: make room, and the same command goes "
                         "on from the last finished shard") from None


def _check_name(config: FineWebConfig) -> None:
    """Raises BadInput where --name is no beginning of a file's name, or names the Hub's data."""
    if config.name and (config.pretokenised or not config.source):
        raise BadInput(f"--name {config.name} is for documents of your own, --source says where "
                       "they are; data sets of the Hub have names")
    if config.name and not NAME.fullmatch(config.name):
        raise BadInput(f"--name {config.name!r}: expected letters, digits, '_', '-' and '.', a "
                       f"letter or digit first, {LONGEST_NAME} characters at most")


def _make(config: FineWebConfig) -> None:
    try:
        import pyarrow as pa
    except ImportError:
        raise BadInput("reading documents takes `pip install pyarrow`") from None
    pa.set_cpu_count(config.workers)
    done = read_manifest(config.out)
    before = read_progress(config.out)
    refuse_shards_of_others(config.out, done, before)
    known = done.get("settings") or (before.settings if before else {})
    files, revision, dataset = _source(config, known.get("revision"))
    text_bytes = 0 if done else expected_bytes(files, config.column)
    settings = _settings(config, dataset, revision, known, text_bytes)
    refuse_changes(config.out, done, before, settings, files)
    if done:
        verify = f"python -m data.shards verify {cli.quoted(config.out)}"
        print(f"{config.out} is complete: {len(done['shards'])} shards. `{verify}` checks them")
        return
    refuse_too_large(settings["val_tokens"], text_bytes)
    if before is None:
        before = Progress.start(settings, files)
    borders = _borders(files, config.split_text)
    _check_disk(config.out, text_bytes, before)
    if config.source and not config.name:
        print(f"these documents are called {dataset!r}: --name gives those of your own a name")
    print(f"shards of {settings['shard_tokens']:,} tokens; {settings['val_tokens']:,} are for "
          "validation")
    name, encode = encoder(config.workers)
    if name == "tiktoken":
        print("tokenising with tiktoken; `pip install fastokens` makes it several times faster")
    if before.shards:
        print(f"going on after {before.shards[-1]['file']}, {before.counts.tokens:,} tokens")
    progress = Job(config, files, before, encode, text_bytes).run()
    _finish(config.out, dataset, progress, borders)


def _source(config: FineWebConfig, pinned: str | None) -> tuple[list[File], str, str]:
    """(files, their revision on the Hub or empty, what to call the data set)."""
    if config.source:
        return local_files(config.source), "", config.name or f"{config.dataset} from local files"
    name = "default" if config.sample == "full" else f"sample-{config.sample}"
    repo = REPOS[config.dataset]
    files, revision = hub_files(repo, name, config.revision or pinned or "")
    return files, revision, f"{config.dataset} {name}"


def _settings(
    config: FineWebConfig, dataset: str, revision: str, known: dict[str, Any], text_bytes: int
) -> dict[str, Any]:
    """What the shards depend on. Sizes that aren't given are those of the job that goes on."""
    shard_tokens = config.shard_tokens or known.get("shard_tokens")
    if shard_tokens is None:
        shard_tokens = choose_shard_tokens(text_bytes)
    return {
        "dataset": dataset,
        "revision": revision,
        "column": config.column,
        "split_text": config.split_text,
        "shard_tokens": shard_tokens,
        "val_tokens": config.val_tokens or known.get("val_tokens") or shard_tokens,
        "tokenizer_sha256": RANKS_SHA256,
    }


def _borders(files: list[File], split_text: bool) -> int:
    """How many `<|endoftext|>` of the .txt files end a document; says so."""
    found = text_borders(files)
    if found and split_text:
        print(f"{found:,} {EOT_TEXT} in .txt files end documents; --split_text False keeps them "
              "as text")
    elif found:
        print(f"{found:,} {EOT_TEXT} in .txt files stay text")
    return found if split_text else 0


def _check_disk(out: Path, text_bytes: int, before: Progress) -> None:
    """Prints what is needed and what is free. Raises BadInput if it can't suffice."""
    written = sum(HEADER_BYTES + 2 * shard["tokens"] for shard in before.shards)
    needed = max(0, int(2 * text_bytes / BYTES_PER_TOKEN) - written)
    free = free_bytes(out)
    print(f"about {human_size(text_bytes)} of text: {human_size(needed)} of disk needed, "
          f"{human_size(free)} free in {out}")
    if needed > free:
        raise BadInput(f"not enough disk: about {human_size(needed)} are needed and "
                       f"{human_size(free)} free in {out}")


def _finish(out: Path, dataset: str, progress: Progress, borders: int) -> None:
    """Writes the manifest, tells what the data is like, removes what was for resuming."""
    counts = progress.counts
    statistics = counts.statistics(count_duplicates(out / HASHES))
    statistics["end_of_text_as_border"] = borders
    manifest = {
        "dataset": dataset,
        "revision": progress.settings["revision"] or None,
        "tokenizer_sha256": RANKS_SHA256,
        "settings": progress.settings,
        "statistics": statistics,
        "skipped_files": progress.skipped_files,
        "shards": progress.shards,
        "files": progress.files,
    }
    atomic_write(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    (out / PROGRESS).unlink(missing_ok=True)
    (out / HASHES).unlink(missing_ok=True)
    print(in_words(statistics))
    print(f"{len(progress.shards)} shards, {counts.tokens:,} tokens in {out}")
    if progress.skipped_files:
        print(f"skipped, and named in the manifest: {len(progress.skipped_files):,}, the first "
              f"{progress.skipped_files[0]}")


def main() -> None:
    make(flags.parse(FineWebConfig))


if __name__ == "__main__":
    run_command(main)
