"""The loop that a GPU replays draws what the loop that defines it draws.

There is no GPU here: a step's operators are recorded and run again on the memory that they had,
with every Python number as it was, which is what a CUDA graph does. What a real capture takes is
counted on a stand-in for a GPU.
"""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import operators, reference
from model import decode_graph, generate
from model.generate import CannotSample, SampleConfig, generate_with_logits
from model.gpt2 import GPT, GPTConfig
from model.network import new_network

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=16, n_vocab=100)


class Recorder(TorchDispatchMode):
    """Keeps the operators that run, their arguments and their results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        """Runs them again; each result goes where it was the first time."""
        for operator, args, kwargs, result in self.calls:
            again = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Event:
    """Tells what has come: everything, on a CPU."""

    def record(self):
        pass

    def query(self):
        return True


def attention_under_a_mask(qkv, kv, position, n_head):
    """kernels/reference.py's on a GPU: the position stays on the device."""
    B, _, C3 = qkv.shape
    new = qkv.view(B, 3, n_head, 1, -1).transpose(0, 1)  # (3, B, H, 1, D)
    kv.index_copy_(3, position, new[1:])
    seen = torch.arange(kv.shape[3]) <= position  # (L,)
    scores = new[0] @ kv[0].mT / new.shape[-1] ** 0.5  # (B, H, 1, L)
    scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ kv[1].nan_to_num()).reshape(B, 1, C3 // 3)


@pytest.fixture(params=["gpt2", "speedrun"])
def model(request) -> GPT:
    torch.manual_seed(0)
    config = CONFIG if request.param == "gpt2" else GPTConfig(**(vars(CONFIG) | dict(
        arch="speedrun", value_embeddings=True)))
    ops = operators.TORCH._replace(decode_attention=attention_under_a_mask)
    model = new_network(config, ops).double()  # fp64: no tie is decided by rounding
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


@pytest.fixture
def captured(monkeypatch):
    """The times that a step was captured, and replayed."""
    counts = {"captured": 0, "replayed": 0}

    def capture(step):
        loop = step.__self__
        state = {name: x.clone() for name, x in state_of(loop).items()}
        recorder = Recorder()
        with recorder:
            step()
        for name, x in state_of(loop).items():  # a capture runs nothing
            x.copy_(state[name])
        counts["captured"] += 1

        def replay():
            counts["replayed"] += 1
            recorder.replay()

        return replay

    monkeypatch.setattr(decode_graph, "capture", capture)
    monkeypatch.setattr(decode_graph, "pinned", lambda x: x)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return counts


def state_of(loop):
    tensors = {name: x for name, x in vars(loop).items() if isinstance(x, torch.Tensor)}
    return tensors | {"kv": loop.cache.kv, "position": loop.cache.position}


def drawn(steps) -> list[list[int]]:
    return [tokens.tolist() for tokens in steps]


def both(model, idx, config, **rest):
    """What the two loops draw."""
    eager = drawn(tokens for tokens, _ in generate_with_logits(model, idx, config, **rest))
    return drawn(decode_graph.generate(model, idx, config, **rest)), eager


def prompts(rows: int, length: int):
    return torch.randint(100, (rows, length), generator=torch.Generator().manual_seed(1))


# Shortest, middle, a full context; each goes on past the context, some of them twice.
@pytest.mark.parametrize("length", [1, 5, 16])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_replayed_loop_draws_what_the_other_draws(model, captured, rows, length):
    config = SampleConfig(max_tokens=40, top_k=20, top_p=0.9)
    replayed, eager = both(model, prompts(rows, length), config)
    assert replayed == eager and len(eager) == 40
    assert captured["captured"] == 1 and captured["replayed"] > 30
    assert len({token for step in eager for token in step}) > 10


def test_prompts_of_several_lengths(model, captured):
    lengths = torch.tensor([3, 12, 7])
    for max_tokens in (2, 25):  # within the longest prompt's end and far past the context
        config = SampleConfig(max_tokens=max_tokens)
        replayed, eager = both(model, prompts(3, 12), config, lengths=lengths)
        assert replayed == eager


def test_texts_end_where_the_other_loop_ends_them(model, captured):
    """What is computed ahead, past the end, is cut; a row that has ended goes on as the end."""
    config = SampleConfig(max_tokens=30)
    free = drawn(decode_graph.generate(model, prompts(2, 4), config))
    for eot in (free[2][0], free[9][1]):
        replayed, eager = both(model, prompts(2, 4), config, eot=eot)
        assert replayed == eager
    alone = drawn(decode_graph.generate(model, prompts(1, 4), config))
    replayed, eager = both(model, prompts(1, 4), config, eot=alone[9][0])
    assert replayed == eager and len(eager) <= 10


@pytest.mark.parametrize("max_tokens", [0, 1, 2, 3])
def test_few_tokens(model, captured, max_tokens):
    replayed, eager = both(model, prompts(1, 4), SampleConfig(max_tokens=max_tokens))
    assert replayed == eager and len(eager) == max_tokens


def test_numbers_are_carried_over_more_than_once(model, captured, monkeypatch):
    monkeypatch.setattr(decode_graph, "NUMBERS_AT_ONCE", 4)
    monkeypatch.setattr(generate, "NUMBERS_AT_ONCE", 4)
    replayed, eager = both(model, prompts(2, 3), SampleConfig(max_tokens=11, top_k=0))
    assert replayed == eager


def test_broken_weights_are_told_when_their_token_is_due(model, captured):
    """A few tokens may be drawn from what is no number: none of them is handed out, or looked up
    in the embedding."""
    broken = copy.deepcopy(model)
    if broken.config.arch == "gpt2":
        broken.wpe.weight.data[6] = torch.nan  # the fourth token behind three
        steps = decode_graph.generate(broken, prompts(1, 3), SampleConfig(max_tokens=20))
        for _ in range(4):
            next(steps)
    else:
        broken.x0_mix.data[0] = torch.nan
        steps = decode_graph.generate(broken, prompts(1, 3), SampleConfig(max_tokens=20))
    with pytest.raises(CannotSample, match="logits are no numbers"):
        next(steps)


def test_tokens_are_computed_ahead_and_no_more_than_asked_for(model, captured):
    """The host looks at a token when AHEAD more are under way."""
    steps = decode_graph.generate(model, prompts(1, 3), SampleConfig(max_tokens=12))
    next(steps)
    assert captured["replayed"] == decode_graph.AHEAD - 1  # the prompt, a first token, the rest
    next(steps)
    assert captured["replayed"] == decode_graph.AHEAD
    assert len(list(steps)) == 10 and captured["replayed"] == 10


def test_a_prompt_that_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        next(decode_graph.generate(model, prompts(1, 17), SampleConfig()))


class OnGPU:
    """A model as fits() sees it, with weights on a GPU."""

    def __init__(self, dtype, requires_grad=False):
        self.weight = torch.empty(2, 2, device="meta", dtype=dtype, requires_grad=requires_grad)
        self.wte = self

    def parameters(self):
        return [self.weight]


def test_only_weights_that_nobody_changes_or_casts_are_captured(model, monkeypatch):
    assert not decode_graph.fits(model)  # on a CPU
    monkeypatch.setattr(decode_graph, "CAPTURES", "meta")
    assert decode_graph.fits(OnGPU(torch.float32))
    assert not decode_graph.fits(OnGPU(torch.float32, requires_grad=True))
    monkeypatch.setattr(decode_graph, "product_dtype", lambda *_: torch.bfloat16)  # autocast
    assert decode_graph.fits(OnGPU(torch.bfloat16))
    assert not decode_graph.fits(OnGPU(torch.float32))


def test_the_reference_reads_the_same_under_a_mask(monkeypatch):
    """Its two ways, by slices and by a mask: the second is what a GPU without kernels takes."""
    torch.manual_seed(0)
    kv, qkv = torch.randn(2, 2, 3, 10, 8).double(), torch.randn(2, 1, 72).double()
    for place in (0, 4, 9):
        one, other = kv.clone(), kv.clone()
        position = torch.tensor([place])
        y = reference.decode_attention(qkv, one, position, 3)
        masked = attention_under_a_mask(qkv, other, position, 3)
        torch.testing.assert_close(y, masked, rtol=1e-12, atol=1e-12)
        assert torch.equal(one, other)
