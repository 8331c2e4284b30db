"""--dtype int8: products by 8-bit whole numbers are those of the matrix they stand for."""

import copy
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from eval.choice import open_model
from eval.sample import load_for_sampling
from kernels import int8, reference
from launch.errors import BadInput
from launch.world import autocast, choose_dtype
from model.config import GPTConfig
from model.convert import to_hf
from model.generate import SampleConfig, generate
from model.gpt2 import GPT
from model.int8_weights import FEW, Int8Product, store_in_int8
from model.network import new_network
from tests.running import ALONE, ROOT

CPU = torch.device("cpu")
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=16, n_vocab=300)
WHOLE = replace(SMALL, n_vocab=50257)  # what a checkpoint has to have
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

CC = os.environ.get("CC") or "cc"
has_product = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not shutil.which(CC.split()[0])
    or torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="kernels/int8.c wants an x86 CPU with AVX2 or AVX-512, and a C compiler")


@pytest.fixture
def compile_anew():
    """compiled() forgets what it has made, before and after."""
    int8.compiled.cache_clear()
    yield
    int8.compiled.cache_clear()


def small(arch: str = "gpt2") -> GPT:
    """A network with biases and gains that aren't 0 and 1."""
    torch.manual_seed(0)
    model = new_network(replace(SMALL, arch=arch)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


def rounded(model: GPT) -> GPT:
    """The same in fp64, each matrix by what its whole numbers stand for: the slow twin."""
    model = copy.deepcopy(model).double()
    matrices = [layer.weight for layer in model.modules() if type(layer) is torch.nn.Linear]
    if isinstance(model, GPT):  # its table stays as it is where it is read by token
        head = restored(model.wte.weight)
        V = model.config.n_vocab
        model.logits = lambda x: F.linear(x, head)[..., :V]
    for weight in matrices:
        weight.copy_(restored(weight))
    return model


def restored(weight: torch.Tensor) -> torch.Tensor:
    product = Int8Product(weight.float(), None, torch.float32)
    return product.whole.double() * product.scale.double()[:, None]


@pytest.fixture(scope="module", params=["", "-mno-avx512f"], ids=["its own", "avx2"])
def product(request):
    """Of AVX-512, where that is, and of AVX2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", f"{CC} {request.param}")
        yield int8.compiled.__wrapped__()


@has_product
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3,), (2, 5), (FEW,)])
@pytest.mark.parametrize("C", [1, 31, 64, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_its_definition(product, rows, C, bias):
    generator = torch.Generator().manual_seed(C)
    whole = torch.randint(-127, 128, (70, C), generator=generator).to(torch.int8)
    x, scale, offset = (torch.randn(*shape, generator=generator)
                        for shape in ((*rows, C), (70,), (70,)))
    offset = offset if bias else None
    got = product(x, whole, scale, offset)
    exact = reference.int8_linear(x.double(), whole, scale, offset)
    assert (got.shape, got.dtype) == (exact.shape, torch.float32)
    # C products and sums, the scale, the bias: each rounds by 2^-24 of the sum of the sizes.
    size = reference.int8_linear(x.double().abs(), whole.abs(), scale.abs(),
                                 offset.abs() if bias else None)
    assert ((got.double() - exact).abs() <= (C + 2) * 2**-24 * size).all()


@has_product
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [FEW, FEW + 1])
def test_few_rows_go_to_c_and_many_do_not_and_the_product_is_the_same(rows, dtype):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(70, 48), torch.randn(70), torch.randn(rows, 48)
    product = Int8Product(weight, bias, DTYPES[dtype])
    in_c, calls = product.few, []
    product.few = lambda *words: (calls.append(words), in_c(*words))[1]
    x = x.to(DTYPES[dtype])
    got = product(x)
    assert len(calls) == (rows == FEW)
    assert got.dtype == DTYPES[dtype]
    exact = reference.int8_linear(x.double(), product.whole, product.scale, bias)
    size = reference.int8_linear(x.double().abs(), product.whole.abs(), product.scale, bias.abs())
    # As above. Into bf16 C's sum is rounded once, by 2^-9 of it; the other way's product is, too,
    # before the scale and the bias.
    roundings = {"fp32": 0, "bf16": 1 if rows == FEW else 2}[dtype]
    limit = 50 * 2**-24 * size + roundings * 2**-9 * 1.01 * size
    assert ((got.double() - exact).abs() <= limit).all()


@has_product
def test_a_matrix_may_lie_in_memory_as_it_likes_and_have_any_dtype():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 64), torch.randn(64), torch.randn(3, 96)
    plain = Int8Product(weight.t().contiguous(), bias, torch.float32)(x)
    assert Int8Product(weight.t(), bias, torch.float32)(x).equal(plain)
    assert Int8Product(weight.t().double(), bias.double(), torch.float32)(x).equal(plain)
    apart = torch.stack([bias, bias], 1)[:, 0]  # every second number
    assert Int8Product(weight.t(), apart, torch.float32)(x).equal(plain)
    half = Int8Product(weight.t().bfloat16(), bias.bfloat16(), torch.float32)(x)
    rounded = [tensor.bfloat16().float() for tensor in (weight.t(), bias)]
    assert half.equal(Int8Product(*rounded, torch.float32)(x))


@has_product
def test_no_number_moves_by_more_than_half_a_scale():
    torch.manual_seed(0)
    weight = torch.randn(50, 40) * torch.logspace(-3, 3, 50)[:, None]
    weight[7] = 0
    product = Int8Product(weight, None, torch.float32)
    moved = (product.whole * product.scale[:, None] - weight).abs()
    # A quotient of up to 127 is rounded by 2^-18 of a scale, a product with it by as much.
    assert (moved <= (0.5 + 2**-16) * product.scale[:, None]).all()
    assert (product.whole.abs().amax(1) == 127).sum() == 49
    assert product(torch.randn(1, 40))[0, 7] == 0


@has_product
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [1, FEW + 1])
def test_a_broken_weight_is_no_number(broken, rows):
    weight = torch.ones(3, 8)
    weight[1, 2] = broken
    y = Int8Product(weight, None, torch.float32)(torch.ones(rows, 8))
    assert y[:, 1].isnan().all() and y[:, [0, 2]].isfinite().all()


@has_product
@pytest.mark.parametrize("arch", ["gpt2", "speedrun"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_in_int8_is_the_model_of_its_whole_numbers(arch, rows):
    model = small(arch)
    idx = torch.randint(300, (rows, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact_model = rounded(model)
        exact = exact_model.logits(exact_model.hidden(idx))
        far = model.logits(model.hidden(idx))
        model = store_in_int8(model, torch.float32)
        got = model.logits(model.hidden(idx))
    assert all(layer.weight.is_meta for layer in model.modules()
               if type(layer) is torch.nn.Linear)
    error = (got.double() - exact).abs().max()
    # fp32's rounding through two blocks, 1e-5 of logits near 5; int8's own is 1e-2 and more.
    assert error < 1e-4 * exact.abs().max() < (far.double() - exact).abs().max()


@has_product
@pytest.mark.parametrize("streams", [1, 3])
def test_with_and_without_a_cache_it_draws_the_same_text(streams):
    model = store_in_int8(small(), torch.float32)
    prompt = torch.arange(4).repeat(streams, 1)
    how = SampleConfig(20, seed=3)  # longer than the context
    one, other = (torch.stack([*generate(model, prompt, how, use_cache=cache)])
                  for cache in (True, False))
    assert one.equal(other)


@has_product
def test_who_samples_and_who_judges_get_it(tmp_path):
    to_hf(GPT(WHOLE), tmp_path)
    model, _tokenizer = load_for_sampling(f"hf:{tmp_path}", "int8", CPU)
    assert isinstance(model.h[0].mlp.c_fc.forward, Int8Product)
    assert model.wte.weight.dtype == DTYPES[choose_dtype("auto", CPU)]
    with open_model(f"hf:{tmp_path}", "int8", ALONE) as judged:
        assert isinstance(judged.h[0].mlp.c_fc.forward, Int8Product)
        judged_logits = judged.logits(judged.hidden(torch.arange(9)[None]))
    with torch.no_grad(), autocast(CPU, choose_dtype("auto", CPU)):
        assert judged_logits.equal(model.logits(model.hidden(torch.arange(9)[None])))


@pytest.mark.parametrize("compiler, said", [
    ("/nowhere/cc", "no C compiler '/nowhere/cc' here"), ("false", "false can't compile it"),
    ('"', "CC=\" names no compiler: No closing quotation"),
    ("true", "what true makes of int8.c can't be loaded")])
def test_without_a_compiler_it_says_so(compiler, said, monkeypatch, compile_anew):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(BadInput, match=f"--dtype int8 can't be had on this machine: {said}"):
        store_in_int8(small(), torch.float32)


@pytest.mark.parametrize("made, said", [
    ('echo text > "$last"', "can't be loaded: .*int8.so"),  # no library
    ("printf 'int8.c: error: \\351t\\351' >&2; exit 1", "can't compile it: int8.c: error: .t."),
])
def test_what_a_compiler_does_wrong_is_named(made, said, tmp_path, monkeypatch, compile_anew):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\nfor last; do :; done\n{made}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(RuntimeError, match=said):
        int8.compiled()


def test_without_a_place_for_temporary_files_it_says_so(tmp_path, monkeypatch, compile_anew):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match="can't be loaded: .*nowhere"):
        int8.compiled()


@has_product
def test_names_of_cpp_are_an_error(monkeypatch, compile_anew):
    monkeypatch.setenv("CC", f"{CC} -Dint8_product=another")
    with pytest.raises(RuntimeError, match="can't be loaded: .*undefined symbol: int8_product"):
        int8.compiled()


@has_product
def test_a_compiler_that_gets_it_wrong_is_not_trusted(tmp_path, monkeypatch, compile_anew):
    forgets_the_tail = tmp_path / "int8.c"
    forgets_the_tail.write_text(int8.SOURCE.read_text().replace("c = whole; c < C", "c = C; c < C"))
    monkeypatch.setattr(int8, "SOURCE", forgets_the_tail)
    with pytest.raises(RuntimeError, match="computes wrong numbers"):
        int8.compiled()


def test_a_gpu_has_bf16_for_it():
    with pytest.raises(BadInput, match="--dtype int8 is for CPUs: on a GPU use --dtype bf16"):
        choose_dtype("int8", torch.device("cuda"))


def test_training_knows_no_int8():
    done = subprocess.run([sys.executable, "train_gpt2.py", "demo", "--dtype", "int8"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "int8" in done.stderr + done.stdout
