"""The table that the check prints, predicted | measured | ratio, and gpu_report.json."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from kernels.cards import Card
from launch.files import atomic_write
from launch.plan import step_time
from launch.plan.own_card import with_rates
from tests.gpucheck.machine import Machine
from tests.gpucheck.predict import Figures
from tests.gpucheck.settings import Settings
from tests.nullgpu import venv

STEP = {
    "step_ms": "step, ms",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU, %",
    "idle": "the GPU idles, %",
    "peak_mib": "peak memory of tensors, MiB",
    "launches: all": "launches and copies a step",
}
LABELS: dict[str, dict[str, str]] = {
    "errors": {"bf16": "kernels' largest error in bf16 (limit)",
               "fp32": "kernels' largest error in fp32 (limit)"},
    "losses": {"difference": "20 losses, farthest from fp32 on the CPU (limit)"},
    "steps": STEP,
    "all GPUs": STEP,
    "rates": {"matmul_flops": "matrix product, TFLOP/s",
              "attention_flops": "attention and backward, TFLOP/s",
              "memory_bandwidth": "copy, GB/s"},
    "sampling": {"tokens_per_second": "sampling one text, tokens/s (at most)"},
    "HellaSwag": {"questions_per_second": "HellaSwag, made-up questions/s (at most)"},
    "saving": {"stall": "training waits for a checkpoint, s"},
    "largest": {"sequences": "largest micro-batch"},
}
INNER = {"launches": "", "times": ", ms of a step"}  # figures of many kinds: behind a kind's name
SCALES = {"mfu": 100.0, "idle": 100.0, "matmul_flops": 1e-12, "attention_flops": 1e-12,
          "memory_bandwidth": 1e-9}


class Row(NamedTuple):
    """A line of the table, in the unit that its name says."""

    part: str
    name: str
    predicted: float | None  # None: not known
    measured: float

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return self.measured / self.predicted if self.predicted else None


def rows(predicted: Figures, measured: dict[str, dict[str, Any]]) -> list[Row]:
    """Of all parts that measured something."""
    found = []
    for part, labels in LABELS.items():
        figures = flat(measured.get(part, {}))
        named = dict(labels)
        for name in figures:
            of, _, kind = name.partition(": ")
            if of in INNER and name not in labels:
                named[name] = f"  {kind}{INNER[of]}"
        for figure, name in named.items():
            if figure not in figures:
                continue
            scale = SCALES.get(figure, 1.0)
            expected = predicted.get(part, {}).get(figure)
            if expected is not None:
                expected *= scale
            if part == "all GPUs":
                name = f"all GPUs: {name}"
            found.append(Row(part, name, expected, figures[figure] * scale))
    return found + kernel_rows(measured.get("kernels", {}).get("rows", []))


def flat(figures: dict[str, Any]) -> dict[str, float]:
    """With {"launches": {"all": 388}} as {"launches: all": 388}."""
    found = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            found |= {f"{name}: {inner}": number for inner, number in value.items()}
        else:
            found[name] = value
    return found


def kernel_rows(timings: list[dict[str, Any]]) -> list[Row]:
    """Of kernels.bench's rows, ours: milliseconds, and those at the card's printed rates."""
    found = []
    for timing in timings:
        ms = timing["milliseconds"]
        if timing["by"] == "triton" and ms:
            least = timing["limit"] * ms if "limit" in timing else None
            found.append(Row("kernels", f"{timing['operator']}, ms (at least)", least, ms))
    return found


def table(lines: list[Row]) -> str:
    """For a terminal."""
    width = max([len(row.name) for row in lines], default=0)
    printed = [f"{'':{width}}  {'predicted':>10}  {'measured':>10}  {'ratio':>6}"]
    for row in lines:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        printed.append(f"{row.name:{width}}  {shown(row.predicted):>10}  "
                       f"{shown(row.measured):>10}  {ratio:>6}".rstrip())
    return "\n".join(printed)


def shown(value: float | None) -> str:
    """Three digits, or all before the point: 1.2e-05, 0.123, 12.3, 19,030."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def faults(measured: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each part that failed, or found something wrong."""
    return [f"{part}: {found['fault']}" for part, found in measured.items() if "fault" in found]


def rates(
    card: Card | None, settings: Settings, measured: dict[str, dict[str, Any]]
) -> dict[str, float] | None:
    """What --plan takes: shares of the card's printed rates, and a step over the roofline that they
    make. None where one wasn't measured, or of a tiny model."""
    reached, step = measured.get("rates", {}), measured.get("steps", {})
    if card is None or settings.quick or "memory_bandwidth" not in reached or "step_ms" not in step:
        return None
    peak = settings.job().peak_flops(card)
    shares = {"matmul": reached["matmul_flops"] / peak,
              "attention": reached["attention_flops"] / peak,
              "memory": reached["memory_bandwidth"] / card.memory_bandwidth}
    roofline = step_time.step(settings.job(), with_rates(card, **shares, step=1.0), 1,
                              settings.batch)
    return shares | {"step": step["step_ms"] / 1e3 / sum(roofline.values())}


def note_on_versions(machine: Machine) -> str:
    """What is to be said of launches; "" where they are counted with the same torch."""
    if machine.torch.partition("+")[0] == venv.TORCH:
        return ""
    return (f"launches were counted with torch {venv.TORCH}; with {machine.torch} a run without "
            "torch.compile launches the same, give or take PyTorch's own")


def write(
    path: Path, machine: Machine, card: Card | None, settings: Settings,
    lines: list[Row], measured: dict[str, dict[str, Any]],
) -> None:
    """gpu_report.json. card: of kernels/cards.py, if it is there."""
    content = {
        "machine": asdict(machine), "card": card.key if card else "", "settings": asdict(settings),
        "rates": rates(card, settings, measured),
        "table": [row._asdict() | {"ratio": row.ratio} for row in lines],
        "faults": faults(measured), "measured": measured,
    }
    atomic_write(path, json.dumps(content, indent=1) + "\n")
