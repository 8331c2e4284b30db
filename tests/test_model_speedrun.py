"""The speedrun's network: known by the same few methods as GPT-2, and computed as its file says."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from eval.likelihood import Request, negative_loglikelihoods
from launch.errors import BadInput
from model import convert
from model.checkpoint import load_model
from model.generate import SampleConfig, generate
from model.gpt2 import GPTConfig
from model.network import get_num_params, new_network, parameter_count
from model.speedrun import SOFTCAP
from tests.running import ALONE, ROOT
from train_gpt2 import train

EOT = 50256
SHAPE = GPTConfig(n_layer=3, n_head=2, n_embd=32, n_ctx=16, arch="speedrun")


def network(**changes):
    """In fp64 and with weights that aren't 0, so that nothing is equal by chance."""
    torch.manual_seed(0)
    model = new_network(replace(SHAPE, **changes)).double()
    for name, p in model.named_parameters():
        rows = model.config.n_vocab if p.shape[0] == model.config.padded_vocab else None
        p.data[:rows] += 0.1 * torch.randn_like(p.data[:rows])
        assert p.data.abs().sum() > 0, name
    return model


def words(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(EOT, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_the_whole_network_once_more_in_a_few_lines():
    """Written anew from modded-nanogpt's description, with plain PyTorch and one head at a time."""
    model, idx = network(), words(2, 16)
    w = dict(model.named_parameters())

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    x = x0 = norm(w["wte.weight"][idx])
    T, D = 16, 16
    turns = 1024 ** -torch.linspace(0, 1, D // 4, dtype=torch.float32)
    for layer in range(3):
        mix = w["x0_mix"][layer]
        x = mix[0] * x + mix[1] * x0
        q, k, v = (norm(x) @ w[f"h.{layer}.attn.c_attn.weight"].T).chunk(3, -1)
        heads = []
        for head in range(2):
            columns = slice(head * D, (head + 1) * D)
            z = {}
            for name, y in (("q", norm(q[..., columns])), ("k", norm(k[..., columns]))):
                y = y.clone()
                for pair, turn in enumerate(turns.tolist()):
                    angle = (torch.arange(T).float() * turn).double()
                    a, b = y[..., pair].clone(), y[..., pair + D // 2].clone()
                    y[..., pair] = a * angle.cos() + b * angle.sin()
                    y[..., pair + D // 2] = b * angle.cos() - a * angle.sin()
                z[name] = y
            scores = 1.36 * z["q"] @ z["k"].mT / D**0.5
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[..., columns])
        x = x + torch.cat(heads, -1) @ w[f"h.{layer}.attn.c_proj.weight"].T
        wide = F.relu(norm(x) @ w[f"h.{layer}.mlp.c_fc.weight"].T) ** 2
        x = x + wide @ w[f"h.{layer}.mlp.c_proj.weight"].T
    logits = SOFTCAP * torch.tanh(norm(x) @ w["lm_head.weight"].T / SOFTCAP)
    # Angles and their cosines are fp32 in both, in another order: 16 radians times 2^-24.
    assert (model(idx) - logits[..., :50257]).abs().max() < 1e-4
    targets = words(2, 16, seed=2)
    loss = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    assert model(idx, targets).item() == pytest.approx(loss.item(), abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"value_embeddings": True}, {"document_mask": True}])
def test_gradients_are_those_of_the_logits(options):
    """The loss by chunks, with its softcap, against autograd through all logits."""
    idx, targets = words(2, 16), words(2, 16, seed=2)
    idx[:, 0] = EOT  # one document a row, so that the mask changes nothing
    found = []
    for whole in (False, True):
        model = network(**options)
        if whole:
            F.cross_entropy(model(idx).flatten(0, 1), targets.flatten()).backward()
        else:
            model(idx, targets).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        assert (gradient - found[1][name]).abs().max() < 1e-12, name


def test_it_begins_with_every_token_equally_likely():
    torch.manual_seed(0)
    model = new_network(SHAPE)
    assert model(words(2, 16), words(2, 16, seed=2)).item() == pytest.approx(10.824905, abs=1e-5)
    assert not model.wte.weight[50257:].any()


@pytest.mark.parametrize("prompt", [1, 16])
def test_cached_is_uncached_also_past_the_context(prompt):
    model, config = network(value_embeddings=True), SampleConfig(max_tokens=24, temperature=0)
    fast = [t.tolist() for t in generate(model, words(2, prompt), config)]
    slow = [t.tolist() for t in generate(model, words(2, prompt), config, use_cache=False)]
    assert fast == slow


def test_packed_requests_are_scored_as_each_alone():
    model = network()
    context, one, two = words(1, 5)[0].tolist(), [7, 8, 9], [10, 11]
    packed, _ = negative_loglikelihoods(model, [Request(context, [one, two])], ALONE)
    for continuation, found in zip((one, two), packed, strict=True):
        logp = model(torch.tensor([context + continuation]))[0].log_softmax(-1)  # (T, V)
        before = len(context) - 1
        expected = -sum(logp[before + i, token] for i, token in enumerate(continuation))
        assert found == pytest.approx(expected.item(), abs=1e-6)


def test_a_mask_ends_attention_where_a_document_ends():
    """Two documents in a row have the losses that each has alone."""
    model = network(document_mask=True)
    first, second = words(1, 6), words(1, 8, seed=3)
    first[0, 0] = second[0, 0] = EOT
    row = torch.cat([first, second], 1)
    targets = torch.full_like(row, -100)
    targets[0, 6:13] = second[0, 1:]
    alone = model(second[:, :-1], second[:, 1:])
    assert model(row, targets).item() == pytest.approx(alone.item(), abs=1e-6)  # fp32 angles
    plain = network()
    assert abs(plain(row, targets).item() - alone.item()) > 1e-3


def test_a_run_of_it_is_saved_sampled_and_exported_as_our_own_alone(tiny, tmp_path, capsys):
    config = tiny(model=replace(SHAPE, value_embeddings=True))
    train(config)
    model = load_model(str(tmp_path / "tiny"))
    assert get_num_params(model) == parameter_count(config.model)
    assert not model.lm_head.weight[50257:].any()
    assert not model.value_embeddings["1"].weight[50257:].any()
    convert.main(str(tmp_path / "tiny"), str(tmp_path / "ours"), "ours")
    again = load_model(str(tmp_path / "ours"))
    assert torch.equal(again(words(1, 16)), model(words(1, 16)))
    for kind in ("hf", "llmc"):
        with pytest.raises(BadInput, match=r"arch speedrun can't be written as .* --to our"):
            convert.main(str(tmp_path / "tiny"), str(tmp_path / kind), kind)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("wrong", "said"), [
    (dict(gelu="exact"), "no GELU"),
    (dict(n_embd=6), "heads 3 wide: rotary"),
    (dict(dropout=0.1), "has none"),
    (dict(arch="gpt2", value_embeddings=True), "only --model.arch speedrun"),
    (dict(arch="gpt2", document_mask=True), "only --model.arch speedrun"),
    (dict(n_vocab=65, document_mask=True), "GPT-2's vocabulary"),
    (dict(arch="gpt3"), "arch is gpt2 or speedrun, not 'gpt3'"),
])
def test_what_the_other_network_has_not_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        replace(SHAPE, **wrong)


def test_a_faithful_run_does_not_go_on_as_a_speedrun(tiny, tmp_path):
    """Nor the other way round; each is as it was."""
    shape = replace(SHAPE, n_layer=2)
    for name, model in (("faithful", tiny().model), ("speedrun", shape)):
        train(tiny(name=name, steps=1, model=model))
    with pytest.raises(BadInput, match="other run: model.arch gpt2 there, speedrun asked. `python"):
        train(tiny(name="faithful", steps=1, model=shape))
    with pytest.raises(BadInput, match="other run: model.arch speedrun there, gpt2 asked. `python"):
        train(tiny(name="speedrun", steps=1))
    with pytest.raises(SystemExit, match="0"):  # finished, and nothing lost
        train(tiny(name="faithful", steps=1))


def test_a_head_width_that_no_kernel_has_is_refused(tiny):
    pytest.importorskip("triton")
    with pytest.raises(BadInput, match="--kernels triton: .*64 or 128 wide, not 16: use --kernels"):
        train(tiny(model=SHAPE, kernels="triton"))


def test_its_file_is_short_enough_to_be_read_at_once():
    assert len((ROOT / "model" / "speedrun.py").read_text().splitlines()) < 150
