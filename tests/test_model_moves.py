"""Weights move between the field's formats, every pair, and keep every bit that fits."""

import json
import os
import shutil
import sys
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from data.tokenizer import decode, encode
from eval.sample import continue_prompts
from launch.errors import BadInput, Failed
from model import convert
from model.checkpoint import load_model
from model.formats.llmc import parameters_in_file
from model.formats.tensors import named_weights
from model.generate import SampleConfig
from model.gpt2 import GPT, MLP, GPTConfig
from model.network import flops_per_token, parameter_count, without_weights
from train_gpt2 import PRESETS, train

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=16)
IDX = torch.randint(50257, (2, 16), generator=torch.Generator().manual_seed(1))
SETTINGS = dict(n_layer=2, n_head=2, n_embd=32, block_size=16)
LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@dataclass
class Source:
    """A file or folder as its own project writes it, and the logits it stands for."""

    spec: str
    logits: torch.Tensor


def theirs(bias: bool = True, gelu: str = "gelu_new") -> GPT2LMHeadModel:
    """transformers' GPT-2 with no parameter at its initial 0 or 1."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=16, activation_function=gelu,
        attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))
    for name, parameter in model.named_parameters():
        zero = name.endswith("bias") and not bias
        parameter.data += 0 if zero else 0.05 * torch.randn_like(parameter)
    return model.eval()


def linear_weights(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    """Its weights under nanoGPT's names, matrices as (out, in)."""
    return {name: (w.t() if name.endswith(LINEAR) else w).detach().clone().contiguous()
            for name, w in model.state_dict().items()}


def write_llmc(weights: dict[str, torch.Tensor], path: Path, dtype: torch.dtype) -> None:
    """llm.c's layout, spelled out."""
    header = np.zeros(256, dtype="<i4")
    header[:8] = 20240326, 3 if dtype == torch.float32 else 5, 16, 50257, 2, 2, 32, 50304
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            names += [f"transformer.h.{layer}.{part}.{kind}" for layer in (0, 1)]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    content = header.tobytes()
    for name in names:
        values = weights[name].to(dtype).flatten()
        content += values.view(torch.uint8).numpy().tobytes()
        if name == "transformer.wte.weight":
            content += bytes(47 * 32 * dtype.itemsize)
    path.write_bytes(content)


def pickle_config(**settings: int) -> object:
    """An object of a class that is called __main__.GPTConfig, as a script's would be."""
    kind = make_dataclass("GPTConfig", settings.keys())
    kind.__module__ = "__main__"
    sys.modules["__main__"].GPTConfig = kind  # type: ignore[attr-defined]
    return kind(**settings)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("sources")
    full, bare = theirs(), theirs(bias=False, gelu="gelu")
    exact = theirs(gelu="gelu")  # the same weights with nanoGPT's GELU
    weights = linear_weights(full)
    with torch.no_grad():
        logits, exact_logits, bare_logits = (m(IDX).logits for m in (full, exact, bare))
    rounded = theirs()
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        rounded_logits = rounded(IDX).logits

    full.save_pretrained(folder / "hf")
    write_llmc(weights, folder / "fp32.bin", torch.float32)
    write_llmc(weights, folder / "bf16.bin", torch.bfloat16)
    torch.save({"model": {f"_orig_mod.module.{k}": v for k, v in weights.items()},
                "optimizer": {"state": {}}, "iter_num": 7, "best_val_loss": torch.tensor(3.0),
                "model_args": SETTINGS | {"vocab_size": 50257, "bias": True, "dropout": 0.0},
                "config": {"dataset": "openwebtext"}}, folder / "ckpt.pt")
    without = {k: v for k, v in linear_weights(bare).items() if not k.endswith("bias")}
    padded = torch.cat([without["transformer.wte.weight"], torch.randn(47, 32)])  # they are trained
    without |= {"transformer.wte.weight": padded, "lm_head.weight": padded}
    torch.save({"model": without, "model_args": SETTINGS | {"vocab_size": 50304, "bias": False}},
               folder / "bare.pt")
    torch.save({"model": weights, "config": pickle_config(**SETTINGS, vocab_size=50257),
                "step": 3, "val_loss": 3.0}, folder / "model_00003.pt")
    convert.main(str(folder / "model_00003.pt"), str(folder / "ours"), "ours")
    return {
        "ours": Source(str(folder / "ours"), logits),
        "hf": Source(f"hf:{folder / 'hf'}", logits),
        "llmc": Source(str(folder / "fp32.bin"), logits),
        "llmc-bf16": Source(str(folder / "bf16.bin"), rounded_logits),
        "nanogpt": Source(str(folder / "ckpt.pt"), exact_logits),
        "nanogpt-bare": Source(str(folder / "bare.pt"), bare_logits),
        "build-nanogpt": Source(str(folder / "model_00003.pt"), logits),
    }


