"""The Triton kernels, interpreted, against fp64 PyTorch: every output and every gradient.

    pytest tests/test_kernels_numerics.py
    pytest -rP tests/test_kernels_numerics.py | grep '^error'      # the table of all errors

An error is relative, in the Frobenius norm, against kernels/reference.py in fp64 on the very same
inputs. Limits: fp32 1e-6, which is 8 unit roundoffs of 2^-23 for chains of up to some thousand
fp32 additions, whose errors average out; bf16 and fp16 1.2 x what PyTorch's own operator makes of
the same inputs, for both round the same intermediates. Every output is NaN before it is written.
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import cross_entropy, reference, tiles

OPS = kernels.operators("triton", torch.device("cpu"))
LIMIT = 1e-6


@pytest.fixture(autouse=True)
def poison():
    """Fills what torch.empty and new_empty return with NaN, for the kernels' outputs too."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["pointers", "descriptors"])
def tile(request, monkeypatch):
    """One tile for all: what differs between architectures is its size, and how it loads."""
    tma = request.param == "descriptors"
    monkeypatch.setattr(tiles, "pick", lambda *_: tiles.Tile(64, 64, 4, 1, tma))


def error(got: Tensor, exact: Tensor) -> float:
    """Relative; per element of size 1 where exact is 0, as dq and dk of a single key are."""
    assert got.isfinite().all()
    scale = exact.norm().item() or exact.numel() ** 0.5
    return (got.double() - exact).norm().item() / scale


