"""Files are whole or absent; a folder has one owner; downloads are checked."""

import errno
import fcntl
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch import files
from launch.errors import BadInput, Failed, FolderInUse
from launch.files import (
    atomic_write,
    download,
    folder_lock,
    free_bytes,
    fsync,
    human_size,
    set_size,
    sha256,
)
from tests.running import ROOT

CONTENT = bytes(range(256)) * 5000  # 1,280,000 bytes: more than one chunk
HASH = hashlib.sha256(CONTENT).hexdigest()


def test_sha256_is_hashlibs(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    done = []
    assert sha256(tmp_path / "file", done.append) == HASH
    assert sum(done) == len(CONTENT)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


HOLD = "import sys; from pathlib import Path; from launch.files import folder_lock\n" \
       "with folder_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_a_folder_has_one_owner_and_kill_9_frees_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(FolderInUse, match=f"in use by process {holder.pid}") as refusal,
        folder_lock(tmp_path, wait=0),
    ):
        pass
    assert refusal.value.exit_code == 75
    holder.kill()
    holder.communicate()
    with folder_lock(tmp_path, wait=0):
        pass


def test_a_folder_that_can_not_be_made_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="can't write"), folder_lock(tmp_path / "file" / "run"):
        pass


# ---- file systems that refuse a call ----


def refuse(code: int):
    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_there_are_no_locks_one_warning_is_given(tmp_path, monkeypatch, capsys, code):
    monkeypatch.setattr(fcntl, "flock", refuse(code))
    for _ in range(2):
        with folder_lock(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on")
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"warning: {tmp_path} can't be locked" in printed


def test_a_lock_that_fails_is_no_missing_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(Failed, match="can't lock"), folder_lock(tmp_path):
        pass


@pytest.mark.skipif(not shutil.which("gcc"), reason="no C compiler")
def test_a_mount_without_flock_can_be_used(tmp_path):
    """Lustre and FUSE, where the C library's own call answers so."""
    (tmp_path / "noflock.c").write_text(
        "#include <errno.h>\nint flock(int fd, int op) { errno = ENOSYS; return -1; }\n")
    library = tmp_path / "noflock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "noflock.c"], check=True)
    done = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL,
                          env=os.environ | {"LD_PRELOAD": str(library)})
    assert (done.returncode, done.stdout) == (0, "held\n")
    assert "can't be locked" in done.stderr


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_folders_need_not_be_flushed(tmp_path, monkeypatch, code):
    original = os.fsync

    def of_files_only(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            refuse(code)()
        original(handle)

    monkeypatch.setattr(os, "fsync", of_files_only)
    atomic_write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_no_flush_is_one_warning_for_all_folders_of_a_disk(tmp_path, monkeypatch, capsys):
    """Every checkpoint is written in a folder of its own."""
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSYS))
    monkeypatch.setattr(files, "_warned", set())
    for name in ("one", "two"):
        atomic_write(tmp_path / name / "file", "new")
    assert capsys.readouterr().err.count("can't be flushed") == 1


def test_a_disk_that_fails_to_flush_a_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        fsync(tmp_path)