@torch.no_grad()
def logits_of(spec: str) -> torch.Tensor:
    return convert.read_source(spec)(IDX)


TANH = ["ours", "hf", "llmc", "llmc-bf16", "build-nanogpt"]
EXACT = ["nanogpt", "nanogpt-bare"]  # which llm.c can't compute


@pytest.mark.parametrize(
    ("name", "to"),
    [(name, to) for name in TANH for to in ("hf", "hf-bf16", "llmc", "llmc-bf16", "ours")]
    + [(name, to) for name in EXACT for to in ("hf", "hf-bf16", "ours")],
)
def test_every_pair_has_the_same_logits(sources, tmp_path, name, to):
    """Bit for bit between formats, since one network computes both from the same weights; against
    transformers to 1e-4, for it sums in another order (see test_model_is_gpt2.py)."""
    source = sources[name]
    before = convert.read_source(source.spec)
    torch.testing.assert_close(before(IDX), source.logits, atol=1e-4, rtol=1e-4)
    form, _, rounded = to.partition("-")
    convert.main(source.spec, str(tmp_path / "out"), form, rounded or "fp32")
    if rounded:
        for parameter in before.parameters():
            parameter.data = parameter.data.bfloat16().float()
    spec = f"hf:{tmp_path / 'out'}" if form == "hf" else str(tmp_path / "out")
    assert torch.equal(logits_of(spec), before(IDX))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@torch.no_grad()
def their_loss(model: GPT2LMHeadModel) -> float:
    """In fp64 (transformers' own loss rounds to fp32), of each token of IDX but the first."""
    logits = model.double()(IDX[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), IDX[:, 1:].flatten()).item()


@torch.no_grad()
def loss_of(spec: str) -> float:
    """In fp64, of each token of IDX but the first."""
    return convert.read_source(spec).double()(IDX[:, :-1], IDX[:, 1:]).item()


def test_nanogpts_checkpoints_keep_their_exact_gelu(sources, tmp_path):
    """The loss that nanoGPT's formula gives, in fp64: 1e-12 is thousands of roundings, and the
    other GELU is 9e-7 away. It stays through both formats that can say so."""
    loss, other = their_loss(theirs(gelu="gelu")), their_loss(theirs(gelu="gelu_new"))
    assert abs(loss - other) > 5e-7

    nanogpt = sources["nanogpt"].spec
    assert loss_of(nanogpt) == pytest.approx(loss, rel=1e-12)
    assert loss_of(sources["build-nanogpt"].spec) == pytest.approx(other, rel=1e-12)
    convert.main(nanogpt, str(tmp_path / "ours"), "ours")
    convert.main(str(tmp_path / "ours"), str(tmp_path / "hf"), "hf")
    assert loss_of(f"hf:{tmp_path / 'hf'}") == pytest.approx(loss, rel=1e-12)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["activation_function"] == "gelu"
    exported = GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert their_loss(exported) == pytest.approx(loss, rel=1e-12)


def test_a_bf16_folder_is_half_as_large_and_transformers_loads_it_so(sources, tmp_path):
    for dtype in ("fp32", "bf16"):
        convert.main(sources["ours"].spec, str(tmp_path / dtype), "hf", dtype)
    sizes = {path.parent.name: path.stat().st_size for path in tmp_path.glob("*/model.safetensors")}
    header = 10_000  # bytes, at most; the tensors are 3 MB
    assert sizes["bf16"] == pytest.approx(sizes["fp32"] / 2, abs=header)
    exported = GPT2LMHeadModel.from_pretrained(tmp_path / "bf16", dtype="auto")
    weights = convert.read_source(f"hf:{tmp_path / 'bf16'}").state_dict()
    assert exported.transformer.wpe.weight.dtype == torch.bfloat16
    assert torch.equal(exported.transformer.wpe.weight.float(), weights["wpe.weight"])


def test_nanogpts_weights_are_trained_on_with_their_gelu(sources, tiny, tmp_path):
    convert.main(sources["nanogpt"].spec, str(tmp_path / "ours"), "ours")
    init = str(tmp_path / "ours")
    assert train(tiny(steps=1, init=init, model=replace(SHAPE, gelu="exact"))) == 0
    assert load_model(str(tmp_path / "tiny")).config.gelu == "exact"
    with pytest.raises(BadInput, match="add --model.gelu exact"):
        train(tiny(name="other", steps=1, init=init))


def test_llmc_can_not_take_an_exact_gelu(sources, tmp_path):
    refused(sources["nanogpt"].spec, tmp_path, "llm.c computes the tanh GELU.*--to hf", to="llmc")


