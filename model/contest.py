"""Which implementation a run takes on its cards, where there are several: kernels/race.py's answer.

    contest = Contest(shape, 64, torch.bfloat16, True, {}, world)
    names, ops = choose_attention(contest, ops)      # {"attention_forward": "triton", ...}
    names["blocks"] = choose_blocks(contest, ops, passes)             # both print lines

All ranks check every implementation, each on its own card; rank 0 times those that are left, and
all ranks take what it says. config.json keeps it under "resolved", and a run that goes on asks
only whether that still works, so that its bits stay the same.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import operators, race, tiles
from kernels.constants import Choice
from kernels.operators import Operators
from kernels.passes import Passes
from kernels.race import Run
from launch import folder
from launch.world import DTYPES, World, device_name
from model.config import GPTConfig
from model.fused_block import (
    LIMITS,
    FusedBlock,
    copy_weights,
    outputs_and_gradients,
    random_block,
)
from model.gpt2 import Block

BY_HAND, COMPILED, EAGER = "by hand", "compiled", "eager"  # blocks


def milliseconds(run: Run) -> float:
    """The median of a tenth of a second of runs, with the L2 cache emptied before each."""
    from triton.testing import do_bench

    return do_bench(run, return_mode="median")


@dataclass(frozen=True)
class Contest:
    """What is compared, and for whom."""

    shape: GPTConfig
    B: int  # sequences at once
    dtype: torch.dtype  # of the matrix products
    repeatable: bool  # only what repeats itself bit for bit may win
    kept: dict[str, str]  # what the run that goes on has chosen, {} of a new one
    world: World
    judge: Callable[[Run], float] = milliseconds

    def decide(
        self, runs: dict[str, Run], fault_of: Callable[[tuple[Tensor, ...]], str],
        unit: str = " ms",
    ) -> race.Result:
        """The same on every rank. unit: see race.decide."""
        findings = race.merge(self.world.all_gather(race.check(runs, fault_of)))
        return self.world.broadcast_from_rank0(
            race.decide, runs, findings, self.judge, self.repeatable, unit)

    def clean_up(self) -> None:
        """Gives back the memory in which they ran, and forgets how much it was."""
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def open_contest(
    shape: GPTConfig, choice: Choice, ops: Operators, dtype: str, B: int, source: Path | None,
    world: World,
) -> Contest | None:
    """None where there is nothing to choose: without our kernels, where they are insisted on, and
    where PyTorch's have no such attention (fp32; dropout and masks leave it to model/gpt2.py and
    model/document_mask.py).

    source: the checkpoint that the run goes on from.
    """
    if choice not in ("auto", "fastest") or ops == operators.TORCH:
        return None
    if dtype not in ("bf16", "fp16") or shape.dropout or shape.document_mask:
        return None
    repeatable = choice == "auto" or torch.are_deterministic_algorithms_enabled()
    kept: dict[str, str] = {}
    if source:
        kept = world.broadcast_from_rank0(
            folder.kernels_kept, source, choice, device_name(world.device))
    return Contest(shape, B, DTYPES[dtype], repeatable, kept, world)


def choose_tiles(contest: Contest) -> dict[str, str]:
    """The fastest tile of each kernel of our attention that has several, by "tile of KERNEL". They
    are what ships in this process from then on, also where text is drawn."""
    from kernels.candidates import TILED

    case = _attention_case(contest)
    chosen: dict[str, str] = {}
    lines = []
    for kernel in TILED:
        row = {str(tile): tile for tile in tiles.TABLE.get(case.key(kernel), ())}
        of_ranks = contest.world.all_gather(list(row))
        if len(row) < 2 or any(names != of_ranks[0] for names in of_ranks):  # other kinds of cards
            continue
        # A run of a version that raced no tiles went by the one that ships.
        ships = str(tiles.table(tiles.triton_version())[case.key(kernel)][0])
        kept = contest.kept.get(f"tile of {kernel}", ships if contest.kept else "")
        result = _race_tiles(contest, case, kernel, [kept] if kept in row else list(row))
        if not result.winner and kept in row:
            result = _race_tiles(contest, case, kernel, list(row))
        if result.winner:
            tiles.prefer(case.key(kernel), row[result.winner])
            chosen[f"tile of {kernel}"] = result.winner
        lines.append(f"{kernel} {result.said}{' as before' * (result.winner == kept)}")
    if lines:
        contest.world.print0(f"tiles: {'; '.join(lines)}")
    return chosen


def _race_tiles(contest: Contest, case: Any, kernel: str, names: list[str]) -> race.Result:
    fault_of = case.forward_fault if kernel == "attention_forward" else case.backward_fault
    return contest.decide(case.tile_runs(kernel, names), fault_of)


def choose_attention(contest: Contest, ops: Operators) -> tuple[dict[str, str], Operators]:
    """Who computes its passes, by the names of kernels/candidates.py; and the operators with it.

    Ours takes part where it's among them still, with the fastest of its tiles. Where nobody is
    left, it's plain PyTorch's.
    """
    from kernels.candidates import NAMES, TORCH, attention_by

    ours = ops.attention is not operators.TORCH.attention
    kept = [contest.kept.get(f"attention_{way}", "") for way in ("forward", "backward")]
    names = [name for name in NAMES if ours or name != "triton"]
    by_tiles = choose_tiles(contest) if ours else {}
    passes = None
    if all(name in names for name in kept):
        passes = _race_attention(contest, kept[:1], kept[1:], " as before")
    passes = passes or _race_attention(contest, names, names) or (TORCH, TORCH)
    chosen = by_tiles | dict(zip(("attention_forward", "attention_backward"), passes, strict=True))
    return chosen, ops._replace(attention=attention_by(*passes))


def _race_attention(
    contest: Contest, forward_names: list[str], backward_names: list[str], how: str = ""
) -> tuple[str, str] | None:
    """Prints a line; None where nobody is left for one of the passes. A backward pass begins with
    what the fastest forward pass leaves: so that one comes first."""
    case = _attention_case(contest)
    passes = None
    forward = contest.decide(case.forward_runs(forward_names), case.forward_fault)
    line = f"attention: forward {forward.said}"
    if forward.winner:
        runs = case.backward_runs(backward_names, forward.winner)
        backward = contest.decide(runs, case.backward_fault, unit="")
        line += f"; backward {backward.said}"
        if backward.winner:
            passes = forward.winner, backward.winner
    contest.world.print0(f"{line}: {' + '.join(passes) if passes else 'torch'}{how}")
    return passes


def _attention_case(contest: Contest) -> Any:
    from kernels.candidates import AttentionCase

    shape = contest.shape
    return AttentionCase(contest.B, shape.n_ctx, shape.n_head, shape.n_embd // shape.n_head,
                         contest.dtype, contest.world.device)


def choose_blocks(contest: Contest, ops: Operators, passes: Passes) -> str:
    """BY_HAND or COMPILED: who computes GPT-2's blocks, where both can; EAGER, which is
    model/gpt2.py as it stands, where neither is left."""
    names = [BY_HAND, COMPILED]
    kept, winner = contest.kept.get("blocks"), None
    if kept in names:
        winner = _race_blocks(contest, ops, passes, [kept], " as before")
    return winner or _race_blocks(contest, ops, passes, names) or EAGER


def _race_blocks(
    contest: Contest, ops: Operators, passes: Passes, names: list[str], how: str = ""
) -> str | None:
    """Prints a line; None where nobody is left."""
    case = BlockCase(
        contest.shape, ops, passes, contest.B, contest.dtype, contest.world.device)
    result = contest.decide(case.runs(names), case.fault)
    contest.world.print0(f"blocks: {result.said}: {result.winner or EAGER}{how}")
    return result.winner


class BlockCase:
    """A block at a run's own shape, by hand and compiled: for kernels/race.py.

    The gradients of its outputs are 0 but for the first and the last sequence, so that all others
    add nothing to those of weights, and fp64 can say of these two alone what is right.
    """

    def __init__(
        self, config: GPTConfig, ops: Operators, passes: Passes, B: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.ops, self.passes, self.B = config, ops, passes, B
        self.dtype, self.device = dtype, device
        self.ends = sorted({0, B - 1})

    @functools.cached_property
    def inputs(self) -> Tensor:
        """x, branch and the gradients of both outputs, (4, B, T, C)."""
        generator = torch.Generator(self.device).manual_seed(0)
        inputs = torch.randn(4, self.B, self.config.n_ctx, self.config.n_embd,
                             generator=generator, device=self.device)
        inputs[1] = inputs[1].to(self.dtype)  # as a run has it, and fp64 the same
        inputs[2:, 1 : self.B - 1] = 0
        return inputs

    @functools.cached_property
    def exact(self) -> dict[str, Tensor]:
        """The ends' outputs and gradients, and the weights' gradients, in fp64."""
        block = random_block(self.config, operators.TORCH).to(self.device).double()
        return outputs_and_gradients(block, self.inputs[:, self.ends].double(), None)

    def runs(self, names: list[str]) -> dict[str, Run]:
        """Forward and backward, by each of these."""
        make = {BY_HAND: self._by_hand, COMPILED: self._compiled}

        def run(block: Callable[[], Block]) -> tuple[Tensor, ...]:
            return tuple(outputs_and_gradients(block(), self.inputs, self.dtype).values())

        return {name: functools.partial(run, functools.cache(make[name])) for name in names}

    def _by_hand(self) -> Block:
        block = random_block(self.config, self.ops).to(self.device)
        block.fused = FusedBlock(block, self.passes)
        with torch.autocast(self.device.type, self.dtype):
            copy_weights([block.fused])
        return block

    def _compiled(self) -> Block:
        """Raises RuntimeError where the activations of a whole model of these would leave less than
        half of the card for all else: by hand fewer are kept, and --micro_batch may rely on it."""
        block = random_block(self.config, self.ops).to(self.device)
        block.compile()
        if self.device.type == "cuda":
            x = self.inputs[0].clone().requires_grad_()
            branch = self.inputs[1].to(self.dtype).requires_grad_()  # else it compiles once more
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", self.dtype):
                outputs = block(x, branch)
            kept = self.config.n_layer * (torch.cuda.memory_allocated() - before)
            del outputs
            require_room(kept, torch.cuda.get_device_properties(self.device).total_memory)
        return block

    def fault(self, got: tuple[Tensor, ...]) -> str:
        """What is wrong with a run's tensors, "" for nothing."""
        for (what, right), tensor in zip(self.exact.items(), got, strict=True):
            if what in ("dx", "dbranch", "stream", "branch"):
                tensor = tensor[self.ends]
            right = right.cpu()
            off = ((tensor.cpu().double() - right).norm() / right.norm()).item()
            if not off <= LIMITS[self.dtype]:  # NaN too
                return f"{what} is off by {off:.1e}"
        return ""


def require_room(kept: int, memory: int) -> None:
    """Raises RuntimeError where activations take more than half of a card. Both in bytes."""
    if kept > memory / 2:
        raise RuntimeError(f"all blocks would keep {kept / 2**30:.0f} GiB of the card's "
                           f"{memory / 2**30:.0f}")
