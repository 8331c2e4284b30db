"""The likelihood of endings: shared, packed, split over ranks, and still the plain model's."""

import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from eval.likelihood import Fork, likelihoods, windows
from launch.world import World
from model.gpt2 import GPT, GPTConfig
from tests.running import ALONE, CONFIG


def random_forks(seed: int, longest_context: int, longest_ending: int) -> list[Fork]:
    torch.manual_seed(seed)

    def draw(longest: int) -> list[int]:
        return torch.randint(0, 50257, (int(torch.randint(1, longest + 1, ())),)).tolist()

    return [
        Fork(draw(longest_context), [draw(longest_ending) for _ in range(1 + i % 5)])
        for i in range(12)
    ]


def plain_loop(model: GPT, forks: list[Fork]) -> tuple[list[float], list[float]]:
    """The definition: one ending at a time, all logits, the loss of the ending's tokens."""
    losses, greedy = [], []
    n_ctx = model.config.n_ctx
    for context, endings in forks:
        for ending in endings:
            tokens = torch.tensor((context + ending)[-(n_ctx + 1) :])
            logits = model(tokens[None, :-1])[0][-len(ending) :]
            targets = tokens[1:][-len(ending) :]
            losses.append(F.cross_entropy(logits, targets, reduction="sum").item())
            greedy.append(float((logits.argmax(-1) == targets).all()))
    return losses, greedy


# 12 forks of 1 to 5 endings. With n_ctx = 32: all fits; trees are split; contexts are cut; endings
# alone are longer than the context.
@pytest.mark.parametrize(("context", "ending"), [(8, 4), (20, 9), (60, 9), (9, 50), (1, 1)])
def test_losses_are_those_of_the_plain_loop(model, context, ending):
    """fp64 in another order: a relative 1e-12 is thousands of roundings."""
    forks = random_forks(context, context, ending)
    losses, _ = likelihoods(model, forks, ALONE)
    assert losses == pytest.approx(plain_loop(model, forks)[0], rel=1e-12)


@pytest.mark.parametrize("short", [0, 256], ids=["sdpa", "matmul"])
def test_both_attentions_agree(model, monkeypatch, short):
    monkeypatch.setattr("model.packed.SHORT", short)
    forks = random_forks(1, 20, 9)
    losses, _ = likelihoods(model, forks, ALONE)
    assert losses == pytest.approx(plain_loop(model, forks)[0], rel=1e-12)


def test_many_small_passes_and_chunks_are_one_large_pass(model, monkeypatch):
    forks = random_forks(2, 20, 9)
    monkeypatch.setattr("eval.likelihood.TOKENS_AT_ONCE_CPU", 40)
    monkeypatch.setattr("eval.likelihood.CHUNK_ELEMENTS", 7 * 50257)
    losses, _ = likelihoods(model, forks, ALONE)
    assert losses == pytest.approx(plain_loop(model, forks)[0], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_greedy_endings_are_recognised(model, dtype):
    """bf16 logits tie (8 bits of mantissa among 50,257): the first of equals counts, as in argmax.

    The plain loop in bf16 rounds otherwise than a packed pass, so only whole passes are compared:
    each fork alone, with one ending, is the same pass as the loop's.
    """
    asked = GPT(CONFIG).to(dtype)
    asked.load_state_dict(model.state_dict())
    forks = []
    for fork in random_forks(3, 8, 3):
        tokens = list(fork.context)
        for _ in range(3):
            tokens.append(int(asked(torch.tensor([tokens]))[0, -1].argmax()))
        forks.append(Fork(fork.context, [tokens[len(fork.context) :]]))
    wrong = [Fork(f.context, [[*f.endings[0][:2], (f.endings[0][2] + 1) % 50257]]) for f in forks]
    for fork in forks + wrong:
        _, greedy = likelihoods(asked, [fork], ALONE)
        assert greedy == plain_loop(asked, [fork])[1]
    assert likelihoods(asked, forks[:1], ALONE)[1] == [1.0]
    assert likelihoods(asked, wrong[:1], ALONE)[1] == [0.0]


@pytest.mark.parametrize("ranks", [2, 3, 40])
def test_the_same_on_any_number_of_ranks(model, monkeypatch, ranks):
    """Bit for bit, for the passes are the same; and every rank takes part in as many of them."""
    monkeypatch.setattr("eval.likelihood.TOKENS_AT_ONCE_CPU", 60)
    forks, partial, passes = random_forks(4, 20, 9), [], []
    whole = likelihoods(model, forks, ALONE)
    hidden = model.hidden

    class Deaf(World):
        def sum(self, *values):
            partial.append(values)
            return list(values)

    for rank in range(ranks):
        count = [0]

        def counted(*arguments, count=count):
            count[0] += 1
            return hidden(*arguments)

        monkeypatch.setattr(model, "hidden", counted)
        likelihoods(model, forks, Deaf(rank, ranks, torch.device("cpu")))
        passes.append(count[0])
    assert [sum(column) for column in zip(*partial, strict=True)] == [*whole[0], *whole[1]]
    assert len(set(passes)) == 1


def test_windows_predict_every_token_once_from_as_much_as_fits():
    for n in (1, 4, 5, 8, 11):
        tokens = list(range(n))
        forks = windows(tokens, 4)
        assert [t for fork in forks for t in fork.endings[0]] == tokens
        assert forks[0].context == [50256]
        for fork in forks[1:]:
            assert len(fork.context) + len(fork.endings[0]) == 5  # reads 4, predicts the fifth
    # lm-eval's own example (api/model.py): four windows of at most four inputs.
    assert windows(list(range(10)), 4) == [
        Fork([50256], [[0, 1, 2, 3]]), Fork([3], [[4, 5, 6, 7]]), Fork([5, 6, 7], [[8, 9]])]


def test_kernels_operators_serve_too(monkeypatch):
    """The LayerNorm kernel runs (interpreted); attention within trees is PyTorch's own."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=128, n_ctx=32)
    torch.manual_seed(0)
    plain = GPT(config)
    ops = kernels.operators("triton", torch.device("cpu"), 64)
    fast = GPT(config, ops)
    fast.load_state_dict(plain.state_dict())
    forks = random_forks(5, 8, 4)[:3]
    got, want = likelihoods(fast, forks, ALONE)[0], likelihoods(plain, forks, ALONE)[0]
    # fp32: a loss of about 11 x 4 tokens, each with a few roundings of 2^-24.
    assert got == pytest.approx(want, abs=44 * 2**-20)


def test_an_untrained_model_finds_all_endings_equally_likely():
    model = GPT(CONFIG)
    torch.nn.init.zeros_(model.wte.weight)
    losses, _ = likelihoods(model, [Fork([1, 2], [[3], [4, 5]])], ALONE)
    assert losses == pytest.approx([math.log(50257), 2 * math.log(50257)], rel=1e-6)