def test_a_checkpoint_from_before_the_gelu_was_a_setting_is_tanh(sources, tmp_path):
    shutil.copytree(sources["ours"].spec, tmp_path / "old")
    content = json.loads((tmp_path / "old" / "config.json").read_text())
    del content["config"]["model"]["gelu"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(content))
    (tmp_path / "old" / "manifest.json").unlink()
    convert.write_manifest(tmp_path / "old")
    assert load_model(str(tmp_path / "old")).config == SHAPE


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


@pytest.mark.parametrize("preset", ["demo", "gpt2-124m", "gpt2-1558m", "gpt3-125m"])
def test_llmcs_file_holds_the_models_parameters_and_the_padding(preset):
    config = PRESETS[preset].model
    padding = (50304 - 50257) * config.n_embd
    assert parameters_in_file(config, 50304) == parameter_count(config) + padding


def test_files_there_and_back_are_the_same_bytes(sources, tmp_path):
    for name in ("llmc", "llmc-bf16"):
        there, back = tmp_path / f"{name}-ours", tmp_path / f"{name}.bin"
        convert.main(sources[name].spec, str(there), "ours")
        convert.main(str(there), str(back), "llmc", "bf16" if name == "llmc-bf16" else "fp32")
        assert back.read_bytes() == Path(sources[name].spec).read_bytes()


def test_a_run_is_exported_read_back_and_trained_on(tiny, tmp_path):
    train(tiny(steps=1))
    convert.main(str(tmp_path / "tiny"), str(tmp_path / "exported"), "hf")
    convert.main(f"hf:{tmp_path / 'exported'}", str(tmp_path / "ours"), "ours")
    run, ours = load_model(str(tmp_path / "tiny")), load_model(str(tmp_path / "ours"))
    again = named_weights(ours)
    assert all(torch.equal(w, again[name]) for name, w in named_weights(run).items())
    assert not ours.wte.weight[50257:].any()
    assert train(tiny(name="next", steps=1, init=str(tmp_path / "ours"))) == 0
    with pytest.raises(BadInput, match="--init .* starts anew from its weights"):
        train(tiny(name="resumed", steps=1, resume=str(tmp_path / "ours")))


TEXTS = ["Hello, I'm a language model,",
         " .  spaces\n\n\ttabs é ü ☃ 👩‍👩‍👧 \u200b 12345 don't WE'LL",
         "日本語のテキスト", "".join(map(chr, range(1, 600))), "   ", "a .", ""]


@pytest.fixture(scope="module")
def exported(sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "out"
    convert.main(sources["nanogpt"].spec, str(folder), "hf")
    return folder


@pytest.mark.parametrize("leave_out", ["", "tokenizer.json"])  # old programs read the other two
def test_the_exported_tokenizer_is_ours(exported, tmp_path, leave_out):
    for path in exported.iterdir():
        if path.name not in ("model.safetensors", leave_out):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.model_max_length = 10**6  # no warning of texts longer than this model's 16 tokens
    assert len(tokenizer) == 50257
    assert tokenizer.eos_token_id == 50256
    for text in TEXTS:
        assert tokenizer.encode(text) == encode(text)
        assert tokenizer.decode(encode(text)) == text
    every = list(range(50256))
    assert tokenizer.decode(every) == decode(every)


def test_the_merges_are_openais(exported):
    """456,318 bytes: the size of OpenAI's vocab.bpe, with 'Ġ t' in front."""
    content = (exported / "merges.txt").read_bytes()
    assert len(content) == 456_318
    assert content.decode().splitlines()[:3] == ["#version: 0.2", "Ġ t", "Ġ a"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of other packages' among themselves
def test_the_exported_folder_runs_in_a_pipeline(exported):
    pipe = pipeline("text-generation", model=str(exported))
    text = pipe("In the", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    idx, model = encode("In the"), load_model(f"hf:{exported}")
    for _ in range(5):
        idx.append(model(torch.tensor([idx]))[0, -1].argmax().item())
    assert text == decode(idx)
    assert len(pipe(["In the", "a"], max_new_tokens=2, batch_size=2)) == 2


# Bad input


def refused(spec: str, tmp_path: Path, words: str, **more) -> None:
    with pytest.raises(BadInput, match=words):
        convert.main(spec, str(tmp_path / "out"), **({"to": "ours"} | more))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tmp").exists()


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


def test_padding_of_a_hugging_face_folder_can_not_be_sampled(tmp_path):
    """50,304 rows, as many export them, of which the likeliest by far is row 50,300."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, n_ctx=8, n_vocab=50304))
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[50300] = 9.0
    convert.to_hf(model, tmp_path / "hf")
    model = load_model(f"hf:{tmp_path / 'hf'}")
    greedy = SampleConfig(temperature=0.0, max_tokens=4)
    assert continue_prompts(model, ["In"], greedy, torch.device("cpu"))


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


def test_a_converted_folder_names_its_shape_and_hashes(sources):
    folder = Path(sources["ours"].spec)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "manifest.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["config"]["model"] == vars(SHAPE)
