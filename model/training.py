"""Puts together what is trained: the model, its place on the ranks, its optimizer."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from kernels import fp32_products, operators, selfcheck
from kernels.constants import Choice
from kernels.passes import Passes, triton_passes
from launch import folder
from launch.errors import BadInput
from launch.world import World
from model import checkpoint, fused_block
from model.adamw import AdamW
from model.config import ComputeConfig
from model.contest import (
    BY_HAND,
    EAGER,
    choose_attention,
    choose_blocks,
    choose_loss,
    open_contest,
)
from model.fused_block import fuse_blocks
from model.gpt2 import GPT, GPTConfig
from model.network import NoFirstWeights, compile_blocks, compile_loss, new_network
from model.optim import LossScaler, OptimConfig, configure_optimizers
from model.parallel import ParallelModel
from model.train_state import TrainState, load_train_state

PRODUCTS = "fp32 products"  # in config.json, beside the operators


def build_train_state(
    shape: GPTConfig, optim: OptimConfig, compute: ComputeConfig, dtype: str, seed: int,
    init: str, source: Path | None, world: World, characters: str = "", micro_batch: int = 1,
) -> tuple[TrainState, dict[str, Any]]:
    """A new model from the seed, the weights of `init`, or everything that the checkpoint `source`
    holds; with the checkpoint's state.json, empty for a new run.

    dtype: of the matrix products. characters: what the run's tokens stand for, if they aren't
    GPT-2's. micro_batch: sequences at once, for which implementations are timed. Raises BadInput on
    all ranks where one of these can't be used.
    """
    weights = torch.float64 if dtype == "fp64" else torch.float32
    given = world.broadcast_from_rank0(checkpoint.resolve, init) if init and not source else ""
    ops, by_hand, chosen = choose_kernels(shape, compute, dtype, micro_batch, source, world)
    with world.fail_together():
        with NoFirstWeights() if source or given else nullcontext():
            module = new_model(shape, compute, ops, weights, seed, world)
        if given:
            checkpoint.copy_weights(module, given, characters)
    if given:
        world.print0(f"starts from the weights of {given} (--init {init})")
    if by_hand:
        sharded = compute.parallel == "fsdp" and world.size > 1
        fuse_blocks(module, by_hand, copies=not sharded, alone=world.size == 1)
    elif compute.compiled(world.device) and chosen.get("blocks") != EAGER:
        compile_blocks(module)
        if "loss" not in chosen:  # else it was raced
            compile_loss(module)
    model = ParallelModel(module, compute.parallel, world, dtype, compute.reduce_dtype)
    model.chosen = chosen
    optimizer = configure_optimizers(model, optim)
    state = TrainState(model, optimizer, LossScaler.of(dtype, world.device))
    if not source:
        return state, {}
    with world.fail_together():
        saved = load_train_state(state, source)
    return state, saved


def choose_kernels(
    shape: GPTConfig, compute: ComputeConfig, dtype: str, micro_batch: int, source: Path | None,
    world: World,
) -> tuple[operators.Operators, Passes | None, dict[str, str]]:
    """Who computes the operators; what blocks by hand launch, or None where they aren't by hand;
    and the names of what has won where several can do it (model/contest.py)."""
    weights = torch.float64 if dtype == "fp64" else torch.float32
    ops = choose_operators(shape, compute.kernels, weights, world)
    contest = open_contest(shape, compute.kernels, ops, dtype, micro_batch, source, world)
    chosen: dict[str, str] = {}
    if contest:
        chosen, ops = choose_attention(contest, ops)
        if compute.compile is not False:
            chosen["loss"], ops = choose_loss(contest, ops)
    passes = None
    if compute.compile is None and blocks_by_hand(shape, ops, chosen, world):
        passes = passes_of(ops, chosen)
        if contest:
            chosen["blocks"] = choose_blocks(contest, ops, passes)
            passes = passes if chosen["blocks"] == BY_HAND else None
    if contest:
        contest.clean_up()
    chosen |= choose_products(shape, compute.kernels, dtype, source, world)
    return ops, passes, chosen


def choose_products(
    shape: GPTConfig, choice: Choice, dtype: str, source: Path | None, world: World
) -> dict[str, str]:
    """Has this process multiply a CPU's fp32 matrices by oneDNN, where that is faster and right on
    every rank; {} where they stay with MKL, as in a run that began so."""
    fp32_products.use(fp32_products.MKL)
    if world.device.type != "cpu" or dtype != "fp32" or choice == "torch":
        return {}
    kept = {}
    if source:  # on any CPU: how many threads it has is no reason to forget
        kept = world.broadcast_from_rank0(folder.kernels_kept, source, choice, None)
        if PRODUCTS not in kept:
            return {}
    try:
        good = fp32_products.is_faster() and fp32_products.is_right(shape.n_embd)
    except (RuntimeError, OSError):  # the other ranks wait for an answer
        good = False
    if all(world.all_gather(good)):
        fp32_products.use(fp32_products.ONEDNN)
        world.print0("fp32 products: by oneDNN, which is faster on this CPU, and checked")
        return {PRODUCTS: fp32_products.ONEDNN}
    if kept:
        world.print0("fp32 products: by oneDNN before, and on this CPU by MKL: as exact, but sums "
                     "are rounded elsewhere")
    return {}


def choose_operators(
    shape: GPTConfig, choice: Choice, weights: torch.dtype, world: World
) -> operators.Operators:
    """Who computes attention, LayerNorm and the loss: the same on every rank.

    Raises BadInput on all ranks where a choice can't be had on one of them.
    """
    head_width = shape.n_embd // shape.n_head
    with world.fail_together():
        try:
            ops, line = selfcheck.checked(
                choice, world.device, head_width, weights, speedrun=shape.arch == "speedrun")
        except (ValueError, RuntimeError) as error:  # kernels knows nothing of our errors
            raise BadInput(str(error)) from None
    # A rank that has fallen back computes something else, by a rounding, than its peers.
    of_ranks = world.all_gather((operators.by_reference(ops), line))
    for rank, (names, reason) in enumerate(of_ranks):
        if missing := set(names) - set(operators.by_reference(ops)):
            ops = operators.without(ops, missing)
            line = f"{reason} on rank {rank}, and so on all"
    if shape.dropout and ops.attention is not operators.TORCH.attention:
        line += "; attention by torch while training, for --model.dropout: the kernel has none"
    world.print0(line)
    return ops


def passes_of(ops: operators.Operators, chosen: dict[str, str]) -> Passes:
    """What blocks by hand launch: our kernels, and attention as it was chosen."""
    if not chosen and ops.attention is not operators.TORCH.attention:
        return triton_passes()
    from kernels.candidates import TORCH, passes_by

    return passes_by(triton_passes(), chosen.get("attention_forward", TORCH),
                     chosen.get("attention_backward", TORCH))


def blocks_by_hand(
    shape: GPTConfig, ops: operators.Operators, chosen: dict[str, str], world: World
) -> bool:
    """Whether blocks can compute themselves by model/fused_block.py: on GPUs with our kernels,
    where every rank finds that they are right."""
    ours = ops.layer_norm is not operators.TORCH.layer_norm
    if world.device.type != "cuda" or not ours or not fused_block.fits(shape):
        return False
    try:
        errors, faults = fused_block.check(
            passes_of(ops, chosen), world.device, shape.n_embd, shape.n_head)
    except RuntimeError as error:  # too little memory, say: the other ranks wait for an answer
        errors, faults = "", str(error)
    all_faults = [faults for faults in world.all_gather(faults) if faults]
    if all_faults:
        world.print0(f"blocks: compiled, for written by hand they are wrong here: {all_faults[0]}")
        return False
    world.print0(f"blocks: backward pass by hand, checked (largest errors: {errors})")
    return True


def device_decides(state: TrainState, diagnose_every: int) -> bool:
    """Whether a GPU applies a step or leaves it out by itself, without this process: as fused AdamW
    can, in fp32. Muon and AdamW in fp64 are called for good steps alone, and so is a step that
    --diagnose_every records."""
    return (isinstance(state.optimizer, AdamW) and not diagnose_every
            and state.model.world.device.type == "cuda" and state.model.dtype != "fp64")


def new_model(
    shape: GPTConfig, compute: ComputeConfig, ops: operators.Operators, weights: torch.dtype,
    seed: int, world: World,
) -> GPT:
    """The same on every rank and device: it's drawn on the CPU from the seed."""
    torch.manual_seed(seed)
    with NoFirstWeights():  # PyTorch's own, of which none would stay
        model = new_network(shape, ops)
    model.init_weights()
    model.to(world.device, weights)
    model.checkpoint_activations = compute.activation_checkpointing
    return model
