"""--plan's memory, held to this program's own tensors under fake tensors: no GPU is needed.

    pytest tests/test_launch_plan_memory.py
"""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from kernels import operators, reference
from kernels.cards import CARDS
from kernels.constants import FSDP_BLOCKS
from kernels.passes import Passes
from launch import cli
from launch.plan import memory, muon, speedrun
from launch.plan.job import Job
from launch.world import World
from model import fused_block, parallel
from model.gpt2 import GPTConfig
from model.muon import orthogonalise
from model.network import NoFirstWeights, flops_per_token, new_network, parameter_count
from model.optim import configure_optimizers
from model.parallel import ParallelModel
from model.training import ComputeConfig
from tests.gpucheck.predict import NOT_TENSORS
from tests.jobs import job_of, preset
from tests.nullgpu import rows, table
from train_gpt2 import PRESETS, TrainConfig

MIB = 2**20


# ---- memory ----

def operators_of(name: str) -> operators.Operators:
    if name == "torch":
        return operators.TORCH
    pytest.importorskip("triton")
    from kernels import attention, cross_entropy, layernorm, qk_norm_rotary, relu_squared

    return operators.Operators(attention.attention, layernorm.layer_norm,
                             cross_entropy.linear_cross_entropy, qk_norm_rotary.qk_norm_rotary,
                             relu_squared.relu_squared)


def peak_of_a_step(
    model: GPTConfig, B: int, ops: operators.Operators, again: bool = False,
    by_hand: Passes | None = None,
) -> int:
    """Bytes at the peak of two steps of two micro-steps, as torch's memory tracker counts them."""
    with FakeTensorMode(), NoFirstWeights():
        gpt = new_network(model, ops)
        gpt.checkpoint_activations = again
        if by_hand:
            fused_block.fuse_blocks(gpt, by_hand, copies=True)
        optimizer = torch.optim.AdamW(gpt.parameters(), fused=True)
        tracker = MemTracker()
        tracker.track_external(gpt, optimizer)
        tokens = torch.zeros(B, model.n_ctx, dtype=torch.long)
        with tracker:
            for _ in range(2):
                for _ in range(2):
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = gpt(tokens, tokens)
                    loss.backward()
                    tracker.reset_mod_stats()
                torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


# T above the reference's SHORT, below which a CPU keeps all scores; small and large N, so that
# each moment of the backward pass is the peak once.
SHAPES = {
    "one sequence": (GPTConfig(n_layer=2, n_head=4, n_embd=256, n_ctx=512), 1),
    "narrow": (GPTConfig(n_layer=4, n_head=4, n_embd=256, n_ctx=512), 4),
    "124M wide": (GPTConfig(n_layer=3, n_head=12, n_embd=768, n_ctx=1024), 8),
    "many tokens": (GPTConfig(n_layer=2, n_head=12, n_embd=768, n_ctx=1024), 64),
    "1558M wide": (GPTConfig(n_layer=2, n_head=25, n_embd=1600, n_ctx=1024), 8),
}

