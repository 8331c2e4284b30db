"""Hugging Face folders of every shape, and a name on the Hub, served here through HF_ENDPOINT."""

import hashlib
import http.server
import io
import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from transformers import GPT2LMHeadModel
from transformers.activations import ACT2FN

from launch.errors import BadInput
from model.checkpoint import load_model
from model.formats.hf import GELU, from_hf, to_hf
from model.gpt2 import GPT, GPTConfig
from tests.running import ROOT, environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"

IMPORTS = """from launch.errors import one_line_errors
from model.checkpoint import load_model
"""


class Hub(NamedTuple):
    endpoint: str
    folder: Path  # what the model was written to
    files: dict[str, bytes]  # what is served, by name
    sizes: dict[str, int]  # what is claimed of it


@pytest.fixture
def hub(tmp_path):
    """A server with one model, tiny/gpt2, that speaks as much of the Hub's protocol as needed."""
    torch.manual_seed(0)
    folder = tmp_path / "hub"
    to_hf(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=16)), folder)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    sizes = {}  # what the server says instead of the truth

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            name = self.path.split("?")[0].rsplit("/", 1)[-1]
            if self.path.startswith("/api/models/tiny/gpt2/tree/"):
                content = json.dumps([
                    {"type": "file", "path": n, "size": sizes.get(n, len(c)),
                     "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in files.items()
                ]).encode()
            elif self.path.startswith("/api/models/tiny/gpt2") and "/nowhere" not in self.path:
                siblings = [{"rfilename": n} for n in files]
                content = json.dumps(
                    {"id": "tiny/gpt2", "sha": COMMIT, "siblings": siblings}).encode()
            elif self.path.startswith("/tiny/gpt2/resolve/") and name in files:
                content = files[name]
            else:
                revision = self.path.startswith("/api/models/tiny/gpt2")
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound" if revision else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            size = len(content) if body else sizes.get(name, len(content))
            self.send_header("Content-Length", str(size))
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
    yield Hub(f"http://127.0.0.1:{server.server_port}", folder, files, sizes)
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
    code = ("import sys; from model.formats.hf import from_hf, to_hf; from pathlib import Path;"
            f"to_hf(from_hf('tiny/gpt2'), Path({str(tmp_path / 'again')!r}))")
    done = run_with_hub(code, hub.endpoint, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert f"hf:tiny/gpt2 is hf:tiny/gpt2@{COMMIT}" in done.stderr
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (hub.folder / name).read_bytes()


def converting(spec: str, to: str, *more: str) -> str:
    """The program that python -m model.convert is."""
    return ("import sys, runpy;"
            f"sys.argv = {['convert', spec, *more, '--to', to]!r};"
            "runpy.run_module('model.convert', run_name='__main__')")


def test_the_commit_is_kept_with_the_weights(hub, tmp_path):
    """Without a network the cache serves, and the commit is known all the same."""
    source, cache = f"hf:tiny/gpt2@{COMMIT}", tmp_path / "cache"
    done = run_with_hub(
        converting("hf:tiny/gpt2", "ours", str(tmp_path / "ours")), hub.endpoint, cache)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["source"] == source
    done = run_with_hub(
        converting(source, "hf", str(tmp_path / "hf")), "http://127.0.0.1:9", cache)
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata()["source"] == source


@pytest.mark.parametrize(
    ("spec", "words"),
    [("hf:tiny/gpt2@nowhere", "'tiny/gpt2' has no revision 'nowhere' on the Hub"),
     ("hf:tiny/gpt2", "'tiny/gpt2' is 50 GB on the Hub, and no GPT-2 is more than 16")],
)
def test_what_the_hub_does_not_have_or_has_too_much_of(hub, tmp_path, spec, words):
    if "nowhere" not in spec:
        hub.sizes["model.safetensors"] = 50 * 10**9
    done = run_with_hub(
        converting(spec, "ours", str(tmp_path / "ours")), hub.endpoint, tmp_path / "cache")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {words}")
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


def test_a_pickle_on_the_hub_is_fetched_only_if_asked(hub, tmp_path):
    hub.files["pytorch_model.bin"] = pickled(hub.folder)
    del hub.files["model.safetensors"]
    arguments = ("hf:tiny/gpt2", "ours", str(tmp_path / "ours"))
    done = run_with_hub(converting(*arguments), hub.endpoint, tmp_path / "cache")
    assert done.returncode == 2
    assert "hf:tiny/gpt2 NEW --to ours --allow_pickle True" in done.stderr
    assert not list((tmp_path / "cache").rglob("pytorch_model.bin"))
    done = run_with_hub(
        converting(*arguments, "--allow_pickle", "True"), hub.endpoint, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert_same(load_model(str(tmp_path / "ours")), from_hf(str(hub.folder)))


def test_a_name_that_is_not_there_is_one_clear_line(hub, tmp_path):
    code = IMPORTS + "with one_line_errors(): load_model('hf:tiny/none')"
    done = run_with_hub(code, hub.endpoint, tmp_path / "cache")
    assert done.returncode == 2
    assert "neither a folder here nor a model on the Hub" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_network_the_way_to_get_a_model_is_named(tmp_path):
    """Port 9 of this machine answers nobody."""
    code = IMPORTS + "with one_line_errors(): load_model('hf:gpt2@e7da7f2')"
    done = run_with_hub(code, "http://127.0.0.1:9", tmp_path / "cache")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: hf:gpt2 is not in the cache, and the Hub can't be reached")
    assert "hf download gpt2 config.json model.safetensors --revision e7da7f2" in line


def assert_same(one: GPT, two: GPT) -> None:
    assert one.config == two.config
    weights = two.state_dict()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def pickled(folder: Path) -> bytes:
    """The weights of a folder as torch.save writes them."""
    file = io.BytesIO()
    torch.save(load_file(folder / "model.safetensors"), file)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Hugging Face folder of a small model with random weights."""
    torch.manual_seed(0)
    to_hf(GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=16)), tmp_path / "folder")
    return tmp_path / "folder"


@pytest.fixture
def written(folder) -> GPT:
    """The model of that folder, as it was before a test changed anything in there."""
    return from_hf(str(folder))


def change_config(folder: Path, encoding: str = "utf-8", **settings) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | settings), encoding=encoding)


def theirs(folder: Path) -> GPT2LMHeadModel:
    """transformers' model of a folder, in fp64."""
    return GPT2LMHeadModel.from_pretrained(folder).double().eval()


# Equal networks


def test_sharded_weights_are_read(folder, written):
    theirs(folder).float().save_pretrained(folder / "sharded", max_shard_size="3MB")
    assert len(list((folder / "sharded").glob("model-*-of-*.safetensors"))) > 1
    assert_same(from_hf(str(folder / "sharded")), written)


def test_an_embedding_that_is_stored_as_the_head_is_read(folder, written):
    """As safetensors' save_model does it, which keeps one of two names for the same memory."""
    model = theirs(folder).float()
    (folder / "model.safetensors").unlink()
    save_model(model, str(folder / "model.safetensors"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "transformer.wte.weight" not in file.keys()  # noqa: SIM118
    assert_same(from_hf(str(folder)), written)


@pytest.mark.parametrize("inner", [None, 128])
def test_an_inner_width_of_4_c_is_gpt2s(folder, written, inner):
    change_config(folder, n_inner=inner)
    assert_same(from_hf(str(folder)), written)


def test_a_byte_order_mark_is_no_setting(folder, written):
    change_config(folder, encoding="utf-8-sig")
    assert_same(from_hf(str(folder)), written)


@pytest.mark.parametrize("name", sorted(GELU))
def test_every_name_of_a_gelu_is_the_function_that_transformers_has(folder, name):
    """fp64. tanh and exact are up to 5e-4 apart; forms of one function differ by their constants'
    digits, which gelu_fast and gelu_accurate round at 1e-10."""
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    change_config(folder, activation_function=name)
    approximate = "none" if from_hf(str(folder)).config.gelu == "exact" else "tanh"
    ours = torch.nn.functional.gelu(x, approximate=approximate)
    torch.testing.assert_close(ours, ACT2FN[name](x), atol=1e-8, rtol=0)


def test_a_pickle_is_read_if_asked_and_runs_nothing(folder, written, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(pickled(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="only pytorch_model.bin, a pickle.*--allow_pickle True"):
        from_hf(str(folder))
    assert_same(from_hf(str(folder), allow_pickle=True), written)

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"wte.weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="needs code to load .*mkdir.*refused"):
        from_hf(str(folder), allow_pickle=True)
    assert not (tmp_path / "executed").exists()


# Bad input


def test_a_git_lfs_pointer_is_named(folder):
    """As git without git-lfs leaves it."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n"
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text(pointer)
        with pytest.raises(BadInput, match=f"{name} is a git-LFS pointer.*run `git lfs pull` in"):
            from_hf(str(folder))


def test_shards_without_their_index_are_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(BadInput, match=r"no model.safetensors.index.json, .*: fetch it too"):
        from_hf(str(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_numbers_that_are_no_weights_are_refused(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: w.to(dtype) for name, w in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(BadInput, match=f"holds wte.weight as {dtype}"):
        from_hf(str(folder))


def test_sparse_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"].to_sparse()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="holds ln_f.bias as torch.float32, torch.sparse_coo"):
        from_hf(str(folder), allow_pickle=True)


def test_two_tensors_of_one_name_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["wpe.weight"] = tensors["transformer.wpe.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInput, match="two tensors are wpe.weight"):
        from_hf(str(folder))


def test_the_command_for_a_pickle_can_be_pasted(folder):
    odd = folder.rename(folder.with_name("it's [mine]"))
    (odd / "model.safetensors").rename(odd / "pytorch_model.bin")
    with pytest.raises(BadInput) as error:
        from_hf(str(odd))
    assert shlex.split(str(error.value).split("`")[1])[3] == f"hf:{odd}"


def test_a_damaged_pickle_is_no_advice_to_run_it(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02garbage")
    with pytest.raises(BadInput, match="torch.save's: it is damaged, or was never one$"):
        from_hf(str(folder), allow_pickle=True)


@pytest.mark.parametrize(
    ("index", "words"),
    [("[]", "no object of settings"), ("{}", "has no weight_map"),
     ('{"weight_map": {"wte.weight": "gone.safetensors"}}', "gone.safetensors, which isn't there"),
     ('{"weight_map": {"wte.weight": "../config.json"}}', "lie in the index's own folder")],
    ids=["list", "empty", "missing", "elsewhere"],
)
def test_an_index_that_can_not_be_followed(folder, index, words):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BadInput, match=words):
        from_hf(str(folder))


@pytest.mark.parametrize("settings", [{"n_layer": 1000}, {"n_embd": 100_000}, {"n_layer": 1}])
def test_shapes_are_compared_before_a_model_is_made(folder, monkeypatch, settings):
    """A config.json may ask for more memory than there is."""
    change_config(folder, **settings)
    monkeypatch.setattr("model.formats.hf.GPT", None)
    with pytest.raises(BadInput, match="no GPT-2 of its own description"):
        from_hf(str(folder))


def test_a_head_of_its_own_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInput, match="head of its own"):
        from_hf(str(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", "llama"), ("activation_function", "relu"), ("tie_word_embeddings", False),
     ("activation_function", ["gelu"]), ("n_inner", 96), ("n_layer", 1.0)],
)
def test_another_network_is_refused(tmp_path, key, value):
    to_hf(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=16)), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(BadInput, match=key):
        from_hf(str(tmp_path))
