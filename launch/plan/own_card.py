"""A GPU that kernels/cards.py doesn't know, as its owner describes it.

    python train_gpt2.py gpt2-124m --plan 2x --plan_card mine.json

The file is a JSON object with the fields that Card has in kernels/cards.py, in FLOP/s, bytes and
bytes/s as its data sheet prints them, without sparsity. A GeForce RTX 3090:

    {"bf16_flops": 71e12, "fp32_flops": 35.6e12, "memory_bytes": 24e9, "memory_bandwidth": 936e9,
     "sms": 82}

"link_bandwidth" and "network_bandwidth" may follow, each per GPU and direction; without them it is
PCIe 4 and 10 Gb/s. So may "arch" ("sm_75": no bf16), and "key", the name that is printed.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from kernels.cards import CARDS, ETHERNET_10G, PCIE4, Card
from launch.errors import BadInput

NEEDED = ("bf16_flops", "fp32_flops", "memory_bytes", "memory_bandwidth", "sms")
LINKS = {"link_bandwidth": PCIE4, "network_bandwidth": ETHERNET_10G}
TEXTS = ("key", "arch")
LARGEST = 1e18  # of any of these numbers; it also keeps out infinity


def read_card(path: Path) -> Card:
    """The card in a file. Raises BadInput that names what is missing or wrong."""
    content = _read(path)
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


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())  # of bytes it skips a byte order mark
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"can't read {path}: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} describes no card: expected a JSON object")
    return content
