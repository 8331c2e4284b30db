"""Weights move between the field's formats, every pair, and keep every bit that fits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, GPT2LMHeadModel, pipeline

from data.tokenizer import decode, encode
from eval.sample import continue_prompts
from launch.errors import BadInput
from model import convert
from model.checkpoint import load_model
from model.formats.llmc import parameters_in_file
from model.formats.tensors import named_weights
from model.generate import SampleConfig
from model.gpt2 import GPT, GPTConfig
from model.network import parameter_count
from tests.formats import IDX, SHAPE, Source, make_sources, theirs
from train_gpt2 import PRESETS, train


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Source]:
    return make_sources(tmp_path_factory.mktemp("sources"))


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


def test_a_checkpoint_from_before_the_gelu_was_a_setting_is_tanh(sources, tmp_path):
    shutil.copytree(sources["ours"].spec, tmp_path / "old")
    content = json.loads((tmp_path / "old" / "config.json").read_text())
    del content["config"]["model"]["gelu"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(content))
    (tmp_path / "old" / "manifest.json").unlink()
    convert.write_manifest(tmp_path / "old")
    assert load_model(str(tmp_path / "old")).config == SHAPE


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


def test_a_converted_folder_names_its_shape_and_hashes(sources):
    folder = Path(sources["ours"].spec)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "manifest.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["config"]["model"] == vars(SHAPE)
