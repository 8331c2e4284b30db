"""Shards of FineWeb that others have made and published in llm.c's format, checked.

Each file is downloaded with resumption and compared with the sha256 that the Hub holds of it.
"""

import json
from pathlib import Path

import numpy as np

from data.shard_file import blocks, open_shard
from data.shards import read_manifest
from data.tokenizer import EOT, RANKS_SHA256
from launch.errors import BadInput, Failed
from launch.files import atomic_write, download, free_bytes, hashed, human_size
from launch.progress import track

# The data sets that modded-nanogpt (data/cached_*.py) and llm.c (dev/data/edu_fineweb.sh) fetch.
SHARDS = {
    ("fineweb", "10BT"): "kjj0/fineweb10B-gpt2",
    ("fineweb", "100BT"): "kjj0/fineweb100B-gpt2",
    ("fineweb-edu", "10BT"): "kjj0/finewebedu10B-gpt2",
    ("fineweb-edu", "100BT"): "karpathy/fineweb-edu-100B-gpt2-token-shards",
}


def fetch(dataset: str, sample: str, revision: str, out: Path) -> None:
    """Downloads all shards and writes their manifest; whole files that are there are kept.

    Raises BadInput where nobody has published such shards, Failed where the Hub doesn't give them.
    """
    if (dataset, sample) not in SHARDS:
        known = ", ".join(f"--dataset {d} --sample {s}" for d, s in SHARDS)
        raise BadInput(f"nobody shares ready-made shards of {dataset} {sample}; there are {known}")
    repo = SHARDS[dataset, sample]
    done = read_manifest(out)
    old = done.get("revision") if done.get("repository") == repo else None
    commit, files = _listing(repo, revision or old or "")
    if done and (done.get("repository"), done.get("revision")) != (repo, commit):
        raise BadInput(f"{out} holds shards of {done.get('repository') or done.get('dataset')} at "
                       f"revision {done.get('revision')}, not of {repo} at {commit}: choose "
                       "another --out")
    missing = sum(size for name, size, _ in files if not _whole(out / name, size))
    free = free_bytes(out)
    print(f"{len(files)} shards of {repo}: {human_size(missing)} of disk needed, "
          f"{human_size(free)} free in {out}")
    if missing > free:
        raise BadInput(f"not enough disk: {human_size(missing)} are needed and "
                       f"{human_size(free)} free in {out}")
    from huggingface_hub import hf_hub_url

    entries = []
    for name, size, digest in track(files, f"shards of {repo}", "shard"):
        path = out / name
        if not (_whole(path, size) and hashed(path) == digest):
            url = hf_hub_url(repo, name, repo_type="dataset", revision=commit)
            download(url, path, digest, size)
        tokens = open_shard(path).tokens
        documents = sum(int((part == EOT).sum()) for _, part in blocks(tokens))
        entries.append(
            {"file": name, "tokens": len(tokens), "documents": documents, "sha256": digest}
        )
    manifest = {"dataset": f"{dataset} {sample}", "repository": repo, "revision": commit,
                "tokenizer_sha256": RANKS_SHA256, "shards": entries}
    atomic_write(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    total = int(np.sum([entry["tokens"] for entry in entries]))
    print(f"{len(entries)} shards, {total:,} tokens in {out}")


def _whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _listing(repo: str, revision: str) -> tuple[str, list[tuple[str, int, str]]]:
    """(commit, [(name, bytes, sha256)]) of the shards that lie in a data set on the Hub."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    from data.sources import one_line

    try:
        about = HfApi().dataset_info(repo, revision=revision or None, files_metadata=True)
    except hub.OfflineModeIsEnabled:
        raise BadInput("HF_HUB_OFFLINE is set, so the Hub isn't asked for shards") from None
    except hub.RevisionNotFoundError:
        raise BadInput(f"{repo} has no revision {revision!r} on the Hub") from None
    except Exception as error:  # the libraries below have connection errors of their own
        raise Failed(f"can't list the files of {repo} on the Hub: {one_line(error)}") from None
    files = [(file.rfilename, int(file.size or 0), file.lfs.sha256)
             for file in about.siblings or []
             if file.rfilename.endswith(".bin") and "/" not in file.rfilename and file.lfs]
    if not files:
        raise Failed(f"{repo} holds no shards with a hash to check them by")
    return about.sha or "", sorted(files)
