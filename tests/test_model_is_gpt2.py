"""The network is GPT-2: sizes, initialisation, and the same numbers as transformers'."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model.formats.hf import from_hf, to_hf
from model.gpt2 import GPT, Block, GPTConfig
from model.network import flops_per_token, parameter_count
from model.optim import OptimConfig, configure_optimizers, get_lr
from model.parallel import ParallelModel
from tests.running import ALONE
from train_gpt2 import PRESETS

# Three shapes: head width 16, 64 with an odd context, and a vocabulary that fills its padding.
SHAPES = [
    GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=16),
    GPTConfig(n_layer=3, n_head=1, n_embd=64, n_ctx=33, n_vocab=500),
    GPTConfig(n_layer=1, n_head=4, n_embd=128, n_ctx=300, n_vocab=256),
]


@pytest.mark.parametrize(
    ("preset", "count"),
    [("gpt2-124m", 124_439_808), ("gpt2-350m", 354_823_168),
     ("gpt2-774m", 774_030_080), ("gpt2-1558m", 1_557_611_200)],
)
def test_parameter_counts_are_openais(preset, count):
    config = PRESETS[preset].model
    with torch.device("meta"):
        model = GPT(config)
    padding = (config.padded_vocab - config.n_vocab) * config.n_embd
    assert sum(p.numel() for p in model.parameters()) - padding == count
    assert parameter_count(config) == count
    assert config.padded_vocab == 50304


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_logits_loss_and_gradients_are_those_of_transformers(config, tmp_path):
    """fp32, through the exported folder. Both sum the same products in another order: an error of
    some 1e-6 relative, so 1e-4 leaves room for long sums and catches any other formula."""
    torch.manual_seed(0)
    ours = GPT(config)
    for parameter in ours.parameters():  # biases and LayerNorms that aren't 0 and 1 have to count
        parameter.data += 0.05 * torch.randn_like(parameter)
    ours.wte.weight.data[config.n_vocab :] = 0
    to_hf(ours, tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").train()
    idx = torch.randint(config.n_vocab, (2, config.n_ctx))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=1e-4)

    loss = ours(idx[:, :-1], idx[:, 1:])
    reference = theirs(idx, labels=idx).loss
    assert loss.item() == pytest.approx(reference.item(), rel=1e-4)
    loss.backward()
    reference.backward()
    gradients = dict(theirs.transformer.named_parameters())
    for name, parameter in ours.named_parameters():
        expected, got = gradients[name].grad, parameter.grad
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            expected = expected.t()
        if name == "wte.weight":
            assert not got[config.n_vocab :].any()
            got = got[: config.n_vocab]
        assert (got - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_blocks_compute_the_two_lines_of_their_docstring(gelu):
    """Bit for bit: fusing an addition with a LayerNorm moves it, and changes no operation."""
    assert Block.__doc__
    lines = [line.strip() for line in Block.__doc__.splitlines() if line.startswith(" " * 8)]
    assert len(lines) == 2
    torch.manual_seed(0)
    model = GPT(replace(SHAPES[1], gelu=gelu)).double()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    idx = torch.randint(500, (2, 33))
    scope = {"x": model.wte(idx) + model.wpe.weight}
    for block in model.h:
        exec("\n".join(lines), {"self": block}, scope)
    assert torch.equal(model.ln_f(scope["x"]), model.hidden(idx))


def test_export_and_import_keep_every_bit(tmp_path):
    torch.manual_seed(0)
    model = GPT(SHAPES[0])
    to_hf(model, tmp_path)
    again = from_hf(str(tmp_path))
    assert again.config == model.config
    for (name, one), (_, two) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name


def test_folders_of_transformers_are_read(tmp_path):
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16)).eval()
    theirs.save_pretrained(tmp_path)
    ours = from_hf(str(tmp_path))
    idx = torch.randint(50257, (2, 16))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=1e-4)


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, n_head=2, n_embd=128, n_ctx=64))
    residual = 0.02 / math.sqrt(8)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            wanted = residual if name.endswith("c_proj.weight") else 0.02
            # The deviation of n normal draws has a relative error of 1/sqrt(2n): under 1 %.
            rows = parameter[: model.config.n_vocab] if name == "wte.weight" else parameter
            assert rows.std().item() == pytest.approx(wanted, rel=0.05), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert (parameter == 1).all(), name
    assert not model.wte.weight[50257:].any()


def test_padding_stays_zero_through_training_and_takes_no_probability():
    torch.manual_seed(0)
    model = GPT(SHAPES[0])
    trained = ParallelModel(model, "ddp", ALONE, "fp32")
    optimizer = configure_optimizers(trained, OptimConfig(lr=1e-2))
    idx = torch.randint(50257, (4, 17))
    for _ in range(3):
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        trained.zero_grad()
    assert not model.wte.weight[50257:].any()
    assert model(idx[:, :-1]).shape[-1] == 50257


def test_flops_formula_agrees_with_pytorchs_counter():
    """FlopCounterMode counts matrix products one by one; on the math backend attention too."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_ctx=512)  # longer than reference.SHORT
    with torch.device("meta"):
        model = GPT(config)
        idx = torch.zeros(1, 512, dtype=torch.long)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(idx).sum().backward()
    # The counter sees the padded vocabulary's products too.
    padding = 6 * (config.padded_vocab - config.n_vocab) * config.n_embd
    assert counter.get_total_flops() / 512 == flops_per_token(config) + padding


def test_learning_rate_warms_up_and_ends_where_it_should():
    config = OptimConfig(lr=1.0, warmup_steps=10, final_lr=0.1)
    rates = [get_lr(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert get_lr(100, 100, config) == pytest.approx(0.1)
    assert get_lr(55, 100, config) == pytest.approx(0.55)  # half way down the cosine


def test_only_matrices_decay():
    model = ParallelModel(GPT(SHAPES[0]), "ddp", ALONE, "fp32")
    optimizer = configure_optimizers(model, OptimConfig())
    decayed, rest = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert all(p.dim() == 2 for p in decayed["params"])
    assert rest["weight_decay"] == 0
    assert all(p.dim() == 1 for p in rest["params"])