def gradients(function, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """The outputs of a function, and its gradients for given gradients of the outputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(
        outputs, [g.to(y.dtype) for y, g in zip(outputs, upstream, strict=True)]
    )
    return [y.detach() for y in outputs] + [x.grad for x in inputs]


def compare(names: str, ours, torchs, inputs: list[Tensor], upstream: list[Tensor], exact=None):
    """Asserts each error, against LIMIT in fp32 and against PyTorch's own otherwise."""
    exact = gradients(exact or torchs, [x.double() for x in inputs], [g.double() for g in upstream])
    got = gradients(ours, inputs, upstream)
    own = gradients(torchs, inputs, upstream)
    for name, a, b, c in zip(names.split(), got, own, exact, strict=True):
        single = all(x.dtype == torch.float32 for x in inputs)
        limit = LIMIT if single else max(LIMIT, 1.2 * error(b, c))
        size = "x".join(map(str, inputs[0].shape))
        dtype = str(inputs[0].dtype).removeprefix("torch.")
        print(f"error {name:4} {dtype:8} {size:10} ours {error(a, c):.1e} torch {error(b, c):.1e}")
        assert error(a, c) <= limit, f"{name}: {error(a, c):.2e} > {limit:.2e}"


def qkv_parts(function, n_head: int):
    """attention as a function of q, k, v (B, T, C) apart, so that each gradient is measured."""
    return lambda q, k, v: function(torch.cat((q, k, v), -1), n_head)


# 1: a single key. 17, 129: one more than a tile of 16 and two of 64, so the last is nearly empty.
# 64, 256: nothing is ragged.
@pytest.mark.parametrize("T", [1, 17, 64, 129, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(T, dtype, tile):
    torch.manual_seed(T)
    B, H, D = (2, 2, 64) if T < 256 else (1, 1, 64)
    q, k, v, do = torch.randn(4, B, T, H * D).to(dtype)
    ours, own = qkv_parts(OPS.attention, H), qkv_parts(sdpa, H)
    compare("o dq dk dv", ours, own, [q, k, v], [do], qkv_parts(reference.attention, H))


def sdpa(qkv: Tensor, n_head: int) -> Tensor:
    """PyTorch's fused attention, whatever the length."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_with_heads_of_128(dtype, tile):
    q, k, v, do = torch.randn(4, 1, 129, 256).to(dtype)
    compare("o dq dk dv", qkv_parts(OPS.attention, 2), qkv_parts(sdpa, 2), [q, k, v], [do])


def test_attention_at_full_length(monkeypatch):
    """T = 1,024, with the tiles that sm_90 ships."""
    pick = tiles.pick
    monkeypatch.setattr(tiles, "pick", lambda kernel, arch, size: pick(kernel, "sm_90", size))
    q, k, v, do = torch.randn(4, 1, 1024, 64).bfloat16()
    compare("o dq dk dv", qkv_parts(OPS.attention, 1), qkv_parts(sdpa, 1), [q, k, v], [do])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_with_the_tiles_that_ship(arch, dtype, monkeypatch):
    """Tiles of different kernels differ: each has to reach the ragged end by itself."""
    monkeypatch.setattr(tiles, "arch", lambda device: arch)
    T = 70 if dtype == torch.float32 else 200  # fp32 tiles are small, and many to interpret
    q, k, v, do = torch.randn(4, 1, T, 64).to(dtype)
    compare("o dq dk dv", qkv_parts(OPS.attention, 1), qkv_parts(sdpa, 1), [q, k, v], [do])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # behind the mask
def test_attention_of_large_scores_and_a_misaligned_view():
    """Scores of some hundreds need the running maximum; a view may start between two 16 bytes."""
    x = torch.randn(1 + 65 * 192) * 12
    qkv = x[1:].view(1, 65, 192).requires_grad_()
    y = OPS.attention(qkv, 1)
    exact = reference.attention(qkv.detach().double(), 1)
    assert qkv.data_ptr() % 16 and error(y, exact) < 1e-5  # scores of 10^3 in fp32: 10^3 * 2^-24
    assert torch.autograd.grad(y.sum(), qkv)[0].isfinite().all()


def test_keys_after_a_query_do_not_reach_it(tile):
    qkv = torch.randn(1, 100, 192)
    later = qkv.clone()
    later[:, 70:] = 1e4
    assert torch.equal(OPS.attention(qkv, 1)[:, :70], OPS.attention(later, 1)[:, :70])


@pytest.mark.parametrize("C", [64, 768, 1280, 1600])  # GPT-2's widths; 64: far less than a block
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm(C, branch, dtype):
    torch.manual_seed(C)
    N = 37  # more rows than programs, and not a multiple of them
    x, r, ds, dy = torch.randn(4, N, C).to(dtype)
    weight, bias = 1 + 0.1 * torch.randn(C), torch.randn(C)
    if dtype != torch.float32:
        weight, bias = weight.to(dtype), bias.to(dtype)
    if branch:
        compare(
            "s y dx dw db dr", OPS.layer_norm, reference.layer_norm, [x, weight, bias, r], [ds, dy]
        )
    else:
        ours, own = (lambda *a, f=o: f.layer_norm(*a)[1] for o in (OPS, reference))
        compare("y dx dw db", ours, own, [x, weight, bias], [dy])


def test_layer_norm_in_training():
    """fp32 residual stream and weights, bf16 branch, under autocast: the dtype of each result."""
    x, branch = torch.randn(2, 5, 768), torch.randn(2, 5, 768).bfloat16()
    weight, bias = torch.randn(2, 768)
    inputs = [x, weight, bias, branch]
    ds, dy = torch.randn(2, 2, 5, 768)

    def ours(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return OPS.layer_norm(*inputs)

    exact = gradients(reference.layer_norm, [z.double() for z in inputs], [ds, dy.bfloat16()])
    got = gradients(ours, inputs, [ds, dy])
    s, y, dx, dw, db, dr = got
    wide, narrow = torch.float32, torch.bfloat16
    assert [z.dtype for z in got] == [wide, narrow, wide, wide, wide, narrow]
    for got, right in zip((s, dx, dw, db), (exact[i] for i in (0, 2, 3, 4)), strict=True):
        assert error(got, right) < LIMIT
    assert error(y, exact[1]) < 2**-8 and error(dr, exact[5]) < 2**-8  # rounded once


def test_layer_norm_of_a_constant_row_far_from_zero():
    """The variance is taken about the mean: 1e4 + noise keeps its noise."""
    x = (1e4 + torch.randn(3, 768)).double()
    y = OPS.layer_norm(x.float(), torch.ones(768), torch.zeros(768))[1]
    one, zero = torch.ones(768).double(), torch.zeros(768).double()
    exact = reference.layer_norm(x.float().double(), one, zero)[1]
    assert error(y, exact) < 1e-3  # the mean's own rounding, 1e4 * 2^-24, against noise of 1


def loss_inputs(N: int, C: int, vocab: int, padded: int, dtype):
    h, weight = torch.randn(N, C).to(dtype), (torch.randn(padded, C) * C**-0.5).to(dtype)
    targets = torch.randint(0, vocab, (N,))
    targets[1::7] = -100
    targets[0], targets[2] = 0, vocab - 1  # first and last
    return h, weight, targets


def unfused(
    h: Tensor, weight: Tensor, targets: Tensor, vocab: int, softcap: float = 0.0
) -> Tensor:
    logits = (h @ weight.T)[:, :vocab]
    logits = logits.to(torch.promote_types(h.dtype, torch.float32))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets)


# 50,257 in 50,304: whole blocks, an edge, padding. 65 in 128: nothing but an edge. 4,096: no edge.
@pytest.mark.parametrize("vocab, padded", [(50257, 50304), (65, 128), (4096, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_cross_entropy(vocab, padded, dtype, monkeypatch):
    torch.manual_seed(vocab)
    N = 19 if vocab > 5000 else 130  # 130 tokens come in two chunks, the second almost empty
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 128 * padded)
    h, weight, targets = loss_inputs(N, 64, vocab, padded, dtype)
    one = [torch.ones(())]
    compare(
        "loss dh dW",
        lambda h, w: OPS.linear_cross_entropy(h, w, targets, vocab),
        lambda h, w: unfused(h, w, targets, vocab),
        [h, weight],
        one,
    )


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


def test_linear_cross_entropy_in_training(monkeypatch):
    """fp32 weight under autocast: its gradient comes from bf16 products, but is never bf16."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 128 * 384)
    h, weight, targets = loss_inputs(130, 64, 321, 384, torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = OPS.linear_cross_entropy(h.requires_grad_(), weight, targets, 321)
    loss.backward()
    assert loss.dtype == h.grad.dtype == weight.grad.dtype == torch.float32
    low_h, low_w = (z.detach().bfloat16().double().requires_grad_() for z in (h, weight))
    unfused(low_h, low_w, targets, 321).backward()
    # dz is rounded to bf16, once an element: 2^-9 each, averaged over the tokens of a sum.
    assert error(weight.grad, low_w.grad) < 2**-9
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())
    assert weight.grad[321:].eq(0).all()


def test_sum_and_mean_agree_and_no_target_gives_zero():
    h, weight, targets = loss_inputs(20, 64, 65, 128, torch.float32)
    mean, total = (OPS.linear_cross_entropy(h, weight, targets, 65, r) for r in ("mean", "sum"))
    torch.testing.assert_close(total, mean * (targets != -100).sum())
    weight.requires_grad_()
    nothing = OPS.linear_cross_entropy(h, weight, torch.full_like(targets, -100), 65)
    nothing.backward()
    assert nothing.item() == 0 and weight.grad.eq(0).all()


def test_loss_without_gradients_makes_none(monkeypatch):
    h, weight, targets = loss_inputs(20, 64, 65, 128, torch.float32)
    monkeypatch.setattr(cross_entropy, "_product", None)  # would make dh and dW
    weight.requires_grad_()
    with torch.no_grad():
        quiet = OPS.linear_cross_entropy(h, weight, targets, 65)
    assert quiet.item() == pytest.approx(unfused(h, weight, targets, 65).item(), rel=1e-6)


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
            gradients(lambda q: OPS.attention(q, 1), [qkv], [torch.ones(1, 100, 64)])
            + gradients(lambda *a: OPS.layer_norm(*a)[1], [x, x[0], x[1]], [x])
            + gradients(
                lambda h, w: OPS.linear_cross_entropy(h, w, targets, 65),
                [h, weight],
                [torch.ones(())],
            )
            + gradients(
                lambda h, w: OPS.linear_cross_entropy(h, w, targets, 65, softcap=2.0),
                [h, weight],
                [torch.ones(())],
            )
            + gradients(lambda q: OPS.qk_norm_rotary(q, 1, *rotary(100, 64)), [qkv], [qkv])
            + gradients(OPS.relu_squared, [x], [x])
        )

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
