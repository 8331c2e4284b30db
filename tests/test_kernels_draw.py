"""The draw of a token, against its definition in exact fractions.

    pytest tests/test_kernels_draw.py

For a known distribution and a given u there is one right token: the one whose interval of the
cumulative sum holds u. Nothing here is a matter of chance.
"""

import math
from fractions import Fraction

import pytest
import torch

from kernels.constants import DRAW_UNITS
from kernels.reference import draw


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


def definition(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """(the token, how far u is from the nearest end of an interval), in fp64 and fractions."""
    x = logits.tolist()
    weights = [Fraction(math.exp((value - max(x)) / temperature)) for value in x]
    likeliest = sorted(x, reverse=True)
    least = likeliest[min(top_k or len(x), len(x)) - 1]
    if top_p < 1:
        held = sum(w for w, value in zip(weights, x, strict=True) if value >= least)
        for value in likeliest:  # down, until these hold enough
            least = value
            above = sum(w for w, other in zip(weights, x, strict=True) if other >= value)
            if above >= Fraction(top_p) * held:
                break
    kept = [w if value >= least else 0 for w, value in zip(weights, x, strict=True)]
    target = Fraction(u) * sum(kept)
    before, token, margin = Fraction(0), None, Fraction(1)
    for i, w in enumerate(kept):
        if before <= target < before + w:
            token = i
        before += w
        margin = min(margin, abs(target - before) / sum(kept))
    return token, margin


SETTINGS = [
    dict(), dict(top_k=1), dict(top_k=3), dict(top_k=40), dict(top_p=0.5), dict(top_p=0.9),
    dict(top_k=10, top_p=0.7), dict(temperature=0.25), dict(temperature=5.0, top_k=20, top_p=0.99),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_token_is_the_one_whose_interval_holds_u(settings, dtype):
    """A sum of 40 weights in fp32, each off by up to 2^-18 of itself (its exponent, up to 16, is
    rounded by 2^-20, and exp itself), is off by less than 2^-18: farther from an end than that,
    the token is certain."""
    torch.manual_seed(0)
    checked = 0
    for _ in range(40):
        logits, u = (2 * torch.randn(40)).to(dtype), torch.randint(2**32, ()).item() / 2**32
        token, margin = definition(logits, u, **settings)
        if margin > 2**-17:
            checked += 1
            assert draw(logits[None], fp64(u), **settings).item() == token
    assert checked >= 38


def test_ends_of_intervals_belong_to_the_token_that_begins_there():
    """Weights of 1, 1, 2 quarters, exact in binary."""
    logits = fp64(0.0, 0.0, math.log(2))[None]
    steps = fp64(0.0, 0.25 - 2**-32, 0.25 + 2**-30, 0.5 - 2**-30, 0.5 + 2**-30, 1 - 2**-32)
    drawn = [draw(logits, u[None]).item() for u in steps]
    assert drawn == [0, 0, 1, 1, 2, 2]
    equal = torch.zeros(1, 4)
    assert [draw(equal, fp64(n / 4)).item() for n in range(4)] == [0, 1, 2, 3]
    assert [draw(equal, fp64(n / 4 - 2**-32)).item() for n in range(1, 5)] == [0, 1, 2, 3]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-32, 1 - 2**-53, 1.0])
def test_what_weighs_nothing_is_never_drawn(u):
    """Neither before the first that weighs something, nor behind the last, as padding would be."""
    logits = torch.full((1, 50_304), -1e4)
    logits[0, 700], logits[0, 40_000] = 3.0, 3.0
    for given in (logits, logits.bfloat16(), logits.double()):
        for settings in (dict(), dict(top_k=50), dict(top_p=0.99), dict(temperature=50.0)):
            expected = 700 if u < 0.5 else 40_000
            assert draw(given, fp64(u), **settings).item() == expected


def test_u_near_1_draws_the_last_of_many():
    """50,257 equal weights, whose sum in fp32 would be off by thousands of them."""
    logits = torch.zeros(1, 50_257)
    assert draw(logits, fp64(1 - 2**-32)).item() == 50_256
    assert draw(logits, fp64(1.0)).item() == 50_256
    for token in (0, 1, 25_000, 50_255):
        assert draw(logits, fp64((token + 0.5) / 50_257)).item() == token


def test_a_sum_does_not_depend_on_the_order_of_its_terms():
    """Weights are whole numbers, exact in int64 up to 2^22 of them."""
    assert DRAW_UNITS * 2**22 < 2**63
    torch.manual_seed(0)
    logits, order = torch.randn(1, 50_257), torch.randperm(50_257)
    u = fp64(0.37)
    token = draw(logits, u).item()
    rest = torch.cat([order[order < token], torch.arange(token, 50_257)])
    assert draw(logits[:, rest], u).item() == token  # what comes before it, in another order


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    grid = (torch.arange(100).double() + 0.5) / 100

    def seen(**settings) -> set[int]:
        return set(draw(logits.expand(100, 4), grid, **settings).tolist())

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {0, 1}
    assert seen(top_k=99) == {0, 1, 2, 3}
    assert seen(top_p=0.49) == {0}
    assert seen(top_p=0.6) == {0, 1}
    assert seen(top_p=1e-9) == {0}
    # Of the two that top-k leaves, 0.5 and 0.3, the first holds 0.625.
    assert seen(top_k=2, top_p=0.62) == {0}
    assert seen(top_k=2, top_p=0.63) == {0, 1}


def test_what_is_as_likely_as_the_last_kept_is_kept():
    """Whichever of equals topk() returns, on whatever device."""
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0]])
    grid = (torch.arange(50).double() + 0.5) / 50
    for settings in (dict(top_k=2), dict(top_p=0.5)):
        assert set(draw(logits.expand(50, 5), grid, **settings).tolist()) == {0, 1, 2, 3}


def test_draws_follow_the_temperature():
    """A grid of 10,000: shares are exact to one of it, and to fp32's exp."""
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    grid = (torch.arange(10_000).double() + 0.5) / 10_000
    drawn = draw(logits.expand(10_000, 3), grid, temperature=2.0)
    expected = (logits[0] / 2).softmax(-1)
    torch.testing.assert_close(drawn.bincount() / 10_000, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1e-38, 2e-38, 1e-30])
@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_a_temperature_near_0_takes_the_likeliest(temperature, settings):
    """Also below fp32's smallest number, where a division by it is one by 0."""
    logits = 50 * torch.randn(64, 100, generator=torch.Generator().manual_seed(1))
    u = torch.arange(64).double() / 64
    for given in (logits, logits.double(), logits.bfloat16()[:, :7]):
        drawn = draw(given, u, temperature, **settings)
        assert torch.equal(given.gather(1, drawn[:, None]), given.amax(-1, keepdim=True))
