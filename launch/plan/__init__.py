"""What a run will need and cost on GPUs, before anyone pays for them: arithmetic alone.

    python train_gpt2.py gpt2-124m --plan 8xh100 --plan_price 2.5

It prints the memory of a GPU by part and the largest micro-batch that fits, the bytes on each link,
and step time, tokens/s, hours and cost as a range with the assumptions beside it.

    own_card.py     a GPU that kernels/cards.py doesn't know, or that was measured
    job.py          the numbers of a run, and how many of which GPU it gets
    memory.py       bytes of one GPU, tensor by tensor
    speedrun.py     what its network keeps and moves
    muon.py         what Muon keeps, computes and sends
    tables.py       the rows that these sums are made of
    step_time.py    seconds of a step: what is computed, read, written and sent
    report.py       what is printed
"""

from dataclasses import dataclass

from launch import cli
from launch.errors import BadInput
from launch.plan.report import show

__all__ = ["PlanConfig", "show"]


@dataclass(frozen=True)
class PlanConfig:
    """What to find out before a run is paid for; the run itself then doesn't start."""

    plan: str = ""
    """COUNTxGPU, as in 8xh100: print what the run needs and costs there, and exit."""
    plan_price: float = 0.0
    """Dollars per GPU-hour, for --plan; 0: not known."""
    plan_card: str = ""
    """A GPU of one's own, for --plan 8x: gpu_report.json, or a file as launch/plan/own_card.py has
    it."""
    preflight: bool = False
    """Check these machines against what the run will need (launch/preflight.py), and exit."""

    def __post_init__(self) -> None:
        if self.plan_card and not self.plan:
            raise BadInput("--plan_card describes a GPU for --plan: how many of them? --plan 1x")
        cli.within("plan_price", self.plan_price, 0, 1e6, "dollars per GPU-hour")
