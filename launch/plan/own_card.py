"""A GPU that kernels/cards.py doesn't know, as its owner describes it, or one that was measured.

    python train_gpt2.py gpt2-124m --plan 2x --plan_card mine.json
    python train_gpt2.py gpt2-124m --plan 8x --plan_card gpu_report.json    # of make gpu-check

A description is a JSON object with the fields that Card has in kernels/cards.py, in FLOP/s, bytes
and bytes/s as its data sheet prints them, without sparsity. A GeForce RTX 3090:

    {"bf16_flops": 71e12, "fp32_flops": 35.6e12, "memory_bytes": 24e9, "memory_bandwidth": 936e9,
     "sms": 82}

"link_bandwidth" and "network_bandwidth" may follow, each per GPU and direction; without them it is
PCIe 4 and 10 Gb/s. So may "arch" ("sm_75": no bf16), and "key", the name that is printed.

A report has the card's name and, under "rates", the shares of its printed rates that it reached
and how much longer a step took than these alone would have it (tests/gpucheck). They then stand in
place of what step_time.py and report.py assume.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kernels.cards import CARDS, ETHERNET_10G, PCIE4, Card
from launch.errors import BadInput

NEEDED = ("bf16_flops", "fp32_flops", "memory_bytes", "memory_bandwidth", "sms")
LINKS = {"link_bandwidth": PCIE4, "network_bandwidth": ETHERNET_10G}
TEXTS = ("key", "arch")
LARGEST = 1e18  # of any of these numbers; it also keeps out infinity
RATES = ("matmul", "attention", "memory", "step")  # of a report
LARGEST_RATE = 100.0


@dataclass(frozen=True)
class MeasuredCard(Card):
    """A card with what `make gpu-check` has measured on one."""

    matmul_rate: float  # the share of bf16_flops that a large product reached
    attention_rate: float  # and attention, forward and backward
    memory_rate: float  # of memory_bandwidth, in a copy
    over_roofline: float  # a step of gpt2-124m over what --plan computes with these rates


def read_card(path: Path) -> Card:
    """The card in a file. Raises BadInput that names what is missing or wrong."""
    content = _read(path)
    if "machine" in content and "measured" in content:
        return measured_card(content, path)
    unknown = content.keys() - {*NEEDED, *LINKS, *TEXTS}
    if unknown:
        raise BadInput(f"{path}: a card has no {', '.join(sorted(unknown))}; it has "
                       f"{', '.join([*NEEDED, *LINKS, *TEXTS])}")
    missing = [name for name in NEEDED if name not in content]
    if missing:
        raise BadInput(f"{path} lacks {', '.join(missing)}: see the card's data sheet")
    numbers = {name: content.get(name, default) for name, default in LINKS.items()}
    numbers |= {name: content[name] for name in NEEDED}
    for name, value in numbers.items():
        usable = isinstance(value, int | float) and not isinstance(value, bool)
        if not (usable and 0 < value < LARGEST):
            raise BadInput(f"{path}: {name} is {value!r}: expected a number above 0, in plain "
                           "FLOP/s, bytes or bytes/s")
    # What a plan doesn't look at (caches, registers, the clock) is left as another card has it.
    return replace(
        CARDS["3090"],
        names=(),
        key=str(content.get("key", path.stem)),
        arch=str(content.get("arch", "unknown")),
        link="its link" if "link_bandwidth" in content else "PCIe 4",
        **numbers,
    )


def measured_card(report: dict[str, Any], path: Path) -> MeasuredCard:
    """The card of a gpu_report.json. Raises BadInput where it has no rates."""
    card, rates = CARDS.get(report.get("card", "")), report.get("rates")
    if card is None:
        raise BadInput(f"{path} was measured on a GPU that kernels/cards.py doesn't know, so it "
                       "has no shares of its data sheet's rates: describe the card in a file")
    if not rates:
        raise BadInput(f"{path} holds no rates: they come of the parts steps and rates, with the "
                       "whole model: make gpu-check")
    for name in RATES:
        value = rates.get(name)
        if not (isinstance(value, int | float) and 0 < value < LARGEST_RATE):
            raise BadInput(f"{path}: its rate {name} is {value!r}, expected a number above 0: make "
                           "gpu-check writes it anew")
    return with_rates(card, *(rates[name] for name in RATES))


def with_rates(
    card: Card, matmul: float, attention: float, memory: float, step: float
) -> MeasuredCard:
    """A card and what was measured on it."""
    own = {field.name: getattr(card, field.name) for field in fields(Card)}
    return MeasuredCard(**own, matmul_rate=matmul, attention_rate=attention, memory_rate=memory,
                        over_roofline=step)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())  # of bytes it skips a byte order mark
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"can't read {path}: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} describes no card: expected a JSON object")
    return content
