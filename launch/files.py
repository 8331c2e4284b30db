"""Files that are whole or absent: atomic write, hash, lock, download.

Everything the project leaves on a disk goes through here, so that a power cut, a full disk or a
cut connection leaves the old file or the new one, and never half of one.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.errors import BadInput, Failed, FolderInUse

HASH_CHUNK = 1 << 22  # bytes read at once; hashlib lets other threads run meanwhile
DOWNLOAD_CHUNK = 1 << 16  # what a cut connection loses at most


def sha256(path: Path) -> str:
    """The file's SHA-256 as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a whole file under another name, flushes it and renames it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def folder_lock(folder: Path, wait: float = 30.0) -> Iterator[None]:
    """Holds `folder` for this process alone; the kernel lets go of it even after kill -9.

    A job that is started again may meet the last breaths of its predecessor, so it waits up to
    `wait` seconds. Raises FolderInUse after that.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise BadInput(f"can't write to {folder}: {error.strerror}") from None
    with file:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise Failed(f"can't lock {folder}: {error.strerror}") from None
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise FolderInUse(f"{folder} is in use by {holder}: wait, or choose another --name")
            time.sleep(0.2)
        # flock is local to a node on some network file systems, so the holder is named.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def download(url: str, path: Path, sha256_expected: str, size: int, retries: int = 5) -> None:
    """Fetches `url` to `path`: resumed where it broke off, and checked before it gets its name.

    Raises Failed when the server can't be reached or keeps sending other bytes.
    """
    import requests
    from tqdm import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    problem = "no attempt was made"
    for attempt in range(retries):
        if attempt:
            time.sleep(min(2.0 ** (attempt - 1), 30.0))
        have = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={have}-"} if 0 < have < size else {}
        try:
            if have < size:
                with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as reply:
                    reply.raise_for_status()
                    append = reply.status_code == 206  # 200: the server sends it all again
                    bar = tqdm(total=size, initial=have if append else 0, unit="B",
                               unit_scale=True, desc=path.name)
                    with part.open("ab" if append else "wb") as file, bar:
                        for chunk in reply.iter_content(DOWNLOAD_CHUNK):
                            file.write(chunk)
                            bar.update(len(chunk))
            if part.stat().st_size < size:
                problem = f"only {part.stat().st_size:,} of {size:,} bytes came"
                continue
            if sha256(part) == sha256_expected:
                fsync(part)
                part.replace(path)
                fsync(path.parent)
                return
            problem = "the bytes that came have another sha256 than the published file"
            part.unlink()
        except requests.RequestException as error:
            reply_code = error.response.status_code if error.response is not None else 0
            problem = f"HTTP status {reply_code}" if reply_code else type(error).__name__
            if isinstance(error, requests.ConnectionError) and have == 0 and attempt == 1:
                break  # no network at all: two attempts tell, and nothing is half done
    raise Failed(f"could not download {url}: {problem}")


def free_bytes(folder: Path) -> int:
    """Free space, in bytes, on the disk that holds `folder` (or its nearest existing parent)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
