"""Files are whole or absent; a folder has one owner; downloads are checked."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading

import pytest

from launch.errors import BadInput, Failed, FolderInUse
from launch.files import atomic_write, download, folder_lock, sha256
from tests.running import ROOT

CONTENT = bytes(range(256)) * 5000  # 1,280,000 bytes: more than one chunk
HASH = hashlib.sha256(CONTENT).hexdigest()


def test_sha256_is_hashlibs(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    assert sha256(tmp_path / "file") == HASH


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
    ("deed", "words"), [("503", "HTTP status 503"), ("wrong bytes", "another sha256")]
)
def test_a_download_that_never_comes_right_has_no_file(tmp_path, server, deed, words):
    url, plan, _ = server
    plan[:] = [deed] * 10
    with pytest.raises(Failed, match=words):
        download(url, tmp_path / "file", HASH, len(CONTENT))
    assert not (tmp_path / "file").exists()


def test_no_network_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.files.time.sleep", lambda _: None)
    with pytest.raises(Failed, match="could not download .* ConnectionError"):
        download("http://127.0.0.1:9/file", tmp_path / "file", HASH, 1)
