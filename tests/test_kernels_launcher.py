"""kernels/launcher.py, with a kernel in Triton's place that says by which way it was started.

That it starts what Triton would have started is shown with Triton itself, on the stand-in for a
GPU: tests/nullgpu/specialized.py.
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import columns, launcher


class Kernel:
    """Of two pointers and numbers, with one constant. by_triton: the grids that Triton started;
    remembered: everything that its launcher was given without Triton."""

    arg_names = ("x", "y", "n", "scale", "BLOCK")

    def __init__(self):
        self.by_triton, self.remembered = [], []

    def __getitem__(self, grid):
        def started(*args, **named):
            self.by_triton.append(grid)
            return SimpleNamespace(run=lambda *given: self.remembered.append(given),
                                   function=f"function {len(self.by_triton)}",
                                   packed_metadata="metadata")

        return started


@pytest.fixture
def card(monkeypatch):
    """A device to be on, and what the launcher takes for Triton's kernels."""
    now = SimpleNamespace(device=0)
    now.get_current_device = lambda: now.device
    now.get_current_stream = lambda device: f"stream of {device}"
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=now))
    monkeypatch.setattr(launcher, "JITFunction", Kernel)
    monkeypatch.setattr(launcher, "_found", {})
    return now


def started(kernel: Kernel, x=None, y=None, n=7, scale=0.5, grid=(3,), **named) -> str:
    """The way of a launch: "triton" or "remembered"."""
    before = len(kernel.by_triton)
    x = torch.zeros(64, dtype=torch.bfloat16) if x is None else x
    launcher.launch(kernel, grid, x, y, n, scale, **({"BLOCK": 64, "num_warps": 4} | named))
    return "triton" if len(kernel.by_triton) > before else "remembered"


def test_the_second_launch_does_not_ask_triton(card):
    kernel, x = Kernel(), torch.zeros(64)
    assert started(kernel, x) == "triton"
    assert started(kernel, torch.ones(64), scale=0.25, grid=(5, 2)) == "remembered"
    (given,) = kernel.remembered
    assert given[:9] == (5, 2, 1, "stream of 0", "function 1", "metadata", None, None, None)
    assert torch.equal(given[9], torch.ones(64))
    assert given[10:] == (None, 7, 0.25, 64)  # the option is not an argument


@pytest.mark.parametrize("other", [
    dict(x=torch.zeros(64)),  # fp32
    dict(y=torch.zeros(64)),  # where there was none
    dict(n=16), dict(n=1), dict(n=8),
    dict(BLOCK=128), dict(num_warps=8),
    dict(x=TensorDescriptor.from_tensor(torch.zeros(64, 64, dtype=torch.bfloat16), [16, 64])),
], ids=["dtype", "absent", "a multiple of 16", "1", "a number", "constant", "option", "descriptor"])
def test_what_triton_may_compile_anew_for_is_asked_of_triton(card, other):
    kernel = Kernel()
    assert started(kernel) == "triton"
    assert started(kernel, **other) == "triton"
    assert started(kernel, **other) == started(kernel) == "remembered"
    assert [given[4] for given in kernel.remembered] == ["function 2", "function 1"]


def test_descriptors_of_other_tiles_are_told_apart(card):
    kernel, x = Kernel(), torch.zeros(64, 64)
    for rows in (16, 32):
        assert started(kernel, TensorDescriptor.from_tensor(x, [rows, 64])) == "triton"
    assert started(kernel, TensorDescriptor.from_tensor(x, [16, 64])) == "remembered"


def test_the_descriptors_of_our_attention_are_remembered_too(card):
    """Of a class of their own; so are parameters."""
    kernel, x = Kernel(), torch.zeros(2, 64, 192, dtype=torch.bfloat16)
    bias = torch.nn.Parameter(torch.zeros(64))
    assert started(kernel, columns.operand(x, 16, 64, True), bias) == "triton"
    assert started(kernel, columns.operand(x, 16, 64, True), bias) == "remembered"
    assert started(kernel, columns.operand(x, 32, 64, True), bias) == "triton"


def test_every_device_has_its_own(card):
    kernel = Kernel()
    started(kernel)
    card.device = 1
    assert started(kernel) == "triton"
    assert started(kernel) == "remembered"
    assert kernel.remembered[0][3:5] == ("stream of 1", "function 2")


def test_pointers_that_are_not_aligned_are_asked_of_triton_each_time(card):
    kernel, x = Kernel(), torch.zeros(72, dtype=torch.bfloat16)
    assert x.data_ptr() % 16 == 0
    assert started(kernel, x[8:]) == "triton"
    assert started(kernel, x[8:]) == "remembered"  # 16 bytes further
    for _ in range(2):
        assert started(kernel, x[4:]) == "triton"  # 8
        assert started(kernel, x, y=x[1:]) == "triton"


def test_a_profilers_hook_gets_to_see_every_launch(card, monkeypatch):
    kernel = Kernel()
    started(kernel)
    hooks = knobs.runtime.launch_enter_hook
    monkeypatch.setattr(hooks, "calls", [lambda metadata: None])
    assert started(kernel) == "triton"
    monkeypatch.undo()


def test_amd_goes_tritons_way(card, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    kernel = Kernel()
    assert started(kernel) == started(kernel) == "triton"


@triton.jit
def add_one(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)


def test_the_interpreter_goes_its_own_way():
    x = torch.zeros(20)
    for _ in range(2):
        launcher.launch(add_one, (1,), x, 17, BLOCK=32, num_warps=1)
    assert x.tolist() == [2.0] * 17 + [0.0] * 3
