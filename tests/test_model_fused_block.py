"""The block whose backward pass is written by hand, held against the block that autograd derives.

    pytest tests/test_model_fused_block.py
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import contextlib
import json
import math
import types

import pytest
import torch

from kernels import operators
from kernels.passes import REFERENCE, triton_passes
from model import fused_block, training
from model.config import ComputeConfig, OptimConfig
from model.fused_block import check, fuse_blocks
from model.gpt2 import GPT, GPTConfig
from tests.exact import poison  # noqa: F401
from train_gpt2 import train

SHAPE = GPTConfig(n_layer=2, n_head=1, n_embd=64, n_ctx=33, n_vocab=100)


def model_and_batch(dtype=torch.float32, ops=operators.TORCH, **changes):
    """The same weights each time, none of them 0 or 1; 33 tokens."""
    torch.manual_seed(0)
    model = GPT(SHAPE, ops).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    idx, targets = torch.randint(0, 100, (2, 1, 33))
    return model, idx, targets


def losses_and_gradients(model, idx, targets, autocast=None):
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(idx, targets)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def relative(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.fixture(scope="module")
def exact():
    """In fp64, by autograd."""
    return losses_and_gradients(*model_and_batch(torch.float64))


@pytest.mark.parametrize("alone", [False, True])
def test_every_gradient_is_autograds_in_fp64(exact, alone):
    """Both sum in fp64, in other orders: chains of a few thousand terms, 1e-16 each."""
    model, *batch = model_and_batch(torch.float64)
    fuse_blocks(model, REFERENCE, copies=True, alone=alone)
    for name, got in losses_and_gradients(model, *batch).items():
        assert relative(got, exact[name]) < 1e-12, name


def test_parameters_come_in_the_blocks_order():
    block = GPT(SHAPE).h[0]
    ours = fused_block.FusedBlock(block, REFERENCE).parameters()
    assert [id(p) for p in ours] == [id(p) for p in block.parameters()]


def test_every_gradient_in_fp32_by_the_kernels(exact):
    ops = operators.choose("triton", torch.device("cpu"))
    model, *batch = model_and_batch(ops=ops)
    fuse_blocks(model, triton_passes(), copies=True)
    for name, got in losses_and_gradients(model, *batch).items():
        print(name, relative(got, exact[name]))
        assert relative(got, exact[name]) < 2e-6, name


@pytest.mark.parametrize("passes", ["reference", "triton"])
def test_every_gradient_in_bf16(exact, passes):
    """No farther from fp64 than autograd's block with the same operators, and a fifth.

    The loss is a single number, off by chance: a mean of 33 tokens', each by some 2^-9 of a nat.
    """
    ops = operators.choose("triton" if passes == "triton" else "torch", torch.device("cpu"))
    own = losses_and_gradients(*model_and_batch(ops=ops), torch.bfloat16)
    model, *batch = model_and_batch(ops=ops)
    fuse_blocks(model, triton_passes() if passes == "triton" else REFERENCE, copies=True)
    for name, got in losses_and_gradients(model, *batch, torch.bfloat16).items():
        print(name, relative(got, exact[name]), relative(own[name], exact[name]))
        assert got.dtype == torch.float32
        limit = 2**-9 / 33**0.5 if name == "loss" else 1.2 * relative(own[name], exact[name])
        assert relative(got, exact[name]) < limit, name


def test_the_check_on_a_device_passes_and_names_what_is_wrong():
    """As it runs before a training on a GPU, on the interpreter; then with two planted faults."""
    device = torch.device("cpu")
    errors, faults = check(REFERENCE, device, 128, 2)
    assert faults == "" and errors.startswith("bfloat16")
    _, faults = check(REFERENCE._replace(gelu_backward=lambda x, b, dy, sums: (dy, x)), device,
                      128, 2)
    assert "mlp.c_fc.weight in float32 is off by" in faults
    nan = REFERENCE._replace(gelu_forward=lambda x, b: x * math.nan)
    assert check(nan, device, 128, 2)[0] == "bfloat16 nan, float32 nan"
    _, faults = check(REFERENCE._replace(column_sums=lambda *_: 1 / 0), device, 128, 2)
    assert faults.startswith("in bfloat16: ZeroDivisionError")


def test_a_block_is_checked_with_a_branch_of_the_products_dtype():
    """As the block before it leaves one: then its gradient is a tensor of its own."""
    asked = []

    def backward(*arguments):
        *_, branch_dtype, branch_bias = arguments
        if not branch_bias:  # LN1, behind which the branch is
            asked.append(branch_dtype)
        return REFERENCE.layer_norm_backward(*arguments)

    check(REFERENCE._replace(layer_norm_backward=backward), torch.device("cpu"), 128, 2)
    assert asked == [torch.bfloat16, torch.float32]


def test_copies_are_never_of_another_forward_pass(exact):
    """Outside autocast and behind model.to() there are no copies; those that stood from the pass
    before would be read for the weights, whatever had become of these."""
    model, *batch = model_and_batch()
    fuse_blocks(model, REFERENCE, copies=True)
    losses_and_gradients(model, *batch, torch.bfloat16)
    model.zero_grad()
    for name, got in losses_and_gradients(model, *batch).items():
        assert relative(got, exact[name]) < 2e-6, name
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch)
    model.double().load_state_dict({name: w.double() for name, w in model_and_batch(
        torch.float64)[0].state_dict().items()})
    model.zero_grad()
    for name, got in losses_and_gradients(model, *batch).items():
        assert relative(got, exact[name]) < 1e-12, name


def test_what_is_computed_again_takes_the_dtype_of_its_own_pass():
    model, *batch = model_and_batch()
    fuse_blocks(model, REFERENCE, copies=True)
    expected = losses_and_gradients(model, *batch)
    model.zero_grad()
    model.checkpoint_activations = True
    loss = model(*batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # an evaluation in between
        model(*batch)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_nothing_is_copied_where_another_attention_is_asked_for():
    """As evaluations by likelihood and generation do, at every token."""
    model, idx, _ = model_and_batch()
    fuse_blocks(model, REFERENCE, copies=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.hidden(idx, attend=lambda layer, qkv, n_head: operators.TORCH.attention(qkv, n_head))
        assert model.h[0].fused.low is None
        model.hidden(idx)
    assert model.h[0].fused.low[0].dtype == torch.bfloat16


@pytest.mark.parametrize("alone", [False, True])
def test_a_second_derivative_is_an_error(alone):
    model, *batch = model_and_batch()
    fuse_blocks(model, REFERENCE, copies=True, alone=alone)
    x = torch.randn(1, 33, 64, requires_grad=True)
    stream, branch = model.h[0](x, None)
    loss = (stream + branch).square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_block_that_takes_its_gradients_itself_has_autograds_to_the_bit(again, autocast):
    """Also of several micro-steps, added up one after the other, and of a step after them."""
    found = []
    for alone in (False, True):
        model, *batch = model_and_batch()
        fuse_blocks(model, REFERENCE, copies=True, alone=alone)
        model.checkpoint_activations = again
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            for shift in range(3):
                rolled = [tokens.roll(shift) for tokens in batch]
                gradients = losses_and_gradients(model, *rolled, autocast)
        found.append(gradients)
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name


def test_autograd_is_not_asked_for_the_gradients_that_a_block_takes_itself():
    for alone in (False, True):
        model, *batch = model_and_batch()
        fuse_blocks(model, REFERENCE, copies=True, alone=alone)
        asked = []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name, asked=asked: asked.append(name))
        losses_and_gradients(model, *batch)
        of_blocks = [name for name in asked if name.startswith("h.")]
        assert len(of_blocks) == (0 if alone else 2 * 12)


@pytest.mark.parametrize("dropped", ["first", "last", "none"])
def test_a_block_alone_adds_to_whatever_gradients_there_are(dropped):
    model, *batch = model_and_batch(torch.float64)
    fuse_blocks(model, REFERENCE, copies=True, alone=True)
    losses_and_gradients(model, *batch)
    parameters = list(model.h[0].parameters())
    once = [p.grad.clone() for p in parameters]
    if dropped != "none":
        parameters[0 if dropped == "first" else -1].grad = None
    losses_and_gradients(model, *batch)
    for p, gradient in zip(parameters, once, strict=True):
        left_out = p is parameters[0 if dropped == "first" else -1] and dropped != "none"
        assert torch.equal(p.grad, gradient if left_out else 2 * gradient)


def test_a_block_alone_has_gradients_also_where_its_input_has_none():
    model, *_ = model_and_batch(torch.float64)
    by_hand, *_ = model_and_batch(torch.float64)
    fuse_blocks(by_hand, REFERENCE, copies=True, alone=True)
    x = torch.randn(1, 33, 64, dtype=torch.float64)
    for m in (model, by_hand):
        stream, branch = m.h[0](x, None)
        (stream + branch).square().sum().backward()
    for own, got in zip(model.h[0].parameters(), by_hand.h[0].parameters(), strict=True):
        assert torch.allclose(got.grad, own.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_are_alone_on_one_rank(ranks, monkeypatch):
    """DDP and FSDP have to be told of every gradient."""
    asked = {}
    monkeypatch.setattr(training, "choose_kernels", lambda *_: (operators.TORCH, REFERENCE, {}))
    monkeypatch.setattr(training, "fuse_blocks", lambda *_, **how: asked.update(how))
    monkeypatch.setattr(training, "ParallelModel", lambda *_: 1 / 0)
    world = types.SimpleNamespace(
        size=ranks, device=torch.device("cpu"), fail_together=contextlib.nullcontext)
    with pytest.raises(ZeroDivisionError):
        training.build_train_state(
            SHAPE, OptimConfig(), ComputeConfig(), "fp32", 1, "", None, world)
    assert asked == {"copies": True, "alone": ranks == 1}


def test_a_run_by_hand_does_not_say_that_it_is_compiled(tiny, tmp_path, monkeypatch, capsys):
    """As on a GPU, where --compile is on by itself."""
    monkeypatch.setattr(training.ComputeConfig, "compiled", lambda *_: True)
    monkeypatch.setattr(training, "blocks_by_hand", lambda *_: True)
    monkeypatch.setattr(training, "triton_passes", lambda: REFERENCE)
    assert train(tiny(steps=1)) == 0
    assert "compiled" not in capsys.readouterr().out
    recorded = json.loads((tmp_path / "tiny" / "config.json").read_text())["resolved"]
    assert recorded["compile"] is False


def test_the_check_finds_what_is_wrong_at_a_runs_own_width_alone(monkeypatch):
    """As GELU's second tile of columns, which a narrower block has not."""
    def only_one_tile(x, bias):
        y = REFERENCE.gelu_forward(x, bias)
        y[:, 1024:] = 0
        return y

    wrong = REFERENCE._replace(gelu_forward=only_one_tile)
    monkeypatch.setattr(training, "triton_passes", lambda: wrong)
    world = types.SimpleNamespace(  # as rank 0 of one takes itself to be, on a GPU
        device=types.SimpleNamespace(type="cuda"), all_gather=lambda x: [x], print0=print)
    monkeypatch.setattr(fused_block, "check", lambda passes, device, *shape: check(
        passes, torch.device("cpu"), *shape))
    ops = operators.choose("triton", torch.device("cpu"))
    assert training.blocks_by_hand(GPTConfig(n_head=2, n_embd=128), ops, {}, world)
    assert not training.blocks_by_hand(GPTConfig(n_head=8, n_embd=512), ops, {}, world)


@pytest.mark.parametrize("read", [0, 1], ids=["stream", "branch"])
def test_a_loss_may_read_one_output_alone(read):
    model, *_ = model_and_batch(torch.float64)
    by_hand, *_ = model_and_batch(torch.float64)
    fuse_blocks(by_hand, REFERENCE, copies=True)
    x = torch.randn(1, 33, 64, dtype=torch.float64)
    for m in (model, by_hand):
        m.h[0](x, None)[read].square().sum().backward()
    for own, got in zip(model.h[0].parameters(), by_hand.h[0].parameters(), strict=True):
        expected = torch.zeros_like(own) if own.grad is None else own.grad
        assert torch.allclose(got.grad, expected, rtol=1e-12, atol=1e-12)
