"""Which implementation a run takes on its cards, where there are several: kernels/race.py's answer.

    contest = Contest(shape, 64, torch.bfloat16, True, {}, world)
    names, ops = choose_attention(contest, ops)      # {"attention_forward": "triton", ...}
    names["loss"], ops = choose_loss(contest, ops)
    names["blocks"] = choose_blocks(contest, ops, passes)             # each prints a line

All ranks check every implementation, each on its own card; rank 0 times those that are left, and
all ranks take what it says. config.json keeps it under "resolved", and a run that goes on asks
only whether that still works, so that its bits stay the same.
"""

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
from model.contest_cases import BY_HAND, COMPILED, BlockCase, LossCase
from model.network import compiled_loss

EAGER = "eager"  # blocks that are neither BY_HAND nor COMPILED
OURS, PLAIN = "triton", "torch"  # the loss, which may be COMPILED, too


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


def choose_loss(contest: Contest, ops: Operators) -> tuple[str, Operators]:
    """OURS, where it is among them still, or COMPILED, and the operators with it; PLAIN, plain
    PyTorch's, where neither is left, or none was when the run began."""
    plain = operators.TORCH.linear_cross_entropy
    losses: dict[str, Callable] = {COMPILED: compiled_loss}  # names, and who makes one
    if ops.linear_cross_entropy is not plain:
        losses = {OURS: lambda: ops.linear_cross_entropy} | losses
    # A run of a version that raced no loss went by ours, unless that was wrong.
    kept = contest.kept.get("loss", (OURS if OURS in losses else PLAIN) if contest.kept else "")
    winner = None
    if kept == PLAIN:
        return PLAIN, ops._replace(linear_cross_entropy=plain)
    if kept in losses:
        winner = _race_loss(contest, {kept: losses[kept]}, " as before")
    winner = winner or _race_loss(contest, losses) or PLAIN
    loss = plain if winner == PLAIN else losses[winner]()
    return winner, ops._replace(linear_cross_entropy=loss)


def _race_loss(contest: Contest, losses: dict[str, Callable], how: str = "") -> str | None:
    """Prints a line; None where nobody is left."""
    case = LossCase(contest.shape, contest.B, contest.dtype, contest.world.device)
    result = contest.decide(case.runs(losses), case.fault)
    contest.world.print0(f"loss: {result.said}: {result.winner + how if result.winner else PLAIN}")
    return result.winner


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
