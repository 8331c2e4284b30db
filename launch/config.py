"""The settings of launch/, without PyTorch (model/config.py says why). --plan's: launch/plan."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch import cli
from launch.errors import BadInput

Dtype = Literal["auto", "bf16", "fp16", "fp32", "fp64"]
ReadDtype = Literal["auto", "bf16", "fp16", "fp32", "fp64", "int8"]  # of a model that is only read
Policy = Literal["skip", "rollback", "stop", "ignore"]
Tracking = Literal["disabled", "offline", "online"]
LONGEST_NAME = 255  # bytes, on most file systems


@dataclass(frozen=True)
class SpikeConfig:
    """What a run does about a step that would do harm."""

    on_spike: Policy = "skip"
    """A loss that is no number, or an exploding gradient: skip the step, rollback, stop, ignore."""
    max_spikes: int = 10
    """Bad steps in a row that are borne; one more ends the run."""

    def __post_init__(self) -> None:
        cli.within("max_spikes", self.max_spikes, 0)


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run that stands still is ended."""

    hang_timeout: float = 600.0
    """Seconds without any progress after which a rank ends itself, and says where it stood."""

    def __post_init__(self) -> None:
        # 30 days; far above it the timers' own type overflows.
        cli.within("hang_timeout", self.hang_timeout, 1, 30 * 86_400, "seconds")


@dataclass(frozen=True)
class TrackerConfig:
    """What is recorded of a run beside the usual rows of metrics.jsonl."""

    wandb: Tracking = "disabled"
    """Weights & Biases beside metrics.jsonl."""
    tensorboard: bool = False
    """TensorBoard beside metrics.jsonl: `tensorboard --logdir runs` compares runs."""
    profile: int = 0
    """Steps to record with torch.profiler."""
    diagnose_every: int = 0
    """Record activations, gradients and updates of every N-th step, layer by layer; 0: never."""

    def __post_init__(self) -> None:
        cli.within("profile", self.profile, 0, 1000, "steps")  # a trace of them is held in memory
        cli.within("diagnose_every", self.diagnose_every, 0, cli.MOST_STEPS)


def check_name(name: str) -> None:
    """Raises BadInput where a run can't be called so."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise BadInput(f"--name {name!r} is no folder name; --out_dir takes a path")
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise BadInput(f"--name {name[:20]}... has {len(os.fsencode(name))} bytes: a folder's name "
                       f"has {LONGEST_NAME} at most")


def check_minutes(config: Any) -> None:
    """Raises BadInput for what doesn't go with --minutes. config: TrainConfig."""
    cli.within("minutes", config.minutes, 0, 525_600)  # a year
    if config.minutes and config.resume not in ("auto", "never"):
        raise BadInput(f"--minutes plans a new run, and --resume {config.resume} goes on with one "
                       "whose steps are known: leave out one of them")
    if config.minutes and config.planning.plan:
        raise BadInput("--plan says what --steps take on that GPU, and --minutes plans the steps "
                       "of a run here: leave out one of them")
