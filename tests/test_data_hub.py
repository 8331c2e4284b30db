"""FineWeb from the Hub, which is a local server here: it pins, streams, fails and lies."""

import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.shards import open_folder, shard_bytes
from data.tokenizer import EOT, encode_documents
from tests.running import ROOT, environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EDU, SHARDS = "HuggingFaceFW/fineweb-edu", "kjj0/fineweb10B-gpt2"
CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: "data/*.parquet"}]
- config_name: sample-10BT
  data_files: [{split: train, path: "sample/10BT/*.parquet"}]
---
"""


class Hub:
    """As much of the Hub's protocol as reading takes. repos: {repo: {path: bytes}}.

    faults: {path: [fault, ...]}, one for each next request for that file's bytes: a status code,
    "cut" (half of what was announced), "garbage" (other bytes) or "whole" (no ranges).
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos, self.faults, self.log = repos, {}, []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.log.append((self.command, self.path, self.headers.get("Range")))
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, request) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        path = unquote(request.path.split("?")[0])
        api = re.match(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?(.*)",
                       path)
        file = re.match(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, revision = (api or file).group(1), (api.group(3) if api else file.group(2))
        if repo not in self.repos or revision not in (None, "main", COMMIT):
            code = "RepoNotFound" if repo not in self.repos else "RevisionNotFound"
            return self.send(request, 404, b"", {"X-Error-Code": code})
        files = self.repos[repo]
        if file:
            return self.send_file(request, file.group(3), files)
        if api.group(2) == "tree":
            return self.send_json(request, listing(files, api.group(4).strip("/")))
        if api.group(2) == "paths-info":
            asked = json.loads(body)["paths"]
            return self.send_json(
                request, [e for e in listing(files, None) if e["path"] in asked])
        siblings = [{"rfilename": p, "size": len(c), "blobId": "0", "lfs":
                     {"sha256": hashlib.sha256(c).hexdigest(), "size": len(c), "pointerSize": 1}}
                    for p, c in files.items()]
        return self.send_json(request, {"id": repo, "sha": COMMIT, "siblings": siblings,
                                        "private": False, "tags": [], "downloads": 0, "likes": 0})

    def send_file(self, request, path, files) -> None:
        if path not in files:
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        content = files[path]
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
        waiting = self.faults.get(path, [])
        fault = waiting.pop(0) if waiting and request.command == "GET" else None
        if isinstance(fault, int):
            return self.send(request, fault, b"no", {})
        part, status = content, 200
        wanted = re.match(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if wanted and fault != "whole":
            begin = int(wanted[1])
            end = min(int(wanted[2]) + 1 if wanted[2] else len(content), len(content))
            part, status = content[begin:end], 206
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        if fault == "garbage":
            part = bytes(255 - b for b in part)
        return self.send(request, status, part, headers, cut=fault == "cut")

    def send_json(self, request, value) -> None:
        self.send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, request, status, content, headers, cut=False) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            request.close_connection = True


def listing(files: dict[str, bytes], folder: str | None) -> list[dict]:
    """A folder's entries as the Hub's tree gives them; all files for None."""
    entries = {}
    for path, content in files.items():
        if folder is None or path.rpartition("/")[0] == folder:
            entries[path] = {"type": "file", "path": path, "size": len(content),
                             "oid": hashlib.sha1(content).hexdigest()}
        elif not folder or path.startswith(folder + "/"):
            name = path[len(folder) + 1 if folder else 0 :].split("/")[0]
            where = f"{folder}/{name}" if folder else name
            entries[where] = {"type": "directory", "path": where, "size": 0, "oid": "0" * 40}
    return list(entries.values())


def documents(count: int) -> list[str]:
    return [f"Document {i} of the hub says {'very ' * (i % 7)}little about {i * i}."
            for i in range(count)]


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"url": ["x"] * len(texts), "text": texts}), sink, row_group_size=40)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def hub():
    texts = documents(200)
    train = [np.array([EOT, i, i + 1], dtype=np.uint16) for i in range(2)]
    server = Hub({
        EDU: {"README.md": CARD.encode(),
              "sample/10BT/000_00000.parquet": parquet(texts[:110]),
              "sample/10BT/001_00000.parquet": parquet(texts[110:]),
              "data/other.parquet": parquet(["of another sample"])},
        SHARDS: {"fineweb_val_000000.bin": shard_bytes(train[0]),
                 "fineweb_train_000001.bin": shard_bytes(train[1])},
    })
    yield server
    server.close()