@pytest.mark.parametrize("code", [errno.EEXIST, errno.EPERM, errno.EOPNOTSUPP])
def test_a_rename_over_a_file_may_be_refused(tmp_path, monkeypatch, capsys, code):
    path = tmp_path / "file"
    atomic_write(path, "old")
    monkeypatch.setattr(Path, "replace", refuse(code))
    atomic_write(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert "can't be renamed over others" in capsys.readouterr().err


def test_where_no_rename_works_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old")
    monkeypatch.setattr(Path, "replace", refuse(errno.EPERM))
    monkeypatch.setattr(Path, "rename", refuse(errno.EROFS))
    with pytest.raises(PermissionError):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


class NoTruncate:
    """A file whose truncate() is refused."""

    def __init__(self, file):
        self.file = file
        self.truncate = refuse(errno.EOPNOTSUPP)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_file_gets_its_size_without_truncate(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.write(b"header")
        set_size(NoTruncate(file), 100_000)
    assert (tmp_path / "file").read_bytes() == b"header" + bytes(99_994)


def test_a_file_that_may_not_be_so_large_is_an_error(tmp_path):
    file = NoTruncate((tmp_path / "file").open("wb"))
    file.truncate = refuse(errno.EFBIG)
    with file.file, pytest.raises(OSError, match="too large"):
        set_size(file, 100)


@pytest.mark.parametrize(("size", "base", "written"), [
    (0, 1000, "0 bytes"), (999, 1000, "999 bytes"), (1_000, 1000, "1.00 kB"),
    (999_994, 1000, "999.99 kB"), (999_995, 1000, "1.00 MB"), (17_500_000, 1000, "17.50 MB"),
    (1_234_567_890, 1000, "1.23 GB"), (45 * 10**12, 1000, "45,000.00 GB"),
    (1_023, 1024, "1,023 bytes"), (1_024, 1024, "1.00 KiB"), (5 * 2**19, 1024, "2.50 MiB"),
    (80 * 2**30, 1024, "80.00 GiB"),
])
def test_a_size_is_written_in_a_unit_of_which_there_is_one(size, base, written):
    assert human_size(size, base) == written


def test_a_file_system_that_tells_no_free_space_has_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    assert free_bytes(tmp_path / "not" / "there") > 10**18
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    assert free_bytes(tmp_path) == 0


# ---- links and devices in the place of our files ----


def test_a_lock_that_is_a_link_is_refused_and_its_target_left_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(BadInput, match=r"\.lock is a link"), folder_lock(run):
        pass
    (run / ".lock").unlink()
    (run / ".lock").hardlink_to(tmp_path / "precious")
    with pytest.raises(BadInput, match="no file of its own"), folder_lock(run):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_lock_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(BadInput, match="no file of its own"), folder_lock(tmp_path):
        pass


def test_a_link_in_the_way_of_a_write_is_replaced_and_its_target_left_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".file.tmp").symlink_to(tmp_path / "precious")
    atomic_write(tmp_path / "file", "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "new"


# ---- downloads ----


@pytest.fixture
def server(monkeypatch):
    """Serves CONTENT; server.plan is what it does to the next requests, in order."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        plan: list[str] = []

        def do_GET(self):
            requests.append(self.headers.get("Range", ""))
            deed = self.plan.pop(0) if self.plan else "serve"
            if deed == "503":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(self.headers["Range"][6:-1]) if self.headers.get("Range") else 0
            if deed == "ignore range":
                start = 0
            body = CONTENT[start:]
            if deed == "wrong bytes":
                body = bytes(len(body))
            self.send_response(206 if start else 200)
            if deed == "endless":
                self.end_headers()
                for _ in range(100):
                    self.wfile.write(CONTENT)
                return
            if deed == "too long":
                body += b"more"
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if deed == "cut" else body)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("launch.files.time.sleep", lambda _: None)
    yield f"http://127.0.0.1:{httpd.server_port}/file", Handler.plan, requests
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("deeds", "resumed"),
    [
        ([], False),
        (["503", "503"], False),
        (["cut"], True),
        (["cut", "503", "cut"], True),
        (["cut", "ignore range"], True),
        (["wrong bytes"], False),
        (["endless"], False),
        (["cut", "too long"], True),
    ],
    ids=str,
)
def test_a_download_arrives_whole_whatever_the_server_does(tmp_path, server, deeds, resumed):
    url, plan, requests = server
    plan[:] = deeds
    download(url, tmp_path / "file", HASH, len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert any(requests) == resumed


@pytest.mark.parametrize(
    ("deed", "words"),
    [("503", "HTTP status 503"), ("wrong bytes", "another sha256"),
     ("endless", "sends more than 1,280,000 bytes"),
     ("too long", "offers 1,280,004 bytes, not 1,280,000")],
)
def test_a_download_that_never_comes_right_has_no_file(
    tmp_path, server, monkeypatch, deed, words
):
    url, plan, _ = server
    plan[:] = [deed] * 10
    written = []
    monkeypatch.setattr("tqdm.tqdm.update", lambda self, n: written.append(n))
    with pytest.raises(Failed, match=words):
        download(url, tmp_path / "file", HASH, len(CONTENT))
    assert not list(tmp_path.iterdir())
    assert sum(written) <= 2 * 5 * len(CONTENT)  # in five attempts, received and hashed


def test_a_full_disk_ends_a_download_with_a_line(tmp_path, server, monkeypatch):
    monkeypatch.setattr(files, "_fetch", refuse(errno.ENOSPC))
    with pytest.raises(Failed, match="could not write .*: No space left"):
        download(server[0], tmp_path / "file", HASH, len(CONTENT))


def test_no_network_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.files.time.sleep", lambda _: None)
    with pytest.raises(Failed, match="could not download .* ConnectionError"):
        download("http://127.0.0.1:9/file", tmp_path / "file", HASH, 1)
