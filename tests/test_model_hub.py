"""A name on the Hub, served here by a local server through HF_ENDPOINT."""

import hashlib
import http.server
import json
import subprocess
import sys
import threading

import pytest
import torch

from launch.errors import BadInput
from model.gpt2 import GPT, GPTConfig
from model.hf import from_hf, to_hf
from tests.running import ROOT, environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path):
    """A server with one model, tiny/gpt2, that speaks as much of the Hub's protocol as needed."""
    torch.manual_seed(0)
    folder = tmp_path / "hub"
    to_hf(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=16)), folder)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            name = self.path.split("?")[0].rsplit("/", 1)[-1]
            if self.path.startswith("/api/models/tiny/gpt2/tree/"):
                content = json.dumps([
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in files.items()
                ]).encode()
            elif self.path.startswith("/api/models/tiny/gpt2"):
                siblings = [{"rfilename": n} for n in files]
                content = json.dumps(
                    {"id": "tiny/gpt2", "sha": COMMIT, "siblings": siblings}).encode()
            elif self.path.startswith("/tiny/gpt2/resolve/") and name in files:
                content = files[name]
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_GET(self):
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()
    thread.join()


def run_with_hub(code: str, endpoint: str, cache) -> subprocess.CompletedProcess:
    """huggingface_hub reads its environment when it's imported, so each call has its process."""
    env = environment(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(cache))
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_a_model_is_fetched_by_its_name(hub, tmp_path):
    endpoint, folder = hub
    code = ("import sys; from model.hf import from_hf, to_hf; from pathlib import Path;"
            f"to_hf(from_hf('tiny/gpt2'), Path({str(tmp_path / 'again')!r}))")
    done = run_with_hub(code, endpoint, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_name_that_is_not_there_is_one_clear_line(hub, tmp_path):
    code = "from eval.sample import *\nwith one_line_errors(): load_model('hf:tiny/none')"
    done = run_with_hub(code, hub[0], tmp_path / "cache")
    assert done.returncode == 2
    assert "neither a folder here nor a model on the Hub" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", "llama"), ("activation_function", "relu"), ("tie_word_embeddings", False)],
)
def test_another_network_is_refused(tmp_path, key, value):
    to_hf(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=16)), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(BadInput, match=key):
        from_hf(str(tmp_path))


def test_pickled_weights_are_not_loaded(tmp_path):
    to_hf(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=16)), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="no model.safetensors"):
        from_hf(str(tmp_path))
