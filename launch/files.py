"""Files that are whole or absent: atomic write, hash, lock, download.

Everything the project leaves on a disk goes through here, so that a power cut, a full disk or a
cut connection leaves the old file or the new one, and never half of one. Network and FUSE file
systems refuse some of the calls that this takes: where it is safe to go on, one warning says what
is missing; where it is not, one line says why.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from launch import console
from launch.errors import BadInput, Failed, FolderInUse, env_number
from launch.progress import Bar

HASH_CHUNK = 1 << 22  # bytes read at once; hashlib lets other threads run meanwhile
DOWNLOAD_CHUNK = 1 << 16  # what a cut connection loses at most
# "This file system doesn't do that": a call that isn't there, and not a disk that fails. Lustre
# without -o flock says ENOSYS, NFS without its lock daemon ENOLCK, FUSE and SMB any of them.
UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK}
FOLDER_NOT_FLUSHED = UNSUPPORTED | {errno.EBADF, errno.EACCES, errno.EISDIR}
NO_REPLACE = UNSUPPORTED | {errno.EEXIST, errno.EACCES, errno.EPERM}  # of a rename over a file
NO_SIZE = UNSUPPORTED | {errno.EPERM}  # of truncate(2) to a larger size

LFS_POINTER = b"version https://git-lfs.github.com/spec/"

Progress = Callable[[int], object]  # told of bytes as they are done
_warned: set[str] = set()


def no_progress(done: int) -> None:
    """For those who don't want to know."""


def warn_once(line: str, about: str = "") -> None:
    """A warning on rank 0, the first time (of all that are `about` one thing, where that's given).
    One that can't be printed is dropped."""
    about = about or line
    if about in _warned or env_number("RANK", 0) > 0:
        return
    _warned.add(about)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(console.warning(line, sys.stderr), file=sys.stderr, flush=True)


def sha256(path: Path, progress: Progress = no_progress) -> str:
    """The file's SHA-256 as 64 hex digits. progress: told of bytes as they are read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def refuse_lfs_pointer(path: Path) -> None:
    """Raises BadInput for the few lines that git leaves in a large file's place without git-lfs."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise BadInput(f"{path} is a git-LFS pointer and not the file itself: run `git lfs "
                           f"pull` in {path.parent}")


def hashed(path: Path) -> str:
    """sha256(), with a bar where it takes long."""
    with Bar(desc=f"hashing {path.name}", total=path.stat().st_size, unit="B") as bar:
        return sha256(path, bar.update)


def fsync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk.

    Many file systems flush no folders; they keep names in order by other means, or not at all.
    """
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (FOLDER_NOT_FLUSHED if folder else UNSUPPORTED):
            raise
        if not folder:
            _warn_of_no_flush(path.parent, error)


def flush(handle: int, folder: Path) -> None:
    """Flushes an open file, which lies in `folder`, to the disk."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_of_no_flush(folder, error)


def _warn_of_no_flush(folder: Path, error: OSError) -> None:
    disk = folder.stat().st_dev  # every checkpoint has a folder of its own
    warn_once(f"files in {folder} can't be flushed to the disk ({error.strerror}): a power cut may "
              "lose the newest", about=f"no flush on {disk}")


def set_size(file: IO[bytes], size: int) -> None:
    """Gives a new file its final size; what isn't written yet reads as zeros."""
    try:
        file.truncate(size)
    except OSError as error:
        if error.errno not in NO_SIZE:
            raise
        file.seek(size - 1)
        file.write(b"\0")
        file.flush()
    have = os.fstat(file.fileno()).st_size
    if have != size:
        raise OSError(errno.EIO, f"the file system makes {have:,} bytes of {size:,}")


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a whole file under another name, flushes it and renames it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # a new file, and not where a link points
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            flush(file.fileno(), path.parent)
        replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def replace(new: Path, path: Path) -> None:
    """Renames a file over another one; where that is refused, the old one is set aside first."""
    try:
        new.replace(path)
        return
    except OSError as error:
        if error.errno not in NO_REPLACE or not path.is_file():
            raise
        refused = error
    aside = path.with_name(f".{path.name}.old")
    try:
        aside.unlink(missing_ok=True)
        path.rename(aside)
    except OSError:
        raise refused from None  # what isn't allowed at all, and not only over a file
    try:
        new.rename(path)
    except OSError:
        aside.rename(path)
        raise
    with contextlib.suppress(OSError):
        aside.unlink()
    warn_once(f"files in {path.parent} can't be renamed over others ({refused.strerror}): they are "
              "replaced in two steps")


@contextmanager
def folder_lock(folder: Path, wait: float = 30.0) -> Iterator[None]:
    """Holds `folder` for this process alone; the kernel lets go of it even after kill -9.

    A job that is started again may meet the last breaths of its predecessor, so it waits up to
    `wait` seconds. Raises FolderInUse after that. Where the file system knows no locks, it warns
    and goes on.
    """
    handle = _open_lock(folder)
    try:
        deadline = time.monotonic() + wait
        while not _lock(handle, folder):
            if time.monotonic() >= deadline:
                holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
                raise FolderInUse(f"{folder} is in use by {holder}: wait, or choose another --name")
            time.sleep(0.2)
        # flock is local to a node on some network file systems, so the holder is named.
        with contextlib.suppress(OSError):  # on a full disk it stays nameless
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        yield
    finally:
        os.close(handle)


