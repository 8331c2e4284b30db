"""model/packed_weights.py: products by packed matrices are those of the plain ones."""

import copy
import platform
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from eval.choice import open_model
from eval.sample import load_for_sampling
from launch.world import autocast
from model import packed_weights
from model.config import GPTConfig
from model.convert import to_hf
from model.generate import SampleConfig, _plain_products, generate, store_in
from model.gpt2 import GPT
from model.network import new_network
from model.packed_weights import PackedProduct, pack
from tests.running import ALONE

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=16, n_vocab=300)
WHOLE = replace(SMALL, n_vocab=50257)  # what a checkpoint has to have

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"),
    reason="no oneDNN, or a CPU on which nobody has tried it")


@pytest.fixture(autouse=True)
def can_multiply(request):
    """oneDNN has products of bf16 from AVX-512 on."""
    dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")
    if dtype == "bf16" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("no AVX-512: bf16 is not packed")


def small(arch: str = "gpt2", dtype: str = "fp32") -> GPT:
    """A network with biases and gains that aren't 0 and 1."""
    torch.manual_seed(0)
    model = new_network(replace(SMALL, arch=arch)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return store_in(model, torch.bfloat16) if dtype == "bf16" else model


def is_packed(layer: torch.nn.Module) -> bool:
    return isinstance(layer.__dict__.get("forward"), PackedProduct)


@pytest.mark.parametrize("rows", [(1,), (1, 1), (3,), (2, 5), (40,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_product_is_the_product(rows, bias, dtype):
    torch.manual_seed(0)
    weight, offset = torch.randn(70, 48).to(DTYPES[dtype]), torch.randn(70).to(DTYPES[dtype])
    x = torch.randn(*rows, 48)
    product = packed_weights.packed(weight, offset if bias else None)
    got = product(x)
    low = x.to(DTYPES[dtype])
    exact = F.linear(low.double(), weight.double(), offset.double() if bias else None)
    assert (got.shape, got.dtype) == (exact.shape, DTYPES[dtype])
    # Of 48 terms and a bias, each sum rounded by 2^-24 of the sum of all terms' sizes, whatever
    # the order; then in bf16 the result by 2^-8.
    size = F.linear(low.double().abs(), weight.double().abs(), offset.double().abs())
    limit = 49 * 2**-24 * size + (2**-8 * 1.01 * exact.abs() if dtype == "bf16" else 0)
    assert ((got.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("arch", ["gpt2", "speedrun"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_is_the_model(arch, dtype):
    model = small(arch, dtype)
    fast = pack(copy.deepcopy(model))
    linear = [layer for layer in fast.modules() if isinstance(layer, torch.nn.Linear)]
    assert linear and all(map(is_packed, linear))
    idx = torch.randint(300, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), autocast(CPU, dtype):
        one, other = model.logits(model.hidden(idx)), fast.logits(fast.hidden(idx))
    assert other.shape == (3, 11, 300)
    with torch.no_grad():
        exact = model.double().logits(model.hidden(idx))
    # The same roundings in another order: a largest of 9,900 errors is not twice another.
    worst, others_worst = ((got.double() - exact).abs().max() for got in (one, other))
    assert 0 < others_worst <= 2 * worst


@pytest.mark.parametrize("streams", [1, 3])
def test_it_draws_the_same_text(streams):
    model = small()
    fast = pack(copy.deepcopy(model))
    prompt = torch.arange(4).repeat(streams, 1)
    how = SampleConfig(20, seed=3)  # longer than the context
    one, other = (torch.stack([*generate(m, prompt, how)]) for m in (model, fast))
    assert one.equal(other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_fp32_there_is_one_copy_and_of_bf16_the_plain_one_stays(dtype):
    model = pack(small(dtype=dtype))
    assert model.h[0].attn.c_attn.weight.is_meta == (dtype == "fp32")
    assert not model.wte.weight.is_meta  # the table is read by token
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["bf16"])
def test_one_row_of_bf16_has_pytorchs_loop_where_that_is_switched_on(dtype, monkeypatch):
    product, x = packed_weights.packed(torch.eye(8).bfloat16()), torch.ones(1, 8).bfloat16()
    asked = []
    monkeypatch.setattr(F, "linear", lambda *words: asked.append(words) or words[0])
    for one_token in (True, False):
        with _plain_products(one_token):
            product(x)
            product(torch.ones(2, 8))
    assert len(asked) == 1


def test_a_library_that_rounds_to_bf16_on_the_way_is_not_taken(monkeypatch):
    def rounds(self, x):
        return F.linear(x.bfloat16(), plain, self.bias.bfloat16()).float()

    torch.manual_seed(0)
    plain = torch.randn(70, 48).bfloat16()
    monkeypatch.setattr(PackedProduct, "__call__", rounds)
    assert packed_weights.packed(plain.float() + 2**-10, torch.zeros(70)) is None


@pytest.mark.parametrize("problem", [AttributeError, RuntimeError, NotImplementedError])
def test_without_such_an_operator_the_model_stays_as_it_is(monkeypatch, problem):
    def missing(*words):
        raise problem("no such operator")

    monkeypatch.setattr(PackedProduct, "__init__", missing)
    model = small()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    pack(model)
    assert not any(is_packed(layer) for layer in model.modules())
    assert all(model.state_dict()[name].equal(value) for name, value in weights.items())


def test_fp64_stays_exact():
    model = pack(small().double())
    assert not any(is_packed(layer) for layer in model.modules())
    assert "logits" not in model.__dict__


@pytest.mark.parametrize("dtype, several, expected", [
    ("fp32", False, True), ("fp32", True, True), ("bf16", True, True), ("bf16", False, False)])
def test_who_samples_has_packed_weights(tmp_path, dtype, several, expected):
    to_hf(GPT(WHOLE), tmp_path)
    model, _tokenizer = load_for_sampling(f"hf:{tmp_path}", dtype, CPU, several)
    assert is_packed(model.h[0].mlp.c_fc) is expected


@pytest.mark.parametrize("dtype, expected", [("fp32", True), ("bf16", True), ("fp64", False)])
def test_who_judges_has_packed_weights(tmp_path, dtype, expected):
    to_hf(GPT(WHOLE), tmp_path)
    with open_model(f"hf:{tmp_path}", dtype, ALONE) as model:
        assert is_packed(model.h[0].mlp.c_fc) is expected
