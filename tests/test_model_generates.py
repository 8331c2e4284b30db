"""Generation: the cache computes what the whole window would, and sampling obeys its settings."""

import pytest
import torch

from model.generate import CannotSample, SampleConfig, draw, generate
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


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    generator = torch.Generator().manual_seed(0)

    def seen(**settings) -> set[int]:
        config = SampleConfig(temperature=1.0, **({"top_k": 0} | settings))
        return {draw(logits, config, generator).item() for _ in range(300)}

    assert seen() == {0, 1, 2, 3}  # 0.05 misses 300 draws once in 5 million
    assert seen(top_k=2) == {0, 1}
    assert seen(top_k=99) == {0, 1, 2, 3}
    assert seen(top_p=0.5) == {0}
    assert seen(top_p=0.6) == {0, 1}
    assert seen(top_p=1e-9) == {0}


def test_draws_follow_the_temperature():
    """10,000 draws: a share's standard error is at most 0.005, so 0.02 is four of them."""
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(10_000, 3)
    drawn = draw(logits, SampleConfig(temperature=2.0, top_k=0), torch.Generator().manual_seed(0))
    expected = (logits[0] / 2).softmax(-1)
    torch.testing.assert_close(drawn.bincount() / 10_000, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1e-38, 2e-38, 1e-30])
@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_a_temperature_near_0_takes_the_likeliest(temperature, settings):
    """Also below fp32's smallest number, where a division by it is one by 0."""
    logits = 50 * torch.randn(64, 100, generator=torch.Generator().manual_seed(1))
    config = SampleConfig(temperature=temperature, **settings)
    for given in (logits, logits.double(), logits.bfloat16()[:, :7]):
        drawn = draw(given, config, torch.Generator().manual_seed(0))
        assert torch.equal(given.gather(1, drawn[:, None]), given.amax(-1, keepdim=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1.0])
def test_logits_that_are_no_numbers_are_one_clear_error(value, temperature):
    logits = torch.zeros(2, 100)
    logits[1, 99] = value
    config = SampleConfig(temperature=temperature)
    with pytest.raises(CannotSample, match="logits are no numbers"):
        draw(logits, config, torch.Generator())
    with pytest.raises(CannotSample, match="logits are no numbers"):
        draw(torch.full((1, 5), -torch.inf), config, torch.Generator())


@pytest.mark.parametrize("length", [0, 17])
def test_a_prompt_that_does_not_fit_is_refused(model, length):
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        next(generate(model, torch.zeros(1, length, dtype=torch.long), SampleConfig()))
