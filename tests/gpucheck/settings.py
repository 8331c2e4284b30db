"""How large the checks are: what all parts share."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.plan.job import Job
from launch.plan.memory import memory
from model import size
from model.config import GPTConfig
from presets import PRESETS

PRESET = "gpt2-124m"
BATCH = 64  # sequences a GPU: what tests/nullgpu/counted.json counts
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=128, n_ctx=128)  # heads that the kernels take


@dataclass(frozen=True)
class Settings:
    """Of one check. batch: sequences a GPU; quick: with a tiny model, whose figures mean nothing.
    """

    batch: int
    gpus: int
    quick: bool = False

    @property
    def model(self) -> GPTConfig:
        """What is trained and asked."""
        return SMALL if self.quick else PRESETS[PRESET].model

    def flags(self) -> list[str]:
        """Of the program: the preset on the embedded text, as demo has it, and nothing from a
        network."""
        shape = []
        if self.quick:
            for name in ("n_layer", "n_head", "n_embd", "n_ctx"):
                shape += [f"--model.{name}", str(getattr(SMALL, name))]
        return [PRESET, "--data.dir", "", "--hellaswag", "off", *shape]

    def job(self, gpus: int = 1) -> Job:
        """A step of it, for launch/plan."""
        config = PRESETS[PRESET]
        settings = asdict(config) | {
            "model": asdict(self.model), "micro_batch": self.batch,
            "batch_tokens": self.batch * self.model.n_ctx * gpus}
        return Job.of(settings, size.parameters(self.model), size.flops_per_token(self.model))

    def write(self, path: Path) -> None:
        """For the parts' processes."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """What write() has written."""
        return cls(**json.loads(path.read_text()))


def batch_that_fits(memory_bytes: int) -> int:
    """BATCH, or the largest power of two that a card with less memory holds, by --plan."""
    batch = BATCH
    while batch > 1 and sum(memory(Settings(batch, 1).job(), 1, batch).values()) > memory_bytes:
        batch //= 2
    return batch
