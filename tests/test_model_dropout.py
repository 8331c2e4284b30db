"""Dropout: where nanoGPT has it, while training only, and the same after a stop."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data.dataset import open_data
from eval.loss import validation_loss
from kernels import operators, reference, selfcheck
from launch.tracker import read_rows
from launch.world import World
from model import checkpoint
from model.gpt2 import GPT, GPTConfig
from model.network import compile_blocks
from model.parallel import ParallelModel
from model.training import choose_operators
from tests.running import ALONE, losses, run_several, weights
from train_gpt2 import train

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, n_ctx=12, n_vocab=50, dropout=0.3)
DROPOUT = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=16, dropout=0.2)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(SHAPE).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def nanogpt(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """nanoGPT's forward pass, dropout in the places and the order that it has there."""
    p, (B, T), C, H = model.config.dropout, idx.shape, model.config.n_embd, model.config.n_head
    x = F.dropout(model.wte(idx) + model.wpe.weight[:T], p)  # (B, T, C)
    for block in model.h:
        qkv = block.attn.c_attn(block.ln_1(x))  # (B, T, 3C)
        q, k, v = (z.view(B, T, H, C // H).transpose(1, 2) for z in qkv.split(C, 2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // H)  # (B, H, T, T)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = F.dropout(scores.softmax(-1), p) @ v  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x + F.dropout(block.attn.c_proj(y), p)
        hidden = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")  # (B, T, 4C)
        x = x + F.dropout(block.mlp.c_proj(hidden), p)
    return model.ln_f(x)


def test_it_is_where_nanogpt_has_it(model):
    """The same draws from the same seed, in fp64: another order of summation moves some 1e-16."""
    idx = torch.randint(SHAPE.n_vocab, (3, 12))
    torch.manual_seed(7)
    ours = model.hidden(idx)
    torch.manual_seed(7)
    assert (ours - nanogpt(model, idx)).abs().max() < 1e-12
    torch.manual_seed(8)
    assert (ours - model.hidden(idx)).abs().max() > 0.1


def test_long_rows_drop_as_much_of_the_softmax():
    """Past SHORT PyTorch's own attention drops: a query over T equal keys then averages the values
    over those that are left, each divided by 1 - p. The mean of 300 x 64 such averages of ones has
    a standard error below sqrt(p / (1 - p) / 150) / sqrt(300 x 2), 0.003."""
    qkv = torch.zeros(1, 300, 3 * 128)
    qkv[:, :, 256:] = 1
    torch.manual_seed(0)
    y = reference.attention(qkv, 2, dropout=0.5)
    assert y.std() > 0.05 and y.mean() == pytest.approx(1, abs=0.03)
    assert torch.equal(reference.attention(qkv, 2, dropout=0.0), reference.attention(qkv, 2))


def test_evaluations_have_none(model):
    idx = torch.randint(SHAPE.n_vocab, (3, 13))
    without = GPT(replace(SHAPE, dropout=0.0)).double()
    without.load_state_dict(model.state_dict())
    expected = without(idx[:, :-1], idx[:, 1:])
    parallel = ParallelModel(model, "ddp", ALONE, "fp64")
    with parallel.summon_full_params():
        assert model(idx[:, :-1], idx[:, 1:]) == expected
    assert model(idx[:, :-1], idx[:, 1:]) != expected  # and training has it again


def test_a_loaded_checkpoint_has_none(tiny, tmp_path):
    config = tiny(steps=2, eval_every=2, model=DROPOUT, dtype="fp64")
    train(config)
    row = read_rows(tmp_path / "tiny" / "metrics.jsonl")[-1]
    model = checkpoint.load_model(str(tmp_path / "tiny"))
    data = open_data(config.data)
    assert model.config.dropout == 0.2 and not model.training
    assert validation_loss(model, data.val, 20, 12, ALONE) == pytest.approx(
        row["val_loss"], abs=1e-12)


@pytest.mark.parametrize("changes", [
    {}, {"micro_batch": 3}, {"activation_checkpointing": True, "micro_batch": 3}])
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(tiny, tmp_path, changes):
    config = tiny(model=DROPOUT, **changes)
    train(config)
    run = tmp_path / "tiny"
    before, end = losses(run), weights(run, 6)
    checkpoint.remove(run / "checkpoints" / "step_00000006")
    torch.rand(100)  # whatever else was drawn
    train(config)
    assert losses(run) == before
    assert all(torch.equal(end[name], value) for name, value in weights(run, 6).items())


def test_activation_checkpointing_drops_the_same_twice(tiny, tmp_path):
    """The block is computed again for its gradients: with other masks these would be another's."""
    train(tiny(name="kept", steps=3, model=DROPOUT))
    train(tiny(name="again", steps=3, model=DROPOUT, activation_checkpointing=True))
    assert losses(tmp_path / "kept") == losses(tmp_path / "again")


def test_two_ranks_go_on_bit_for_bit(tiny, tmp_path):
    whole = tiny(name="whole", model=DROPOUT, eval_every=6, micro_batch=6)
    third = tmp_path / "whole" / "checkpoints" / "step_00000003"
    branch = replace(whole, name="branch", resume=str(third))
    done = run_several([whole, branch], tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout
    assert losses(tmp_path / "branch") == losses(tmp_path / "whole")[3:]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of dynamo's own: caches, what is no leaf
def test_compiled_it_draws_by_the_seed_and_is_gone_in_an_evaluation():
    """The compiler draws other masks than PyTorch, from the same generator."""
    torch.manual_seed(0)
    model = GPT(replace(SHAPE, n_layer=1))
    eager = GPT(replace(SHAPE, n_layer=1))
    eager.load_state_dict(model.state_dict())
    compile_blocks(model)
    idx = torch.randint(SHAPE.n_vocab, (3, 13))
    losses, gradients = [], []
    for step in (1, 1, 2):
        ALONE.seed_step(0, step)
        loss = model(idx[:, :-1], idx[:, 1:])
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.h[0].mlp.c_fc.weight.grad.clone())
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(gradients[0], gradients[1])
    with torch.no_grad():
        off = (model.eval().hidden(idx[:, 1:]) - eager.eval().hidden(idx[:, 1:])).abs().max()
    assert off < 1e-5  # a hundred roundings of numbers near 1


def test_a_steps_draws_follow_from_seed_step_and_rank():
    seen = {}
    for seed, step, rank in [(1, 2, 0), (2, 1, 0), (1, 2, 1), (1, 3, 0)]:
        world = World(rank, 2, torch.device("cpu"))
        world.seed_step(seed, step)
        first = torch.rand(4).tolist()
        world.seed_step(seed, step)
        assert torch.rand(4).tolist() == first
        seen[tuple(first)] = (seed, step, rank)
    assert len(seen) == 4


def test_the_kernels_attention_is_left_to_pytorch_while_training(model, monkeypatch, capsys):
    def no_dropout(qkv, n_head):
        used.append(n_head)
        return reference.attention(qkv, n_head)

    used: list[int] = []
    ops = operators.TORCH._replace(attention=no_dropout)
    monkeypatch.setattr(selfcheck, "checked", lambda *_, **__: (ops, "kernels: triton, checked"))
    assert choose_operators(SHAPE, "auto", torch.float32, ALONE) is ops
    assert "attention by torch while training" in capsys.readouterr().out
    choose_operators(replace(SHAPE, dropout=0.0), "auto", torch.float32, ALONE)
    assert "attention by torch" not in capsys.readouterr().out
    idx = torch.randint(50, (1, 12))
    model = GPT(SHAPE, ops)
    model.hidden(idx)
    assert used == []
    model.eval().hidden(idx)
    assert used == [2, 2]


def test_init_may_change_it(tiny, tmp_path):
    train(tiny(steps=1))
    assert train(tiny(steps=1, name="more", init=str(tmp_path / "tiny"), model=DROPOUT)) == 0
