"""Muon is PyTorch's own, on any number of ranks and in every mode, and checkpoints know it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from launch.errors import BadInput
from model.config import MuonConfig
from model.gpt2 import GPTConfig
from model.muon import orthogonalise
from model.network import new_network
from model.optim import MuonAdamW, OptimConfig, configure_optimizers
from model.parallel import ParallelModel
from tests.running import ALONE, losses, run_several, weights
from train_gpt2 import train

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_ctx=32, arch="speedrun")
MUON = OptimConfig(optimizer="muon", lr=0.02, weight_decay=0.1)


def model_with_gradients(dtype: str) -> ParallelModel:
    torch.manual_seed(0)
    model = ParallelModel(new_network(SHAPE), "ddp", ALONE, dtype)
    for shard in model.shards:
        if shard.name.endswith("c_proj.weight"):
            torch.nn.init.normal_(shard.param, 0, 0.02)  # from zero there is little to compare
    return model


def well_conditioned(shape: torch.Size) -> torch.Tensor:
    """A gradient whose matrices have singular values of 1 to 2, and vectors of ones."""
    if len(shape) < 2 or min(shape) == 2:
        return torch.ones(shape)
    rows, columns = shape if shape[0] != 3 * shape[1] else (shape[1], shape[1])
    n = min(rows, columns)
    generator = torch.Generator().manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(rows, n, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, n, generator=generator))
    part = left @ torch.diag(torch.linspace(1, 2, n)) @ right.T
    return torch.cat([part, 2 * part, 3 * part]) if rows != shape[0] else part


def test_it_is_pytorchs_muon():
    """Three steps of torch.optim.Muon on each matrix alone.

    Gradients have singular values of 1 to 2, and all three steps the same ones: small values would
    be lifted by up to 3.4^5, and with them what bf16 rounded. Both round the iterates, in another
    order: 2^-8 of values up to 1.2, five times, times lr, times 3.
    """
    ours, theirs = model_with_gradients("bf16"), model_with_gradients("bf16")
    optimizer = configure_optimizers(ours, MUON)
    assert isinstance(optimizer, MuonAdamW)
    optimizer.muon.momentum_warmup = 0
    matrices = {s.name: s.param.detach().clone() for s in theirs.shards if s.name.startswith("h.")}
    parts = {}  # c_attn is three matrices
    for name, matrix in matrices.items():
        cut = matrix.chunk(3) if "c_attn" in name else [matrix]
        parts[name] = [torch.nn.Parameter(part.clone()) for part in cut]
    muon = torch.optim.Muon([p for cut in parts.values() for p in cut], lr=0.02, weight_decay=0.1,
                            adjust_lr_fn="original")
    gradients = {s.name: well_conditioned(s.param.shape) for s in ours.shards}
    for _ in range(3):
        for shard in ours.shards:
            shard.param.grad = gradients[shard.name]
            if shard.name in parts:
                cut = shard.param.grad.chunk(len(parts[shard.name]))
                for p, gradient in zip(parts[shard.name], cut, strict=True):
                    p.grad = gradient.clone()
        ours.optimizer_step(optimizer)
        muon.step()
    for shard in ours.shards:
        if shard.name in parts:
            expected = torch.cat([p.detach() for p in parts[shard.name]])
            moved = (expected - matrices[shard.name]).abs().max()
            assert moved > 0.005
            assert (shard.param - expected).abs().max() < 3 * 0.02 * 5 * 1.2 * 2**-8, shard.name


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 32), (2, 32, 8)])
def test_singular_values_come_near_to_1_and_directions_stay(shape):
    U = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonalise(U)
    left, values, right = torch.linalg.svd(U, full_matrices=False)
    turned = left.mT @ found @ right.mT  # diagonal where the directions are the same
    assert (turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).abs().max() < 1e-12
    large = turned.diagonal(dim1=1, dim2=2)[values > 0.05 * values.amax(1, keepdim=True)]
    assert large.min() > 0.6
    assert large.max() < 1.3


SPEEDRUN = dict(
    model=replace(GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=16), arch="speedrun"),
    optim=OptimConfig(optimizer="muon", schedule="wsd", lr=0.02, warmup_steps=0, clip=0,
                      muon=MuonConfig(embed_lr=0.1)),
    dtype="fp64", steps=5, eval_every=5, save_every=5,
)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_mode_trains_the_speedrun_of_one_rank(tiny, tmp_path, ranks):
    """In fp64 the iterations are fp64 too. They lift what was rounded in a small singular value by
    3.4^5 = 485 at most, so 1e-16 of a number near 1 becomes 5e-14 a step."""
    train(tiny(name="one", **SPEEDRUN))
    runs = [tiny(name=mode, parallel=mode, micro_batch=1, **SPEEDRUN)
            for mode in ("ddp", "zero1", "fsdp")]
    done = run_several(runs, tmp_path, ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    one = weights(tmp_path / "one", 5)
    for config in runs:
        other = weights(tmp_path / config.name, 5)
        assert one.keys() == other.keys()
        worst = max((one[name] - other[name]).abs().max().item() for name in one)
        assert worst < 1e-12, config.name


def test_a_stopped_speedrun_goes_on_bit_for_bit(tiny, tmp_path):
    """Muon's momentum and its warm-up come back with the checkpoint."""
    settings = SPEEDRUN | dict(dtype="fp32", steps=6, eval_every=6, save_every=3)
    train(tiny(name="whole", **settings))
    stopped = tiny(name="stopped", **settings)
    done = run_several([stopped], tmp_path, 2, STOP_AT="3")
    assert done.returncode == 0, done.stderr[-3000:]
    kept = load_file(tmp_path / "stopped/checkpoints/step_00000003/optimizer.safetensors")
    assert {name.rpartition(".")[2] for name in kept if name.startswith("h.")} == {
        "momentum_buffer", "step"}
    done = run_several([stopped, tiny(name="two", **settings)], tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "two")
    one, two = (weights(tmp_path / name, 6) for name in ("stopped", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_muon_wants_matrices(tiny):
    with pytest.raises(BadInput, match="muon needs matrices.*--model.n_embd"):
        train(tiny(model=GPTConfig(n_layer=1, n_head=1, n_embd=1, n_ctx=16),
                   optim=OptimConfig(optimizer="muon")))