def _open_lock(folder: Path) -> int:
    """Opens .lock, which has to be a plain file: it is about to be overwritten."""
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # O_NONBLOCK: a pipe of this name would wait for its other end.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise BadInput(f"{path} is a link, and this program makes none: remove it") from None
        raise BadInput(f"can't write to {folder}: {error.strerror}") from None
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(handle)
        raise BadInput(f"{path} is no file of its own, as this program makes it: remove it")
    return handle


def _lock(handle: int, folder: Path) -> bool:
    """Whether the lock is ours now; also where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in UNSUPPORTED:
            raise Failed(f"can't lock {folder}: {error.strerror}") from None
        warn_once(f"{folder} can't be locked on its file system ({error.strerror}): nothing keeps "
                  "a second process from writing there too")
    return True


def offered_size(url: str, at_most: int) -> int:
    """The bytes that a server says `url` has. Raises Failed where it says none, or too many."""
    import requests

    try:
        with requests.head(url, allow_redirects=True, timeout=(10, 60)) as reply:
            reply.raise_for_status()
            offered = reply.headers.get("Content-Length", "")
    except requests.RequestException as error:
        raise Failed(f"could not download {url}: {type(error).__name__}") from None
    if not offered.isdigit() or int(offered) > at_most:
        raise Failed(f"could not download {url}: the server offers {offered or 'unknown'} bytes, "
                     f"and {at_most:,} are the most that are taken")
    return int(offered)


def download(url: str, path: Path, sha256_expected: str, size: int, retries: int = 5) -> None:
    """Fetches `url` to `path`: resumed where it broke off, and checked before it gets its name.

    Never takes more than `size` bytes. Raises Failed when the server can't be reached or keeps
    sending other bytes, or the disk takes no more.
    """
    import requests

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    if part.is_symlink():
        raise BadInput(f"{part} is a link, and this program makes none: remove it")
    problem = "no attempt was made"
    for attempt in range(retries):
        if attempt:
            time.sleep(min(2.0 ** (attempt - 1), 30.0))
        have = part.stat().st_size if part.exists() else 0
        try:
            if have < size:
                problem = _fetch(url, part, have, size)
                if problem:
                    part.unlink(missing_ok=True)
                    continue
            if part.stat().st_size < size:
                problem = f"only {part.stat().st_size:,} of {size:,} bytes came"
                continue
            if part.stat().st_size == size and hashed(part) == sha256_expected:
                fsync(part)
                replace(part, path)
                fsync(path.parent)
                return
            problem = "the bytes that came have another sha256 than the published file"
            part.unlink()
        except requests.RequestException as error:
            reply_code = error.response.status_code if error.response is not None else 0
            problem = f"HTTP status {reply_code}" if reply_code else type(error).__name__
            if isinstance(error, requests.ConnectionError) and have == 0 and attempt == 1:
                break  # no network at all: two attempts tell, and nothing is half done
        except OSError as error:
            raise Failed(f"could not write {path}: {error.strerror}") from None
    raise Failed(f"could not download {url}: {problem}")


def _fetch(url: str, part: Path, have: int, size: int) -> str:
    """Adds what is missing to the `have` bytes of `part`. Says so where the server has another
    file; a connection that breaks off is no such problem."""
    import requests

    # Compressed on the way, bytes couldn't be counted before they are unpacked.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as reply:
        reply.raise_for_status()
        append = reply.status_code == 206  # 200: the server sends it all again
        done = have if append else 0
        offered = reply.headers.get("Content-Length", "")
        packed = reply.headers.get("Content-Encoding", "identity") != "identity"
        if offered.isdigit() and not packed and done + int(offered) != size:
            return f"the server offers {done + int(offered):,} bytes, not {size:,}"
        name = part.name[1:].removesuffix(".part")
        bar = Bar(desc=f"downloading {name}", total=size, initial=done, unit="B")
        with part.open("ab" if append else "wb") as file, bar:
            for chunk in reply.iter_content(DOWNLOAD_CHUNK):
                done += len(chunk)
                if done > size:
                    return f"the server sends more than {size:,} bytes"
                file.write(chunk)
                bar.update(len(chunk))
    return ""


def free_bytes(folder: Path) -> int:
    """Free space, in bytes, on the disk that holds `folder` (or its nearest existing parent).

    A file system that doesn't tell (FUSE: a size of 0) has any amount.
    """
    while not folder.exists():
        folder = folder.parent
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return sys.maxsize
    return usage.free if usage.total else sys.maxsize


def human_size(size: float, base: int = 1000) -> str:
    """1234567 -> 1.23 MB: in the largest unit of which there is one. base 1024: 1.18 MiB."""
    letters, ending = ("kMG", "B") if base == 1000 else ("KMG", "iB")
    for power, letter in reversed(list(enumerate(letters, start=1))):
        number = size / base**power
        if number >= 0.999995:  # which is written as 1.00
            return f"{number:,.2f} {letter}{ending}"
    return f"{size:,.0f} bytes"
