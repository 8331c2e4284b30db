"""fp32 products by oneDNN: where they are right and faster, on all ranks alike, and for good.

    pytest tests/test_model_fp32_products.py
"""

import json
import shutil

import pytest
import torch

from kernels import fp32_products
from kernels.fp32_products import MKL, ONEDNN
from launch.world import World
from model.gpt2 import GPTConfig
from model.training import choose_products
from tests.running import ALONE, losses
from train_gpt2 import train

SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=64, n_ctx=32)


def asked() -> str:
    """Which library this process asks."""
    precision = torch.backends.mkldnn.matmul.fp32_precision
    return {"bf16": ONEDNN, "none": MKL}[precision]


@pytest.fixture(autouse=True)
def mkl_again():
    yield
    fp32_products.use(MKL)


@pytest.fixture
def zen_5(monkeypatch):
    """oneDNN is faster here, and right."""
    monkeypatch.setattr(fp32_products, "is_faster", lambda: True)
    monkeypatch.setattr(fp32_products, "is_right", lambda width: True)


def chosen(choice="auto", dtype="fp32", world=ALONE) -> dict[str, str]:
    return choose_products(SHAPE, choice, dtype, None, world)


def test_a_cpu_on_which_it_is_faster_asks_it(zen_5):
    assert chosen() == {"fp32 products": "onednn"}
    assert asked() == ONEDNN


@pytest.mark.parametrize("question", ["is_faster", "is_right"])
def test_the_others_ask_mkl_whatever_the_run_before_has_asked(zen_5, monkeypatch, question):
    monkeypatch.setattr(fp32_products, question, lambda *_: False)
    fp32_products.use(ONEDNN)
    assert chosen() == {}
    assert asked() == MKL


@pytest.mark.parametrize("other", [
    {"choice": "torch"}, {"dtype": "bf16"}, {"dtype": "fp64"},
    {"world": World(0, 1, torch.device("cuda"))}])
def test_only_fp32_on_a_cpu_is_meant_and_not_where_pytorchs_own_is_insisted_on(zen_5, other):
    fp32_products.use(ONEDNN)
    assert chosen(**other) == {}
    assert asked() == MKL


def test_one_rank_on_which_it_is_wrong_is_enough(zen_5, monkeypatch):
    monkeypatch.setattr(World, "all_gather", lambda self, mine: [mine, False])
    assert chosen() == {}
    assert asked() == MKL


@pytest.mark.parametrize(("question", "error"), [
    ("is_right", RuntimeError("no primitive")), ("is_faster", PermissionError("cpuinfo"))])
def test_a_rank_that_cannot_tell_answers_the_others(zen_5, monkeypatch, question, error):
    def refuse(*_) -> bool:
        raise error

    answers = []
    monkeypatch.setattr(World, "all_gather", lambda self, mine: answers.append(mine) or [mine])
    monkeypatch.setattr(fp32_products, question, refuse)
    assert chosen() == {}
    assert answers == [False]
    assert asked() == MKL


def test_a_run_that_leaves_its_library_says_so(zen_5, tmp_path, monkeypatch, capsys):
    """But not where it has another number of threads."""
    (tmp_path / "config.json").write_text(json.dumps({
        "config": {"compute": {"kernels": "auto"}}, "hardware": {"device": "CPU (99 threads)"},
        "resolved": {"kernels": {"fp32 products": "onednn"}}}))
    assert choose_products(SHAPE, "auto", "fp32", tmp_path, ALONE) == {"fp32 products": "onednn"}
    assert "by oneDNN, which is faster" in capsys.readouterr().out
    monkeypatch.setattr(fp32_products, "is_faster", lambda: False)
    assert choose_products(SHAPE, "auto", "fp32", tmp_path, ALONE) == {}
    assert "by oneDNN before, and on this CPU by MKL" in capsys.readouterr().out


@pytest.mark.parametrize(("vendor", "family", "flags", "faster"), [
    ("AuthenticAMD", 26, "fpu avx2 avx512f avx512_bf16", True),  # Zen 5
    ("AuthenticAMD", 27, "fpu avx2 avx512f", True),
    ("AuthenticAMD", 25, "fpu avx2 avx512f avx512_bf16", False),  # Zen 4
    ("AuthenticAMD", 26, "fpu avx2", False),  # hidden from a virtual machine
    ("AuthenticAMD", 28, "fpu avx512f amx_tile", False),  # would round to bf16
    ("GenuineIntel", 26, "fpu avx2 avx512f", False),
])
def test_it_goes_by_the_cpu(tmp_path, monkeypatch, vendor, family, flags, faster):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    file = tmp_path / "cpuinfo"
    core = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 17\nflags\t\t: {flags}\n\n"
    file.write_text(2 * core)
    assert fp32_products.is_faster(file) == faster
    assert not fp32_products.is_faster(tmp_path / "no such file")  # no Linux
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)  # on ARM
    assert not fp32_products.is_faster(file)


def test_products_that_were_rounded_to_bf16_are_found(monkeypatch):
    exact = fp32_products._products
    monkeypatch.setattr(fp32_products, "_products", lambda *operands: exact(*(
        x if x.dtype == torch.float64 else x.bfloat16().float() for x in operands)))
    assert not fp32_products.is_right(64)
    monkeypatch.setattr(fp32_products, "_products", lambda *operands: exact(*operands))
    monkeypatch.setattr(fp32_products, "use", lambda name: None)  # MKL's, on any CPU
    assert fp32_products.is_right(64)


def test_a_run_trains_as_by_mkl_up_to_rounding_and_goes_on_as_it_began(tiny, tmp_path, monkeypatch):
    if not fp32_products.is_right(64):
        pytest.skip("a CPU on which oneDNN rounds")
    monkeypatch.setattr("launch.world.choose_device", lambda: torch.device("cpu"))
    for name, faster in (("mkl", False), ("onednn", True)):
        monkeypatch.setattr(fp32_products, "is_faster", lambda faster=faster: faster)
        assert train(tiny(name=name, dtype="fp32", steps=4)) == 0
    assert kept_by(tmp_path / "onednn") == {"fp32 products": "onednn"}
    # Two fp32 sums in other orders: 1e-6 of a loss near 10 after some steps of Adam.
    for (_, one), (_, two) in zip(losses(tmp_path / "mkl"), losses(tmp_path / "onednn"),
                                  strict=True):
        assert one == pytest.approx(two, rel=1e-5)

    for name, by in (("onednn", ONEDNN), ("mkl", MKL)):  # the latter: of an older version, say
        whole = losses(tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step_00000004")
        assert train(tiny(name=name, dtype="fp32", steps=4)) == 0
        assert asked() == by
        assert losses(tmp_path / name) == whole


def kept_by(path):
    return json.loads((path / "config.json").read_text())["resolved"]["kernels"]
