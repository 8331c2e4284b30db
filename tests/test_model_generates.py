"""Generation: the cache computes what the whole window would, and sampling obeys its settings."""

import copy

import pytest
import torch

from model.generate import (
    NUMBERS_AT_ONCE,
    CannotSample,
    SampleConfig,
    generate,
    uniform_numbers,
)
from model.gpt2 import GPT, GPTConfig

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=16, n_vocab=100)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG).double()  # fp64: no tie is decided by rounding
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def tokens(model, idx, config, **rest) -> list[list[int]]:
    return [step.tolist() for step in generate(model, idx, config, **rest)]


@pytest.mark.parametrize("prompt", [1, 5, 16])  # shortest, middle, a full context
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_is_uncached_also_past_the_context(model, prompt, temperature):
    idx = torch.randint(100, (3, prompt), generator=torch.Generator().manual_seed(1))
    config = SampleConfig(max_tokens=40, temperature=temperature, top_k=0)
    fast = tokens(model, idx, config)
    assert fast == tokens(model, idx, config, use_cache=False)
    assert len(fast) == 40


def test_greedy_is_the_argmax_of_the_forward_pass(model):
    idx = torch.tensor([[1, 2, 3]])
    for (token,) in tokens(model, idx, SampleConfig(max_tokens=10, temperature=0)):
        assert token == model(idx)[0, -1].argmax().item()
        idx = torch.cat([idx, torch.tensor([[token]])], 1)


def test_past_the_context_the_last_half_of_the_window_goes_on(model):
    idx = torch.randint(100, (1, 16), generator=torch.Generator().manual_seed(2))
    drawn = tokens(model, idx, SampleConfig(max_tokens=2, temperature=0))
    window = torch.cat([idx, torch.tensor([drawn[0]])], 1)[:, -8:]
    assert drawn[1][0] == model(window)[0, -1].argmax().item()


def test_same_seed_same_text_other_seed_other_text(model):
    idx = torch.tensor([[1, 2, 3]])
    config = SampleConfig(max_tokens=20, top_k=0)
    assert tokens(model, idx, config) == tokens(model, idx, config)
    assert tokens(model, idx, config) != tokens(model, idx, SampleConfig(20, top_k=0, seed=7))


def test_ended_rows_stay_ended_and_all_ended_stops(model):
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    config = SampleConfig(max_tokens=30, temperature=0)
    free = tokens(model, idx, config)
    eot = free[2][0]  # what row 0 draws at its third token
    drawn = tokens(model, idx, config, eot=eot)
    first = next(i for i, step in enumerate(drawn) if step[0] == eot)
    assert all(step[0] == eot for step in drawn[first:])
    single = tokens(model, idx[:1], config, eot=eot)
    assert len(single) == first + 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1.0])
@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_that_are_no_numbers_are_one_clear_error(model, value, temperature, use_cache):
    broken = copy.deepcopy(model)
    broken.ln_f.bias.data[3] = value
    config = SampleConfig(temperature=temperature)
    with pytest.raises(CannotSample, match="logits are no numbers"):
        tokens(broken, torch.tensor([[1, 2], [3, 4]]), config, use_cache=use_cache)


def test_the_numbers_of_a_seed_do_not_depend_on_how_many_are_asked_for():
    """fp64 multiples of 2^-32: of each row a token is drawn, and a text may go on for ever."""
    several = uniform_numbers(7, 3)
    first, second = next(several), next(several)
    assert first.shape == (NUMBERS_AT_ONCE, 3) and first.dtype == torch.float64
    both = torch.cat([first, second])
    assert both.min() >= 0 and both.max() < 1
    assert torch.equal(both * 2**32, (both * 2**32).floor())
    assert len(both.unique()) > both.numel() - 10
    assert torch.equal(next(uniform_numbers(7, 3)), first)
    # A mean of 6,144 numbers: its standard error is 0.0037.
    assert both.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("length", [0, 17])
def test_a_prompt_that_does_not_fit_is_refused(model, length):
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        next(generate(model, torch.zeros(1, length, dtype=torch.long), SampleConfig()))
