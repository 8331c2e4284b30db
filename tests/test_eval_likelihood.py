"""The likelihood of continuations: packed, split over ranks, and still the plain model's."""

import math

import pytest
import torch
import torch.nn.functional as F

from eval.likelihood import Request, negative_loglikelihoods, rolling_requests
from kernels import operators
from launch.world import World
from model.gpt2 import GPT, GPTConfig
from tests.running import ALONE, CONFIG


def random_requests(seed: int, longest_context: int, longest_continuation: int) -> list[Request]:
    torch.manual_seed(seed)

    def draw(longest: int) -> list[int]:
        return torch.randint(0, 50257, (int(torch.randint(1, longest + 1, ())),)).tolist()

    return [
        Request(draw(longest_context), [draw(longest_continuation) for _ in range(1 + i % 5)])
        for i in range(12)
    ]


def plain_loop(model: GPT, requests: list[Request]) -> tuple[list[float], list[float]]:
    """The definition: one continuation at a time, all logits, the loss of its tokens."""
    losses, greedy = [], []
    n_ctx = model.config.n_ctx
    for context, continuations in requests:
        for continuation in continuations:
            tokens = torch.tensor((context + continuation)[-(n_ctx + 1) :])
            logits = model(tokens[None, :-1])[0][-len(continuation) :]
            targets = tokens[1:][-len(continuation) :]
            losses.append(F.cross_entropy(logits, targets, reduction="sum").item())
            greedy.append(float((logits.argmax(-1) == targets).all()))
    return losses, greedy


# 12 requests of 1 to 5 continuations. With n_ctx = 32: all fits; rows are split; contexts are cut;
# continuations alone are longer than the context.
@pytest.mark.parametrize(("context", "continuation"), [(8, 4), (20, 9), (60, 9), (9, 50), (1, 1)])
def test_losses_are_those_of_the_plain_loop(model, context, continuation):
    """fp64 in another order: a relative 1e-12 is thousands of roundings."""
    requests = random_requests(context, context, continuation)
    losses, _ = negative_loglikelihoods(model, requests, ALONE)
    assert losses == pytest.approx(plain_loop(model, requests)[0], rel=1e-12)


@pytest.mark.parametrize("short", [0, 256], ids=["sdpa", "matmul"])
def test_both_attentions_agree(model, monkeypatch, short):
    monkeypatch.setattr("model.packed.SHORT", short)
    requests = random_requests(1, 20, 9)
    losses, _ = negative_loglikelihoods(model, requests, ALONE)
    assert losses == pytest.approx(plain_loop(model, requests)[0], rel=1e-12)


def test_many_small_passes_and_chunks_are_one_large_pass(model, monkeypatch):
    requests = random_requests(2, 20, 9)
    monkeypatch.setattr("eval.likelihood.TOKENS_AT_ONCE_CPU", 40)
    monkeypatch.setattr("eval.likelihood.CHUNK_ELEMENTS", 7 * 50257)
    losses, _ = negative_loglikelihoods(model, requests, ALONE)
    assert losses == pytest.approx(plain_loop(model, requests)[0], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_greedy_continuations_are_recognised(model, dtype):
    """bf16 logits tie (8 bits of mantissa among 50,257): the first of equals counts, as in argmax.

    The plain loop in bf16 rounds otherwise than a packed pass, so only whole passes are compared:
    each request alone, with one continuation, is the same pass as the loop's.
    """
    asked = GPT(CONFIG).to(dtype)
    asked.load_state_dict(model.state_dict())
    requests = []
    for request in random_requests(3, 8, 3):
        tokens = list(request.context)
        for _ in range(3):
            tokens.append(int(asked(torch.tensor([tokens]))[0, -1].argmax()))
        requests.append(Request(request.context, [tokens[len(request.context) :]]))
    wrong = []
    for context, [(first, second, third)] in requests:
        wrong.append(Request(context, [[first, second, (third + 1) % 50257]]))
    for request in requests + wrong:
        _, greedy = negative_loglikelihoods(asked, [request], ALONE)
        assert greedy == plain_loop(asked, [request])[1]
    assert negative_loglikelihoods(asked, requests[:1], ALONE)[1] == [1.0]
    assert negative_loglikelihoods(asked, wrong[:1], ALONE)[1] == [0.0]


@pytest.mark.parametrize("ranks", [2, 3, 40])
def test_the_same_on_any_number_of_ranks(model, monkeypatch, ranks):
    """Bit for bit, for the passes are the same; and every rank takes part in as many of them."""
    monkeypatch.setattr("eval.likelihood.TOKENS_AT_ONCE_CPU", 60)
    requests, partial, passes = random_requests(4, 20, 9), [], []
    whole = negative_loglikelihoods(model, requests, ALONE)
    hidden = model.hidden

    class Deaf(World):
        def all_reduce_sum(self, *values):
            partial.append(values)
            return list(values)

    for rank in range(ranks):
        count = [0]

        def counted(*arguments, count=count):
            count[0] += 1
            return hidden(*arguments)

        monkeypatch.setattr(model, "hidden", counted)
        negative_loglikelihoods(model, requests, Deaf(rank, ranks, torch.device("cpu")))
        passes.append(count[0])
    assert [sum(column) for column in zip(*partial, strict=True)] == [*whole[0], *whole[1]]
    assert len(set(passes)) == 1


def test_windows_predict_every_token_once_from_as_much_as_fits():
    for n in (1, 4, 5, 8, 11):
        tokens = list(range(n))
        requests = rolling_requests(tokens, 4)
        assert [t for request in requests for t in request.continuations[0]] == tokens
        assert requests[0].context == [50256]
        for request in requests[1:]:
            (continuation,) = request.continuations
            assert len(request.context) + len(continuation) == 5  # reads 4, predicts the fifth
    # lm-eval's own example (api/model.py): four windows of at most four inputs.
    assert rolling_requests(list(range(10)), 4) == [
        Request([50256], [[0, 1, 2, 3]]),
        Request([3], [[4, 5, 6, 7]]),
        Request([5, 6, 7], [[8, 9]]),
    ]


def test_kernels_operators_serve_too(monkeypatch):
    """The LayerNorm kernel runs (interpreted); attention within requests is PyTorch's own."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=128, n_ctx=32)
    torch.manual_seed(0)
    plain = GPT(config)
    ops = operators.choose("triton", torch.device("cpu"), 64)
    fast = GPT(config, ops)
    fast.load_state_dict(plain.state_dict())
    requests = random_requests(5, 8, 4)[:3]
    got, _ = negative_loglikelihoods(fast, requests, ALONE)
    want, _ = negative_loglikelihoods(plain, requests, ALONE)
    # fp32: a loss of about 11 x 4 tokens, each with a few roundings of 2^-24.
    assert got == pytest.approx(want, abs=44 * 2**-20)


def test_an_untrained_model_finds_all_continuations_equally_likely():
    model = GPT(CONFIG)
    torch.nn.init.zeros_(model.wte.weight)
    losses, _ = negative_loglikelihoods(model, [Request([1, 2], [[3], [4, 5]])], ALONE)
    assert losses == pytest.approx([math.log(50257), 2 * math.log(50257)], rel=1e-6)
