"""Reference and Triton are twins in kind too: the same dtype of each output and gradient.

pytest tests/test_kernels_dtypes.py
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import operators
from kernels import reference, tiles

OPS = operators.choose("triton", torch.device("cpu"))
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = (BF16, FP16, FP32)
AUTOCAST = (None, BF16, FP16)


@pytest.fixture(autouse=True)
def one_tile(monkeypatch):
    monkeypatch.setattr(tiles, "pick", lambda *_: tiles.Tile(64, 64, 4))


def name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def run(function, inputs: list[Tensor], autocast: torch.dtype | None) -> list[Tensor]:
    """The outputs, and the gradients of their sum for the inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    return [*outputs, *(x.grad for x in inputs)]


def dtypes_of(*arguments) -> list[torch.dtype]:
    return [x.dtype for x in run(*arguments)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("autocast", AUTOCAST, ids=name)
def test_attention(dtype, autocast):
    qkv = torch.randn(1, 5, 192).to(dtype)
    ours = dtypes_of(lambda z: OPS.attention(z, 1), [qkv], autocast)
    assert ours == dtypes_of(lambda z: reference.attention(z, 1), [qkv], autocast)
    assert ours == [autocast or dtype, dtype]
    long = torch.randn(1, reference.SHORT + 1, 192).to(dtype)  # PyTorch's own attention
    assert ours == dtypes_of(lambda z: reference.attention(z, 1), [long], autocast)


@pytest.mark.parametrize("x", DTYPES, ids=name)
@pytest.mark.parametrize("branch", [None, *DTYPES], ids=name)
@pytest.mark.parametrize("weight", [BF16, FP32], ids=name)
@pytest.mark.parametrize("autocast", AUTOCAST, ids=name)
def test_layer_norm(x, branch, weight, autocast):
    dtypes = [x, weight, weight] + ([branch] if branch else [])
    shapes = [(3, 64), (64,), (64,), (3, 64)]
    inputs = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    ours = dtypes_of(OPS.layer_norm, inputs, autocast)
    assert ours == dtypes_of(reference.layer_norm, inputs, autocast)
    total = torch.promote_types(x, branch) if branch else x
    assert ours == [total, autocast or total, *dtypes]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("h", DTYPES, ids=name)
@pytest.mark.parametrize("weight", [BF16, FP32], ids=name)
@pytest.mark.parametrize("autocast", AUTOCAST, ids=name)
def test_linear_cross_entropy(h, weight, autocast, reduction):
    targets = torch.tensor([3, -100, 64])
    inputs = [torch.randn(3, 64).to(h), torch.randn(128, 64).to(weight)]
    for ops in (OPS, reference):

        def loss(h, weight, f=ops.linear_cross_entropy):
            return f(h, weight, targets, 65, reduction)

        assert dtypes_of(loss, inputs, autocast) == [FP32, h, weight]


@pytest.mark.parametrize("h", DTYPES, ids=name)
@pytest.mark.parametrize("autocast", AUTOCAST, ids=name)
def test_softcap(h, autocast):
    targets = torch.tensor([3, -100, 64])
    inputs = [torch.randn(3, 64).to(h), torch.randn(128, 64)]
    for ops in (OPS, reference):

        def loss(h, weight, f=ops.linear_cross_entropy):
            return f(h, weight, targets, 65, "mean", 15.0)

        assert dtypes_of(loss, inputs, autocast) == [FP32, h, FP32]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("angles", [BF16, FP32], ids=name)
@pytest.mark.parametrize("autocast", AUTOCAST, ids=name)
def test_qk_norm_rotary(dtype, angles, autocast):
    cos, sin = torch.ones(5, 32).to(angles), torch.zeros(5, 32).to(angles)
    for ops in (OPS, reference):

        def turned(qkv, f=ops.qk_norm_rotary):
            return f(qkv, 1, cos, sin)

        inputs = [torch.randn(1, 5, 192).to(dtype)]
        assert dtypes_of(turned, inputs, autocast) == [autocast or dtype, dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("autocast", AUTOCAST, ids=name)
def test_relu_squared(dtype, autocast):
    """Not the autocast dtype: what comes out of a matrix product has it already."""
    for ops in (OPS, reference):
        inputs = [torch.randn(3, 64).to(dtype)]
        assert dtypes_of(ops.relu_squared, inputs, autocast) == [dtype, dtype]


@pytest.mark.parametrize("autocast", AUTOCAST, ids=name)
def test_fp64_is_never_downcast(autocast):
    """Not under autocast either, as PyTorch's own leaves it; Triton has no fp64, and says so."""
    qkv, h, weight = torch.randn(1, 5, 192), torch.randn(3, 64), torch.randn(128, 64)
    targets = torch.tensor([3, -100, 64])
    cos, sin = torch.ones(5, 32), torch.zeros(5, 32)
    for operator, inputs in (
        (lambda f, z: f.attention(z, 1), [qkv]),
        (lambda f, *z: f.layer_norm(*z), [h, weight[0], weight[1], h]),
        (lambda f, *z: f.linear_cross_entropy(*z, targets, 65), [h, weight]),
        (lambda f, *z: f.linear_cross_entropy(*z, targets, 65, softcap=2.0), [h, weight]),
        (lambda f, z: f.qk_norm_rotary(z, 1, cos, sin), [qkv]),
        (lambda f, z: f.relu_squared(z), [h]),
    ):
        wide = [x.double() for x in inputs]
        got = run(lambda *z, o=operator: o(reference, *z), wide, autocast)
        plain = run(lambda *z, o=operator: o(reference, *z), wide, None)
        assert {x.dtype for x in got} == {FP64}
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
        with pytest.raises(ValueError, match="not torch.float64"):
            run(lambda *z, o=operator: o(OPS, *z), wide, autocast)


def test_the_meta_device_has_dtypes_too():
    """A model of shapes alone runs forward (tests count by it), though meta knows no autocast."""
    x, weight = torch.empty(3, 64, device="meta", dtype=BF16), torch.empty(64, device="meta")
    total, y = reference.layer_norm(x, weight, weight, x.float())
    assert total.dtype == y.dtype == FP32
    assert reference.attention(torch.empty(1, 5, 192, device="meta"), 1).dtype == FP32


@pytest.mark.parametrize("autocast", [False, True])
def test_short_attention_rounds_once(autocast):
    """bf16 with the spiked softmax of scores of about 9: all but the results is fp32.

    2^-8 is the most that rounding an fp32 result to bf16 can change it. Rounded scores alone would
    be off by up to 9 * 2^-8 each, and the probabilities with them.
    """
    torch.manual_seed(0)
    B, H, T, D = 2, 2, reference.SHORT, 64
    qkv, dout = 3 * torch.randn(B, T, 3 * H * D).to(BF16), torch.randn(B, T, H * D).to(BF16)
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = reference.attention(qkv.requires_grad_(), H)
    y.backward(dout)
    exact = qkv.detach().double().requires_grad_()
    q, k, v = exact.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    right = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    right.backward(dout.double())
    assert y.dtype == qkv.grad.dtype == BF16
    assert (y - right).norm() <= 2**-8 * right.norm()
    for got, want in zip(qkv.grad.chunk(3, -1), exact.grad.chunk(3, -1), strict=True):  # q, k, v
        assert (got - want).norm() <= 2**-8 * want.norm()
