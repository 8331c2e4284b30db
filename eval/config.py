"""The settings of the evaluations during a run, without PyTorch (model/config.py says why)."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from launch import cli, flags


@dataclass(frozen=True)
class EvalConfig:
    """When a run is evaluated, and on what."""

    eval_every: int = 250
    """Steps between evaluations: validation loss, HellaSwag, a sample."""
    val_tokens: int = 10_485_760
    """The fixed validation set: the first tokens of the validation shard (20 x 2^19)."""
    hellaswag: str = "auto"
    """A JSONL file of questions, off, or auto: downloaded for runs on GPUs."""
    prompt: Annotated[str, tyro.conf.arg(help_behavior_hint=flags.unquoted)] = (
        "Hello, I'm a language model,")
    """What the samples continue."""
    early_stop: int = 0
    """End the run after so many evaluations in a row without a lower validation loss; 0: never."""

    def __post_init__(self) -> None:
        cli.within("eval_every", self.eval_every, 1, cli.MOST_STEPS)
        cli.within("val_tokens", self.val_tokens, 1, 10**12)
        cli.within("early_stop", self.early_stop, 0, cli.MOST_STEPS)
