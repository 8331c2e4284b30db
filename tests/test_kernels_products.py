"""fp32 products come from the faster library that is right, and from the same one on resume.

    pytest tests/test_kernels_products.py
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import products
from model.training import choose_products
from tests.running import ALONE
from train_gpt2 import train


@pytest.fixture
def clock(monkeypatch):
    """Seconds that each library's products take, as the test sets them."""
    seconds, now = {"none": 1.0, "bf16": 1.0}, [0.0]

    def tick() -> float:
        now[0] += seconds[torch.backends.mkldnn.matmul.fp32_precision] / 2
        return now[0]

    monkeypatch.setattr(products.time, "perf_counter", tick)
    yield seconds
    products.use("mkl")


def test_onednn_is_taken_where_it_is_faster_and_right(clock):
    clock["bf16"] = 0.5
    library, line = products.fastest(64, 32)
    assert library == "onednn" and line.startswith("fp32 products: oneDNN's, 2.0 times as fast")


def test_mkl_stays_where_onednn_gains_little(clock):
    clock["bf16"] = 0.8
    assert products.fastest(64, 32) == ("mkl", "")


def test_mkl_stays_where_onednn_computes_in_bf16(clock, monkeypatch):
    linear = F.linear

    def rounded(x, w):
        if torch.backends.mkldnn.matmul.fp32_precision == "bf16":
            return linear(x.bfloat16(), w.bfloat16()).float()
        return linear(x, w)

    monkeypatch.setattr(F, "linear", rounded)
    clock["bf16"] = 0.1
    assert products.fastest(64, 32) == ("mkl", "")


def test_measuring_leaves_the_setting_as_it_was(clock):
    products.fastest(8, 16)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_both_libraries_are_right_to_fp32s_rounding_forward_and_backward(library):
    """Here and on any CPU where oneDNN is chosen; sums of 768 products in fp32."""
    products.use(library)
    if library == "onednn" and products.fastest(64, 768)[0] == "mkl":
        library = "mkl"  # bf16, or the same library
    products.use(library)
    x, w = torch.randn(64, 768, requires_grad=True), torch.randn(96, 768, requires_grad=True)
    grad = torch.randn(64, 96)
    y = F.linear(x, w)
    dx, dw = torch.autograd.grad(y, (x, w), grad)
    products.use("mkl")
    x, w, y = x.detach(), w.detach(), y.detach()
    assert products.relative_error(y, x, w) < products.LARGEST_ERROR
    assert products.relative_error(dx, grad, w.T) < products.LARGEST_ERROR
    assert products.relative_error(dw, grad.T, x.T) < products.LARGEST_ERROR


@pytest.mark.parametrize(("dtype", "deterministic"), [("bf16", False), ("fp64", False),
                                                     ("fp32", True)])
def test_it_is_not_measured_where_it_does_not_count(dtype, deterministic, monkeypatch):
    monkeypatch.setattr(products, "fastest", lambda *_: ("onednn", "asked"))
    assert choose_products(8, 16, dtype, deterministic, None, ALONE) == "mkl"


def test_a_run_keeps_its_library_when_it_goes_on(tiny, monkeypatch, capsys):
    """Also where the other one is faster by then: a run goes on bit for bit."""
    used = []
    monkeypatch.setattr(products, "use", used.append)
    monkeypatch.setattr(products, "fastest", lambda *_: ("onednn", "oneDNN it is"))
    config = tiny(steps=1)
    config = replace(config, optim=replace(config.optim, schedule="constant"))
    train(config)
    assert "oneDNN it is" in capsys.readouterr().out
    saved = json.loads((Path(config.out_dir) / config.name / "config.json").read_text())
    assert saved["resolved"]["fp32_products"] == "onednn"
    monkeypatch.setattr(products, "fastest", lambda *_: ("mkl", ""))
    used.clear()
    train(replace(config, steps=2))
    assert used == ["onednn", "mkl"]  # chosen, and given back at the end


def test_a_run_from_before_there_was_a_choice_stays_with_mkl(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "fastest", lambda *_: ("onednn", "asked"))
    (tmp_path / "config.json").write_text('{"config": {}, "resolved": {"dtype": "fp32"}}')
    assert choose_products(8, 16, "fp32", False, tmp_path, ALONE) == "mkl"
