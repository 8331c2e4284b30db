"""The speedrun's operators, interpreted, against fp64 PyTorch: softcap, QK-norm, relu squared.

    pytest tests/test_kernels_speedrun.py
    pytest -rP tests/test_kernels_speedrun.py | grep '^error'      # the table of all errors

Limits: tests/exact.py.
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import operators
from kernels import cross_entropy, reference
from launch.plan import memory
from launch.plan.job import Job
from model.gpt2 import GPTConfig
from model.network import new_network
from tests.exact import compare, gradients, loss_inputs, poison, unfused  # noqa: F401

OPS = operators.choose("triton", torch.device("cpu"))


@pytest.mark.parametrize("vocab, padded", [(50257, 50304), (65, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_softcap(vocab, padded, dtype, monkeypatch):
    """Logits of 4, capped at 5: half of them are bent, and one in five is nearly flat."""
    torch.manual_seed(vocab)
    N = 9 if vocab > 5000 else 130  # 130 tokens come in two chunks
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 128 * padded)
    h, weight, targets = loss_inputs(N, 64, vocab, padded, dtype)
    compare(
        "loss dh dW",
        lambda h, w: OPS.linear_cross_entropy(h, w, targets, vocab, softcap=5.0),
        lambda h, w: unfused(h, w, targets, vocab, 5.0),
        [h, 4 * weight],
        [torch.ones(())],
        lambda h, w: reference.linear_cross_entropy(h, w, targets, vocab, softcap=5.0),
    )


def identity_head(logits: Tensor) -> tuple[Tensor, Tensor]:
    """h and a weight that make exactly these logits (N, 50): dh is then dz."""
    h = F.pad(logits, (0, 14))  # (N, 64)
    return h.requires_grad_(), torch.eye(128, 64)


def test_the_caps_slope_is_exact_where_it_is_flat():
    """dz, value by value, at up to 4 caps on both sides (a slope of 1e-3). PyTorch's own in fp32 is
    off by 3.5e-5 there.

    In units of ln 2 the logits reach 21.6, off by half a unit in the last place, 2^-20, for tanh
    (as 1 - r) and for its product with c each, and so is log2 sum; their difference reaches 43, off
    by 2^-19: 4.8e-6 ln 2 in all. The slope's exponent, 11.5 at most, is off by 2^-21, and four more
    operations by 2^-24 each: together below 5e-6. Twice that, for the exponentials.
    """
    torch.manual_seed(0)
    logits = (torch.rand(8, 50) - 0.5) * 120
    targets = logits.argmin(-1)  # p - 1 is about -1: nothing cancels
    h, weight = identity_head(logits)
    OPS.linear_cross_entropy(h, weight, targets, 50, "sum", 15.0).backward()
    exact = logits.double().requires_grad_()
    F.cross_entropy(15 * torch.tanh(exact / 15), targets, reduction="sum").backward()
    assert ((h.grad[:, :50] - exact.grad).abs() <= 1e-5 * exact.grad.abs()).all()
    assert h.grad[:, 50:].eq(0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # a row of NaN
def test_the_cap_of_huge_logits_and_of_nan():
    """exp(2 z / c) would overflow from 44 c on; a NaN must not be capped into a number."""
    logits = torch.full((2, 50), -1e30)
    logits[:, 7] = 1e30
    h, weight = identity_head(logits)
    losses = [
        OPS.linear_cross_entropy(h[[i]], weight, torch.tensor([t]), 50, softcap=15.0)
        for i, t in ((0, 7), (1, 8))
    ]
    assert losses[0].item() == pytest.approx(49 * math.exp(-30), abs=1e-6)
    assert losses[1].item() == pytest.approx(30, rel=1e-6)
    sum(losses).backward()
    assert h.grad.abs().max() < 1e-15  # flat
    h.data[0, 3] = math.nan
    assert OPS.linear_cross_entropy(h[:1], weight, torch.tensor([7]), 50, softcap=15.0).isnan()


def rotary(T: int, D: int, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """cos and sin (*batch, T, D/2) of up to T radians; with a batch, of any."""
    angle = torch.arange(T)[:, None] * torch.linspace(1, 0, D // 2)
    if batch:
        angle = 10 * torch.randn(*batch, T, D // 2)
    return angle.cos(), angle.sin()


# 1: a single token. 17, 129: no tile of 16 or 32 tokens is whole at the end.
@pytest.mark.parametrize("B, T, H, D, batch", [
    (2, 1, 1, 64, ()), (2, 17, 3, 64, ()), (1, 129, 2, 128, ()), (3, 17, 2, 128, (3,)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_qk_norm_rotary(B, T, H, D, batch, dtype):
    torch.manual_seed(T)
    cos, sin = rotary(T, D, batch)
    scale = torch.randn(3, B, T, 1).exp()  # heads of different lengths
    q, k, v = (scale * torch.randn(3, B, T, H * D)).to(dtype)
    dout = torch.randn(B, T, 3 * H * D).to(dtype)
    ours, own = (
        lambda *parts, f=ops.qk_norm_rotary: f(torch.cat(parts, -1), H, cos, sin, 1.36)
        for ops in (OPS, reference)
    )
    compare("qkv dq dk dv", ours, own, [q, k, v], [dout])


def test_qk_norm_rotary_goes_back_by_rounded_outputs():
    """The worst upstream: along y, where a norm lets nothing through and all is cancellation.

    y is kept in bf16, off by up to 2^-9 of itself. With dy = y, z = g dy - y m / g and mean(n^2) =
    1 / (1 + eps r^2): what is left is the rounding of y in m and in y, each below 2^-8 of |r dy|.
    """
    torch.manual_seed(0)
    cos, sin = rotary(9, 64)
    qkv = torch.randn(1, 9, 192).bfloat16().requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    y = OPS.qk_norm_rotary(qkv, 1, cos, sin)
    right = reference.qk_norm_rotary(exact, 1, cos, sin)
    dy = y.detach()
    y.backward(dy)
    right.backward(dy.double())
    r = exact[..., :128].detach().view(9, 2, 64).square().mean(-1, keepdim=True).rsqrt()
    size = (r * dy[..., :128].double().view(9, 2, 64)).norm()
    assert (qkv.grad - exact.grad)[..., :128].norm() <= 2**-8 * size


def test_a_query_of_zeros_is_not_divided_by_zero():
    qkv = torch.zeros(1, 3, 192, requires_grad=True)
    y = OPS.qk_norm_rotary(qkv, 1, *rotary(3, 64))
    y.sum().backward()
    assert y.eq(0).all() and qkv.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 1024), (1025,)], ids=str)
def test_relu_squared(shape, dtype):
    """Both round once, out of and in fp32: not only near, but the same bits."""
    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape).to(dtype)
    x.view(-1)[0] = 1.5  # something that isn't 0
    compare("y dx", OPS.relu_squared, reference.relu_squared, [x], [dy])
    ours, own = (gradients(f.relu_squared, [x], [dy]) for f in (OPS, reference))
    assert all(torch.equal(a, b) for a, b in zip(ours, own, strict=True))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # 300^2 in fp16
def test_relu_squared_of_what_is_not_finite():
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 300.0]).half()
    ours, own = (gradients(f.relu_squared, [x], [torch.ones(5)]) for f in (OPS, reference))
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_every_kernel_repeats_itself_bit_for_bit():
    def once():
        torch.manual_seed(5)
        qkv, x = torch.randn(1, 100, 192), torch.randn(30, 64)
        h, weight, targets = loss_inputs(30, 64, 65, 128, torch.float32)
        return (
            gradients(
                lambda h, w: OPS.linear_cross_entropy(h, w, targets, 65, softcap=2.0),
                [h, weight],
                [torch.ones(())],
            )
            + gradients(lambda q: OPS.qk_norm_rotary(q, 1, *rotary(100, 64)), [qkv], [qkv])
            + gradients(OPS.relu_squared, [x], [x])
        )

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_keep_what_the_plan_says():
    """Of two blocks: what torch.compile's partitioner saves for their backward pass, casts of the
    weights included, and the angles' cosines and sines. The first block's x is x0."""
    shape = GPTConfig(arch="speedrun", n_layer=2, n_head=2, n_embd=128, n_ctx=32, n_vocab=65)
    model = new_network(shape, OPS)
    for block in model.h:
        block.compile(backend="aot_eager_decomp_partition")
    with torch.autocast("cpu", torch.bfloat16):
        x = model.hidden(torch.zeros(1, 32, dtype=torch.long))
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    saved, nodes, seen = {}, [x.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [after for after, _ in node.next_functions]
        if node.name().startswith("CompiledFunction"):
            saved |= {t.untyped_storage()._cdata: t.untyped_storage().nbytes()
                      for t in node.saved_tensors}
    job = Job(n_layer=2, n_head=2, n_embd=128, n_ctx=32, n_vocab=65, parameters=0, steps=1,
              flops_per_token=0, batch_tokens=32, micro_batch=1, arch="speedrun")
    kept = sum(size for storage, size in saved.items() if storage not in own)
    assert kept == memory.activations(job, 1) + 2 * 4 * 32 * 64 // 2