def only_outputs() -> Passes:
    """The passes of a block by hand, as far as the memory goes: what the kernels allocate."""
    layernorm = pytest.importorskip("kernels.layernorm", reason="needs Triton")

    def layer_norm_forward(x, branch, branch_bias, weight, bias, eps, dtype):
        return layernorm._forward_outputs(x, weight, bias, branch, eps, dtype)

    def layer_norm_backward(dy, dtotal, total, weight, mean, rstd, partial, dtype, low, with_bias):
        dbranch = total.new_empty(total.shape if low != dtype else 0, dtype=low)
        return total.new_empty(total.shape, dtype=dtype), dbranch

    return Passes(
        lambda device: 1, layer_norm_forward, layer_norm_backward,
        lambda x, bias: torch.empty_like(x),
        lambda x, bias, dy, partial: (dy, torch.empty_like(x)),
        torch.ops.gpt2.attention_forward, torch.ops.gpt2.attention_backward,
        lambda first, second, partial: None,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
def test_memory_of_blocks_by_hand_is_what_a_step_allocates(shape, again, monkeypatch):
    """Within 0.1 %, or where blocks are computed again at most 10 % more, as above. A matrix's
    gradient comes in fp32 out of its product: on a GPU, and CPUs have no such product."""
    monkeypatch.setattr(fused_block, "_weight_gradient", lambda dy, x, dtype: torch.empty(
        dy.shape[1], x.shape[1], dtype=dtype))
    model, B = SHAPES[shape]
    job = job_of(model, by_hand=True, checkpointing=again)
    peaks = memory.peaks(job, B)
    peaks.pop("loss")
    predicted = 16 * job.stored + memory.activations(job, B) + max(peaks.values())
    measured = peak_of_a_step(model, B, operators_of("triton"), again, only_outputs())
    print(f"{shape}: {predicted / MIB:,.1f} MiB predicted, {measured / MIB:,.1f} allocated")
    if again:
        assert 0.999 <= predicted / measured <= 1.1
    else:
        assert predicted == pytest.approx(measured, rel=1e-3)


# Not with many tokens: there a CPU takes the last norm's backward pass apart, and a GPU doesn't.
SPEEDRUN = {
    "one sequence": (GPTConfig(arch="speedrun", n_layer=2, n_head=2, n_embd=256, n_ctx=512), 1),
    "narrow": (GPTConfig(arch="speedrun", n_layer=4, n_head=2, n_embd=256, n_ctx=512), 4),
    "124M wide": (GPTConfig(arch="speedrun", n_layer=3, n_head=6, n_embd=768, n_ctx=1024), 8),
    "1.5b wide": (GPTConfig(arch="speedrun", n_layer=2, n_head=12, n_embd=1536, n_ctx=1024), 8),
    "value embeddings": (GPTConfig(arch="speedrun", n_layer=4, n_head=2, n_embd=256, n_ctx=512,
                                   value_embeddings=True), 4),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_what_a_step_allocates(shape):
    """Within 0.1 %: the plan leaves out what has no C in it (tokens, scalars)."""
    model, B = SHAPES[shape]
    job = job_of(model)
    peaks = memory.peaks(job, B)
    peaks.pop("loss")  # inside one custom operator, where the tracker sees nothing
    predicted = 16 * job.stored + memory.activations(job, B) + max(peaks.values())
    measured = peak_of_a_step(model, B, operators_of("triton"))
    print(f"{shape}: {predicted / MIB:,.1f} MiB predicted, {measured / MIB:,.1f} allocated")
    assert predicted == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("shape", SPEEDRUN)
def test_memory_of_the_speedrun_is_what_a_step_allocates(shape):
    """As above; AdamW's moments, for Muon's steps can't be taken without numbers."""
    model, B = SPEEDRUN[shape]
    job = job_of(model, compile=False)
    peaks = memory.peaks(job, B)
    peaks.pop("loss")
    predicted = 16 * job.stored + memory.activations(job, B) + max(peaks.values())
    assert predicted == pytest.approx(peak_of_a_step(model, B, operators_of("triton")), rel=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("ops", ["triton", "torch"])
def test_the_speedruns_blocks_keep_what_the_plan_says(ops, dtype):
    """Uncompiled; tests/test_kernels_speedrun.py has the compiled ones."""
    model, B = SPEEDRUN["narrow"]
    job = job_of(model, kernels=ops, dtype=dtype, compile=False)
    N, C, V = B * model.n_ctx, job.n_embd, job.padded_vocab
    dh = 4 if ops == "triton" else job.itemsize
    around = memory.total(speedrun.kept_around_blocks(job, B))
    predicted = memory.activations(job, B) + around + dh * N * C + 4 * V * C
    assert saved_bytes(model, B, ops, dtype) == pytest.approx(predicted, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("ops", ["triton", "torch"])
def test_blocks_keep_what_the_plan_says(ops, dtype):
    model, B = SHAPES["narrow"]
    job, N = job_of(model, kernels=ops, dtype=dtype, compile=False), B * model.n_ctx
    # last LayerNorm's input and statistics, the loss's dh and dW
    C, V, dh = job.n_embd, job.padded_vocab, 4 if ops == "triton" else job.itemsize
    last = N * ((4 + dh) * C + 8) + 4 * V * C
    predicted = memory.activations(job, B) + last
    assert saved_bytes(model, B, ops, dtype) == pytest.approx(predicted, rel=1e-3)


def saved_bytes(model: GPTConfig, B: int, ops: str, dtype: str) -> int:
    """All that autograd saves between forward and backward, parameters aside; 16 bytes a token are
    ids and targets."""
    saved: dict[int, int] = {}

    def pack(x):
        saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode(), NoFirstWeights():
        gpt = new_network(model, operators_of(ops))
        tokens = torch.zeros(B, model.n_ctx, dtype=torch.long)
        cast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), cast:
            gpt(tokens, tokens)
        for parameter in gpt.parameters():
            saved.pop(parameter.untyped_storage()._cdata, None)
    return sum(saved.values())


def test_dropouts_masks_are_counted():
    """A byte a number for each of a block's two branches, as on CUDA; a CPU keeps wider ones."""
    model, B = SHAPES["narrow"]
    more = memory.activations(job_of(replace(model, dropout=0.1)), B) - memory.activations(
        job_of(model), B)
    assert more == 4 * 2 * B * 512 * 256
    config = PRESETS["shakespeare-char"]
    assert Job.of(asdict(config), 1, 1).dropout == 0.2


def test_the_loss_holds_as_many_logits_as_the_plan_says():
    cross_entropy = pytest.importorskip("kernels.cross_entropy", reason="needs Triton")
    assert memory.LOGITS == cross_entropy.CHUNK_ELEMENTS == reference.GPU_CHUNK_ELEMENTS


@pytest.mark.parametrize(("shapes", "more"), [(SHAPES, 1.1), (SPEEDRUN, 1.2)],
                         ids=["gpt2", "speedrun"])
def test_recomputing_keeps_the_inputs_of_blocks_alone(shapes, more):
    """Never less than measured, and at most 10 % more, or 20 where a block keeps a third stream:
    the plan adds up what is there during the loss and what is there when a block is computed
    again."""
    model, B = shapes["narrow"][0], 32
    job = job_of(model, checkpointing=True, compile=False)
    peaks = memory.peaks(job, B)
    peaks.pop("loss")
    predicted = 16 * job.stored + memory.activations(job, B) + max(peaks.values())
    assert 1 <= predicted / peak_of_a_step(model, B, operators_of("triton"), again=True) <= more


# Peaks that PyTorch's own CUDA allocator reported for a plain GPT-2 of the same tensors but one: it
# keeps all logits (log-softmax in fp32, its gradient twice: 12 bytes each). First backward pass, so
# gradients aren't there yet. MiB: (preset, B, ranks of FSDP, peak).
PLAIN = [
    ("gpt2-124m", 8, 1, 9_065),
    ("gpt2-124m", 64, 1, 60_501),
    ("gpt2-774m", 8, 1, 28_223),
    ("gpt2-1558m", 8, 1, 47_609),
    ("gpt2-1558m", 16, 1, 73_879),
    ("gpt2-1558m", 8, 8, 28_998),
]


@pytest.mark.parametrize(("name", "B", "ranks", "measured"), PLAIN)
def test_memory_of_a_plain_gpt2(name, B, ranks, measured):
    """Within 3 %: small tensors of that model; under FSDP it gathered its embeddings in bf16."""
    job = preset(name, by_hand=False, parallel="fsdp" if ranks > 1 else "ddp")
    N, C, V = B * job.n_ctx, job.n_embd, job.padded_vocab
    held = memory.memory(job, ranks, B)
    states = held["weights (fp32)"] + held["optimizer (two moments)"]
    gathered = held.get("weights gathered", 0)
    predicted = states + gathered + memory.activations(job, B) + 12 * N * V + 6 * N * C
    print(f"{name} B {B} ranks {ranks}: {predicted / MIB:,.0f} against {measured:,} MiB")
    assert predicted / MIB == pytest.approx(measured, rel=0.03)


COUNTED = [row for row in rows.ROWS if "step" in row.parts]


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: row.name)
def test_memory_is_what_the_stand_in_counted(row):
    """Within 2 %: the program's own tensors on a GPU (make cuda-check)."""
    settings = cli.parse(TrainConfig, PRESETS, row.command(Path("inputs"), Path("out"))[1:])
    model = settings.model
    job = Job.of(asdict(settings), parameter_count(model), flops_per_token(model))
    parts = memory.memory(job, row.ranks, settings.micro_batch)
    predicted = sum(size for part, size in parts.items() if part not in NOT_TENSORS)
    counted = table.read()[row.name]["step"]["peak MiB"]
    print(f"{row.name}: {predicted / MIB:,.0f} MiB predicted, {counted:,} counted")
    assert predicted / MIB == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(("mode", "gpus", "micro_steps", "whole"), [
    ("ddp", 1, 1, False), ("ddp", 1, 2, True), ("ddp", 8, 1, True), ("zero1", 8, 1, True),
    ("fsdp", 8, 1, False), ("fsdp", 8, 2, True)])
def test_gradients_are_there_during_the_loss_where_something_keeps_them(
        mode, gpus, micro_steps, whole):
    """DDP's buckets, or an earlier micro-step; else the update has let go of them."""
    job = preset("gpt2-124m", parallel=mode, batch_tokens=64 * 1024 * gpus * micro_steps)
    gradients, workspace = memory.gradients_and_workspace(job, gpus, 64)
    assert gradients == whole * 4 * job.stored / (8 if mode == "fsdp" else 1)
    assert workspace == memory.peaks(job, 64)["loss"]


def test_copies_in_bf16_are_counted_while_they_wait_to_be_sent():
    """DDP's, until the last gradient is there; under fsdp it's the buffers that are half as large,
    and on one GPU nothing is sent."""
    more = {}
    for mode, gpus, B in (("ddp", 8, 1), ("ddp", 8, 64), ("ddp", 1, 1), ("fsdp", 8, 1)):
        job = preset("gpt2-124m", parallel=mode, checkpointing=B == 1)
        half = replace(job, reduce_dtype="bf16")
        totals = [sum(size for part, size in memory.memory(one, gpus, B).items()
                      if part not in NOT_TENSORS) for one in (half, job)]
        more[mode, gpus, B] = totals[0] - totals[1]
    # The peak of B = 1 is where all gradients are there; of B = 64 it's the loss, before them.
    assert more["ddp", 8, 1] == 2 * job.stored
    assert more["ddp", 8, 64] == more["ddp", 1, 1] == 0
    assert more["fsdp", 8, 1] == -2 * FSDP_BLOCKS * 12 * 768**2


def test_of_a_small_batch_the_peak_is_where_all_gradients_are_there():
    """Little is let go of then: less than the gradients that come."""
    job = preset("gpt2-124m", batch_tokens=1024, checkpointing=True)
    gradients, workspace = memory.gradients_and_workspace(job, 1, 1)
    assert gradients == 4 * job.stored
    assert workspace == memory.peaks(job, 1)["embedding backward"]


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    job, card = preset("gpt2-350m"), CARDS["4090"]
    most = memory.largest_micro_batch(job, card, 1)
    assert sum(memory.memory(job, 1, most).values()) <= card.memory_bytes
    assert sum(memory.memory(job, 1, 2 * most).values()) > card.memory_bytes


# ---- Muon ----

def test_muon_keeps_one_number_for_a_matrix_weight_and_two_for_any_other():
    config = replace(PRESETS["speedrun-demo"].model, n_layer=2, n_vocab=300)
    module = new_network(config)
    model = ParallelModel(module, "ddp", World(0, 1, torch.device("cpu")), "fp32")
    optimizer = configure_optimizers(model, PRESETS["speedrun-demo"].optim)
    kept = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
    job = job_of(config, optimizer="muon")
    assert muon.state(job) == kept
    assert memory.optimizer_state(job)[1] == kept
    assert memory.optimizer_state(job_of(config))[1] == 8 * job.stored


def test_muons_products_are_counted():
    """Of a block's matrices, on two of which (C, 4C) and (4C, C) are alike."""
    shape = GPTConfig(arch="speedrun", n_layer=3, n_head=1, n_embd=64)
    C, job = 64, job_of(shape, optimizer="muon")
    with FlopCounterMode(display=False) as counted:
        for shape in (4, C, C), (1, C, 4 * C), (1, 4 * C, C):
            orthogonalise(torch.randn(shape))
    assert muon.flops(job) == 3 * counted.get_total_flops()


def test_muons_workspace_is_what_the_plan_says():
    config = GPTConfig(arch="speedrun", n_layer=2, n_head=2, n_embd=128, n_vocab=128)
    model = ParallelModel(new_network(config), "ddp", World(0, 1, torch.device("cpu")), "fp32")
    optimizer = configure_optimizers(model, PRESETS["speedrun-demo"].optim)
    for shard in model.shards:
        shard.optim_param.grad = torch.randn_like(shard.optim_param)
    tracker = MemTracker()
    kept = {id(x): x for state in optimizer.state.values() for x in state.values()}.values()
    tracker.track_external(model.module, *kept)
    before = sum(x.nbytes for x in kept)
    before += 2 * sum(p.nbytes for p in model.module.parameters())
    with tracker:
        optimizer.muon.step()
    most = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - before
    job = job_of(config, optimizer="muon", dtype="fp32")
    assert most == pytest.approx(muon.workspace(job), rel=1e-3)
    assert parallel.BUCKET == muon.BUCKET


def test_muons_results_are_sent_round():
    """124M: 85 M numbers in bf16, (n - 1) / n of them; where rows are shared out, momenta too."""
    job, size = preset("speedrun"), 2 * 12 * 12 * 768**2
    assert muon.traffic(job, 1) == (0, 0)
    assert muon.traffic(job, 8) == (7 / 8 * size, 0)
    assert muon.traffic(job, 32) == (7 / 8 * size, 3 / 4 * size / 8)
    assert muon.traffic(replace(job, parallel="zero1"), 8) == (7 / 8 * 2 * size, 0)
    assert muon.traffic(replace(job, parallel="fsdp"), 32) == (7 / 8 * 2 * size, 0)
    assert muon.seconds(job, CARDS["h100"], 8, 1) * 8 == muon.seconds(job, CARDS["h100"], 1, 1)


@pytest.mark.parametrize(("settings", "asked"), [
    ({}, None), ({}, True), ({}, False), (dict(gelu="exact"), None), (dict(dropout=0.1), None),
    (dict(n_head=16, n_embd=2048), None), (dict(n_head=17, n_embd=2176), None),
    (dict(arch="speedrun", n_head=6), None),
])  # fmt: skip
def test_the_plan_knows_which_blocks_are_by_hand(settings, asked):
    """As model/fused_block.py says of a shape, and --compile asks."""
    config = replace(PRESETS["gpt2-124m"], model=GPTConfig(**settings),
                     compute=ComputeConfig(compile=asked))
    job = Job.of(asdict(config), 1, 1)
    assert job.by_hand == (asked is None and fused_block.fits(config.model))
