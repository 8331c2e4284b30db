"""The Triton kernels, interpreted, against fp64 PyTorch: every output and every gradient.

    pytest tests/test_kernels_numerics.py
    pytest -rP tests/test_kernels_numerics.py | grep '^error'      # the table of all errors

Limits: tests/exact.py. The speedrun's operators: tests/test_kernels_speedrun.py.
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import operators
from kernels import attention, cross_entropy, reference, tiles
from kernels.columns import Columns, operand, store
from tests.exact import LIMIT, compare, error, gradients, loss_inputs, poison, unfused  # noqa: F401

OPS = operators.choose("triton", torch.device("cpu"))


# How a tile goes about it, apart from its size.
WAYS = {"pointers": {}, "descriptors": dict(tma=True), "delayed": dict(tma=True, delayed=True)}


@pytest.fixture(params=WAYS)
def tile(request, monkeypatch):
    """One tile for all kernels."""
    monkeypatch.setattr(tiles, "pick", lambda *_: tiles.Tile(64, 64, 4, 1, **WAYS[request.param]))


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


def passes_by(way: str, qkv: Tensor, dout: Tensor, monkeypatch) -> list[Tensor]:
    """out, lse and dqkv of two heads. Tiles are twice as long on the side that a program holds."""
    def pick(kernel: str, *_) -> tiles.Tile:
        m, n = (32, 64) if kernel.startswith("attention_dkdv") else (64, 32)
        return tiles.Tile(m, n, 4, 1, **WAYS[way])

    monkeypatch.setattr(tiles, "pick", pick)
    out, lse = attention.launch_forward(qkv, 2)
    return [out, lse, attention.launch_backward(dout, qkv, out, lse, 2)]


# 100: the last tiles reach past T, into the next sequence. 128: none does.
@pytest.mark.parametrize("T", [100, 128])
def test_a_descriptor_has_the_bits_of_a_pointer(T, monkeypatch):
    torch.manual_seed(T)
    qkv, dout = torch.randn(2, T, 3 * 128).bfloat16(), torch.randn(2, T, 128).bfloat16()
    by_pointer = passes_by("pointers", qkv, dout, monkeypatch)
    by_descriptor = passes_by("descriptors", qkv, dout, monkeypatch)
    for one, other in zip(by_pointer, by_descriptor, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@triton.jit
def store_ones(x, batch, start, first, T, width):
    store(Columns(x, batch, first, T, width), start, tl.full([32, 64], 1.0, tl.float32))


# A later program may write the same rows again: here none does, and what it has no right to shows.
@pytest.mark.parametrize("tma", [False, True])
def test_a_stored_tile_ends_with_its_sequence(tma):
    x = torch.zeros(3, 40, 192, dtype=torch.bfloat16)
    store_ones[(1,)](operand(x, 32, 64, tma), 1, 32, 64, 40, 192)
    expected = torch.zeros_like(x)
    expected[1, 32:40, 64:128] = 1
    assert torch.equal(x, expected)


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
        )

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