PROGRAM = """
import json, os, sys, time
from data import fineweb, tokenise
from launch.errors import one_line_errors
import datasets, fastokens, pyarrow.parquet
tokenise.tokenizer_json()
time.sleep = lambda _: None  # what is waited between two attempts
sys.argv = ["fineweb"]
for arguments in json.loads(os.environ["RUNS"]):
    child = os.fork()  # importing takes longer than the job
    if child == 0:
        sys.argv += arguments
        with one_line_errors():
            fineweb.main()
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("\\ncode", code, file=sys.stderr, flush=True)
"""


def run(hub: Hub, out, *runs: tuple[str, ...], **env: str) -> list[tuple[int, str]]:
    """(exit code, standard error) of the program, with each of these flags in turn."""
    shared = ["--out", str(out), "--shard_tokens", "700"]
    settings = dict(HF_ENDPOINT=f"http://127.0.0.1:{hub.server.server_port}", HF_HUB_OFFLINE="0",
                    HF_HOME=str(out.parent / "hf_home"), HF_HUB_DISABLE_TELEMETRY="1",
                    RUNS=json.dumps([[*shared, *flags] for flags in runs])) | env
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment(**settings), cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    parts = re.split(r"\ncode (-?\d+)\n", done.stderr)
    return [(int(code), text) for text, code in zip(parts[::2], parts[1::2], strict=False)]


def stream(out) -> list[int]:
    train, val, _ = open_folder(out)
    return np.concatenate([shard.tokens for shard in val + train]).tolist()


EDU_FLAGS = ("--dataset", "fineweb-edu", "--sample", "10BT")


def test_a_sample_is_streamed_through_every_fault(hub, tmp_path):
    first, second = sorted(p for p in hub.repos[EDU] if p.startswith("sample"))
    hub.faults = {first: [503, "garbage"], second: ["cut", "garbage", 503]}
    ((code, errors),) = run(hub, tmp_path / "out", EDU_FLAGS)
    assert code == 0, errors
    assert stream(tmp_path / "out") == encode_documents(documents(200)).tolist()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["dataset"], manifest["revision"]) == ("fineweb-edu sample-10BT", COMMIT)
    assert manifest["shards"][0]["file"] == "edu_fineweb_val_000000.bin"
    assert not any(hub.faults.values())
    assert all(wanted for _, path, wanted in hub.log if path.endswith(".parquet"))


def test_what_is_not_there_is_one_clear_line(hub, tmp_path):
    first, _ = sorted(p for p in hub.repos[EDU] if p.startswith("sample"))
    hub.repos[EDU]["data/other.parquet"] = bytes(4000)
    cases = [
        (("--revision", "v9"), "no revision 'v9'"),
        (("--sample", "350BT"), "sample-350BT"),
        (("--dataset", "fineweb"), "no data set HuggingFaceFW/fineweb on the Hub"),
        (("--column", "body"), "no column 'body'; --column takes one of: url, text"),
        (("--sample", "full"), "data/other.parquet: Parquet magic bytes not found"),
        (("--pretokenised", "True", "--sample", "350BT"), "nobody shares"),
    ]
    ran = run(hub, tmp_path / "out", *((*EDU_FLAGS, *flags) for flags, _ in cases))
    assert len(ran) == len(cases)
    for (flags, line), (code, errors) in zip(cases, ran, strict=True):
        assert (code, line in errors, "Traceback" in errors) == (2, True, False), (flags, errors)
    ((code, errors),) = run(hub, tmp_path / "out", EDU_FLAGS, HF_HUB_OFFLINE="1")
    assert (code, errors.strip()) == (2, "error: HF_HUB_OFFLINE is set, so the Hub isn't asked: "
                                         "--source reads local files")


def test_ready_made_shards_come_through_every_fault(hub, tmp_path):
    files = hub.repos[SHARDS]
    train, val = sorted(files)
    hub.faults = {train: [503, "garbage"], val: ["cut", "whole"]}
    ((code, errors),) = run(hub, tmp_path / "out", ("--pretokenised", "True"))
    assert code == 0, errors
    for name, content in files.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert stream(tmp_path / "out") == [EOT, 0, 1, EOT, 1, 2]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["revision"] == COMMIT
    assert not any(hub.faults.values())


def test_ready_made_shards_are_fetched_again_where_they_are_wrong(hub, tmp_path):
    files = hub.repos[SHARDS]
    train, val = sorted(files)
    out = tmp_path / "out"
    out.mkdir()
    (out / train).write_bytes(files[train][:-2] + b"\0\0")
    (out / val).write_bytes(files[val])
    hub.faults = {train: ["garbage"] * 5}
    flags = ("--pretokenised", "True")
    (code, errors), (then, _) = run(hub, out, flags, flags)
    assert (code, then) == (1, 0)
    assert "another sha256 than the published file" in errors
    assert (out / train).read_bytes() == files[train]
    assert not any(val in path for _, path, _ in hub.log)
