"""The kernels that text is drawn with, interpreted: attention against a cache, and the draw.

    pytest tests/test_kernels_decode.py

The draw itself, against a definition in exact fractions: tests/test_kernels_draw.py.
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import pytest
import torch

from kernels import reference, tiles
from kernels.decode_attention import decode_attention
from kernels.draw import draw
from tests.exact import LIMIT, error, poison  # noqa: F401

# Of o, rounded once from fp32: at most half of 2^-7 in bf16, 2^-10 in fp16, of each element.
LIMITS = {torch.float32: LIMIT, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def small_tile(monkeypatch):
    """So that a short cache has several tiles, the last ragged."""
    monkeypatch.setattr(tiles, "pick", lambda *_: tiles.Tile(1, 16, 4))


def cached(B, H, L, D, dtype):
    """What a cache holds, and a new token's qkv (B, 1, 3C)."""
    kv = torch.randn(2, B, H, L, D).to(dtype)
    return kv, (torch.randn(B, 1, 3 * H * D) * 2).to(dtype)


def definition(qkv, kv, t, n_head):
    """(B, 1, C) in fp64, in one line for each equation."""
    q, k, v = qkv.double().view(len(qkv), 3, n_head, -1).unbind(1)  # each (B, H, D)
    keys = torch.cat([kv[0, :, :, :t].double(), k[:, :, None]], 2)  # (B, H, t + 1, D)
    values = torch.cat([kv[1, :, :, :t].double(), v[:, :, None]], 2)
    s = torch.einsum("bhd,bhtd->bht", q, keys) / q.shape[-1] ** 0.5
    return torch.einsum("bht,bhtd->bhd", s.softmax(-1), values).reshape(len(qkv), 1, -1)


# 0: the token sees itself alone. 16, 17: a whole tile of 16, and one more.
@pytest.mark.parametrize("t", [0, 1, 16, 17, 39])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [64, 128])
def test_attention_of_a_new_token(t, dtype, D, small_tile):
    torch.manual_seed(t)
    kv, qkv = cached(2, 3, 40, D, dtype)
    kv[:, :, :, t:] = float("nan")  # what lies behind counts for nothing
    expected = definition(qkv, kv, t, 3)
    for attention in (decode_attention, reference.decode_attention):
        taken, position = kv.clone(), torch.tensor([t])
        y = attention(qkv, taken, position, 3)
        assert y.dtype == dtype and y.shape == (2, 1, 3 * D)
        assert error(y, expected) < LIMITS[dtype]
        new = qkv.view(2, 3, 3, D)[:, 1:].transpose(0, 1)  # (2, B, H, D)
        assert torch.equal(taken[:, :, :, t], new)
        taken[:, :, :, t] = kv[:, :, :, t]
        assert torch.equal(taken.nan_to_num(), kv.nan_to_num())  # and nothing else
        assert position.item() == t


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_attention_with_the_tiles_that_ship(arch, monkeypatch):
    monkeypatch.setattr(tiles, "arch", lambda device: arch)
    kv, qkv = cached(1, 2, 300, 64, torch.bfloat16)
    y = decode_attention(qkv, kv, torch.tensor([299]), 2)
    assert error(y, definition(qkv, kv, 299, 2)) < LIMITS[torch.bfloat16]


def test_scores_of_some_hundreds(small_tile):
    """The running maximum: exp(300) is no fp32 number."""
    kv, qkv = cached(1, 1, 40, 64, torch.float32)
    kv, qkv = kv * 10, qkv * 10
    y = decode_attention(qkv, kv, torch.tensor([39]), 1)
    assert error(y, definition(qkv, kv, 39, 1)) < 1e-5  # scores of 10^3 in fp32: 10^3 * 2^-24


def test_what_the_kernel_cannot_do_is_said():
    kv, qkv = cached(1, 1, 4, 32, torch.float32)
    with pytest.raises(ValueError, match="head width 64 or 128, not 32"):
        decode_attention(qkv, kv, torch.tensor([0]), 1)
    kv, qkv = cached(1, 1, 4, 64, torch.float64)
    with pytest.raises(ValueError, match="not torch.float64"):
        decode_attention(qkv, kv, torch.tensor([0]), 1)


SETTINGS = [
    dict(), dict(top_k=5), dict(top_k=99), dict(top_p=0.3), dict(top_p=1e-9),
    dict(top_k=7, top_p=0.8), dict(temperature=0.0), dict(temperature=1e-38),
    dict(temperature=30.0, top_p=0.95),
]
CASES = [(torch.bfloat16, settings) for settings in SETTINGS]
CASES += [(dtype, dict(top_k=7, top_p=0.8)) for dtype in (torch.float16, torch.float32)]


@pytest.mark.parametrize(("dtype", "settings"), CASES, ids=str)
def test_the_kernel_draws_what_the_reference_draws(dtype, settings, monkeypatch):
    """Of rows with ties, in a padded buffer whose padding would be the likeliest."""
    monkeypatch.setattr(tiles, "pick", lambda *_: tiles.Tile(1, 64, 4))
    torch.manual_seed(0)
    wide = torch.full((8, 128), 99.0).to(dtype)
    wide[:, :100] = (8 * torch.randn(8, 100)).round() / 4  # steps of 1 / 4: many are equal
    wide[3, :100] = -wide[3, :100].abs()  # no positive one
    wide[4, 20:90] = -torch.inf
    wide[5, :100] = 0.0
    wide[5, 50] = -0.0  # as likely as 0
    u = torch.randint(2**32, (8,)).double() / 2**32
    u[:4] = torch.tensor([0.0, 1 - 2**-32, 0.5, 1.0], dtype=torch.float64)
    drawn = draw(wide[:, :100], u, **settings)
    assert torch.equal(drawn, reference.draw(wide[:, :100], u, **settings))
    assert drawn.ge(0).all() and drawn.lt(100).all()
    assert len(set(drawn.tolist())) > 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 40, 99])
def test_a_row_that_is_no_numbers_is_marked(value, place, monkeypatch):
    monkeypatch.setattr(tiles, "pick", lambda *_: tiles.Tile(1, 64, 4))
    logits = torch.zeros(3, 100)
    logits[1, place] = value
    logits[2] = -torch.inf
    u = torch.full((3,), 0.25, dtype=torch.float64)
    for settings in (dict(), dict(temperature=0.0), dict(top_k=3), dict(top_p=0.5)):
        for drawn in (draw(logits, u, **settings), reference.draw(logits, u, **settings)):
            assert drawn.tolist()[1:] == [-1, -1] and drawn[0] >= 0


def test_a_vocabulary_of_one_block_and_of_less():
    """With the tile that ships, of 4,096."""
    for V in (65, 4096, 4097):
        logits, u = torch.randn(2, V), torch.tensor([0.3, 0.9], dtype=torch.float64)
        assert torch.equal(draw(logits, u, 0.8, 50), reference.draw(logits, u, 0.8, 50))
