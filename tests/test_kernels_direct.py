"""Operators past torch.library: the same to the bit, and an operator where one is wanted.

pytest tests/test_kernels_direct.py
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import operators, tiles

OPS = operators.choose("triton", torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_tile(monkeypatch):
    monkeypatch.setattr(tiles, "pick", lambda *_: tiles.Tile(64, 64, 4))


def numbers(*shape):
    return torch.randn(shape, requires_grad=True)


def gradients_of(outputs, inputs):
    """Of a sum of the outputs, each with other weights."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        total = sum((out * torch.randn_like(out)).sum() for out in outputs)
    return torch.autograd.grad(total, [x for x in inputs if isinstance(x, torch.Tensor)
                                       and x.requires_grad])


class Watching(TorchDispatchMode):
    """Notes what is called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


DIRECT = {  # what is asked for, with inputs that have gradients, and the operators of both passes
    "layer_norm": (lambda x, w, b, branch: OPS.layer_norm(x, w, b, branch),
                   tuple(numbers(*shape) for shape in ((2, 9, 64), (64,), (64,), (2, 9, 64))),
                   ["gpt2.layer_norm_forward", "gpt2.layer_norm_backward"]),
    "linear_cross_entropy": (lambda h, w, t, V: (OPS.linear_cross_entropy(h, w, t, V, "sum"),),
                             (numbers(9, 64), numbers(128, 64), torch.randint(0, 65, (9,)), 65),
                             ["gpt2.linear_cross_entropy"]),
}


@pytest.mark.parametrize("what", DIRECT)
def test_past_the_operator_all_is_the_same_to_the_bit(what):
    """Who looks at operators sees one, and who doesn't is spared it."""
    function, inputs, names = DIRECT[what]
    outputs = function(*inputs)
    assert "Direct" in type(outputs[0].grad_fn).__name__
    with Watching() as watching:
        by_operator = function(*inputs)
        watched = gradients_of(by_operator, inputs)
    for name in names:
        assert f"{name}.default" in watching.seen
    for ours, theirs in zip((*outputs, *gradients_of(outputs, inputs)),
                            (*by_operator, *watched), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("what", DIRECT)
def test_tensors_without_numbers_come_to_the_operator(what):
    """On the meta device, and fake ones also outside of their mode."""
    function, inputs, _ = DIRECT[what]
    mode = FakeTensorMode()
    for without_numbers in (lambda x: x.detach().to("meta"),
                            lambda x: mode.from_tensor(x.detach())):
        empty = [without_numbers(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        for x in empty:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.requires_grad_()
        outputs = function(*empty)
        assert [out.shape for out in outputs] == [out.shape for out in function(*inputs)]
        outputs[-1].sum().backward()
        assert empty[0].grad.shape == inputs[0].shape


@pytest.mark.parametrize("what", [*DIRECT, "embedding"])
def test_a_second_derivative_is_an_error_and_not_wrong(what):
    if what == "embedding":
        weight = torch.randn(5, 64, requires_grad=True)
        tokens = torch.tensor([[3, 0, 3]])
        outputs = OPS.embedding(tokens, weight, None, torch.tensor([1, 0, 2], dtype=torch.int32))
        inputs = (weight,)
    else:
        function, inputs, _ = DIRECT[what]
        outputs = function(*inputs)
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    with pytest.raises(RuntimeError, match=f"{what} has no second derivative"):
        torch.autograd.grad(outputs[0].square().sum() + outputs[-1].sum(), wanted,
                            create_graph=True)
