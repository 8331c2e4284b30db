"""Weights that are no GPT-2's, cut or dangerous get one line, and nothing half is left."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from launch.errors import BadInput, Failed
from model import convert
from model.checkpoint import load_model
from model.gpt2 import GPT, MLP, GPTConfig
from model.network import flops_per_token, parameter_count, without_weights
from tests.formats import (
    SETTINGS,
    SHAPE,
    Source,
    linear_weights,
    make_sources,
    pickle_config,
    theirs,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Source]:
    return make_sources(tmp_path_factory.mktemp("sources"))


def refused(spec: str, tmp_path: Path, words: str, **more) -> None:
    with pytest.raises(BadInput, match=words):
        convert.main(spec, str(tmp_path / "out"), **({"to": "ours"} | more))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tmp").exists()


def test_llmc_can_not_take_an_exact_gelu(sources, tmp_path):
    refused(sources["nanogpt"].spec, tmp_path, "llm.c computes the tanh GELU.*--to hf", to="llmc")


class Gated(MLP):
    """SwiGLU: a network that was changed in two lines."""

    def __init__(self, config):
        super().__init__(config)
        self.c_gate = torch.nn.Linear(config.n_embd, 4 * config.n_embd)

    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


def test_a_changed_network_is_counted_as_it_is_and_exported_as_nothing(tmp_path, monkeypatch):
    before, flops = parameter_count(SHAPE), flops_per_token(SHAPE)
    monkeypatch.setattr("model.gpt2.MLP", Gated)
    without_weights.cache_clear()
    added = 2 * (32 * 128 + 128)  # two layers' gates: 4C x C and a bias
    assert parameter_count(SHAPE) == before + added
    assert flops_per_token(SHAPE) == flops + 6 * 2 * 32 * 128
    without_weights.cache_clear()
    model, words = GPT(SHAPE), "no GPT-2 .* unknown tensor h.0.mlp.c_gate.bias"
    with pytest.raises(BadInput, match=words):
        convert.write_hf(model, tmp_path / "hf")
    with pytest.raises(BadInput, match=words):
        convert.to_llmc(model, tmp_path / "model.bin", "fp32")
    with pytest.raises(BadInput, match=words):
        convert.write_ours(model, tmp_path / "ours")
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "folder").mkdir()
    refused(str(tmp_path / "folder"), tmp_path, "looked for .*manifest.json.*hf:")
    refused(str(tmp_path / "none"), tmp_path, "neither a file nor a folder")
    refused(f"hf:{tmp_path / 'folder'}", tmp_path, "no Hugging Face folder")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(str(tmp_path / "model.safetensors"), tmp_path, "name its folder, hf:")
    (tmp_path / "ckpt.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(str(tmp_path / "ckpt.pt"), tmp_path, "git-LFS pointer.*`git lfs pull`")


def test_a_pickle_that_needs_code_is_refused_and_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": {}, "model_args": Payload()}, tmp_path / "evil.pt")
    refused(str(tmp_path / "evil.pt"), tmp_path, "needs code to load .*mkdir.*refused")
    assert not (tmp_path / "executed").exists()


def test_the_name_of_build_nanogpts_class_lets_no_other_in(tmp_path):
    config = pickle_config(**SETTINGS, vocab_size=50257)
    config.n_layer = os.system
    torch.save({"model": {}, "config": config}, tmp_path / "evil.pt")
    refused(str(tmp_path / "evil.pt"), tmp_path, r"needs code to load \(posix.system\)")


def _damaged(weights: dict, change) -> dict:
    weights = dict(weights)
    change(weights)
    return weights


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        (None, lambda w: None, "the number of heads can't be read off"),
        ({"vocab_size": 50300}, lambda w: None, "no GPT-2 of its own description"),
        ({"n_layer": 1000}, lambda w: None, "no GPT-2 of its own description"),
        ({"n_head": 5}, lambda w: None, "not divisible by n_head 5"),
        ({"n_layer": "two"}, lambda w: None, "no GPT-2 shape"),
        ({}, lambda w: w.update({"lm_head.weight": torch.zeros(50257, 32)}), "head of its own"),
        ({"n_embd": 100_000}, lambda w: None, "no GPT-2 of its own description"),
        ({}, lambda w: w.pop("transformer.h.1.mlp.c_fc.weight"), "lacks h.1.mlp.c_fc.weight"),
        ({}, lambda w: w.pop("transformer.h.1.mlp.c_fc.bias"), "lacks h.1.mlp.c_fc.bias"),
        ({}, lambda w: w.update({"transformer.rope": torch.zeros(2)}), "unknown tensor rope"),
        ({}, lambda w: w.update({"transformer.ln_f.weight": torch.zeros(2)}), r"shape \(2,\)"),
    ],
    ids=["no-settings", "rows", "layers", "heads", "text", "head", "width", "lacks", "lacks-bias",
         "extra", "shape"],
)
def test_what_is_no_gpt2_inside_a_pt(tmp_path, settings, change, words):
    weights = _damaged(linear_weights(theirs()), change)
    content = {"model": weights}
    if settings is not None:
        content["model_args"] = SETTINGS | {"vocab_size": 50257} | settings
    torch.save(content, tmp_path / "ckpt.pt")
    refused(str(tmp_path / "ckpt.pt"), tmp_path, words)


def test_another_vocabulary(tmp_path):
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, n_ctx=8, n_vocab=500)
    convert.to_hf(GPT(config), tmp_path / "hf")
    refused(f"hf:{tmp_path / 'hf'}", tmp_path, "vocabulary of 500; GPT-2's is 50,257")
    with pytest.raises(BadInput, match="vocabulary of 500"):  # what eval.* and --init read
        load_model(f"hf:{tmp_path / 'hf'}")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(str(tmp_path / "list.pt"), tmp_path, "holds a list")


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [(0, 20240520, "is a shard of tokens"), (0, 7, "neither a .pt nor a file of llm.c's"),
     (1, 1, "version 1; 3"), (5, 5, "not divisible by n_head 5"), (7, 50000, "padded rows"),
     (6, 2**16, "its header asks for")],
)
def test_a_header_that_is_not_llmcs(sources, tmp_path, position, value, words):
    content = np.fromfile(sources["llmc"].spec, "<i4")
    content[position] = value
    content.tofile(tmp_path / "model.bin")
    refused(str(tmp_path / "model.bin"), tmp_path, words)


@pytest.mark.parametrize("size", [0, 500, 2000, -4, 4])
def test_a_cut_or_longer_bin(sources, tmp_path, size):
    content = Path(sources["llmc"].spec).read_bytes()
    content = content + bytes(4) if size == 4 else content[:size]
    (tmp_path / "model.bin").write_bytes(content)
    words = {0: "neither", 500: "within its header"}.get(size, "it was cut")
    refused(str(tmp_path / "model.bin"), tmp_path, words)


def test_a_description_without_biases_that_fits_nothing_is_refused(tmp_path):
    """Its biases would be made here: not before the rest is found right."""
    weights = {n: w for n, w in linear_weights(theirs()).items() if not n.endswith("bias")}
    for size in ({"n_layer": 1000}, {"n_embd": 100_000}):
        settings = SETTINGS | {"vocab_size": 50257} | size
        torch.save({"model": weights, "model_args": settings}, tmp_path / "ckpt.pt")
        refused(str(tmp_path / "ckpt.pt"), tmp_path, "no GPT-2 of its own description")


def test_a_cut_pt(sources, tmp_path):
    content = Path(sources["nanogpt"].spec).read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(content[: len(content) // 2])
    refused(str(tmp_path / "ckpt.pt"), tmp_path, "can't read .*ckpt.pt")


def test_nothing_is_overwritten_and_nothing_half_is_left(sources, tmp_path, monkeypatch):
    (tmp_path / "there").write_text("mine")
    with pytest.raises(BadInput, match="there already"):
        convert.main(sources["hf"].spec, str(tmp_path / "there"), "llmc")
    assert (tmp_path / "there").read_text() == "mine"
    refused(sources["hf"].spec, tmp_path, "--dtype bf16 is for --to hf and --to llmc; a checkpoint",
            to="ours", dtype="bf16")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_manifest", full)
    with pytest.raises(Failed, match="No space left"):
        convert.main(sources["hf"].spec, str(tmp_path / "out"), "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
