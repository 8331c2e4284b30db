"""In which order the tiles of causal attention are launched, and what that makes of a card's SMs.

    python -m kernels.schedule             # h100 and a100: both orders, at several batch sizes
    python -m kernels.schedule b200 4090

The last 128 of 1,024 queries see eight times the keys that the first 128 see, and a GPU starts
programs in the order of their numbers, each where room is first. Head after head, one that starts
among the last may be long, and most SMs wait for it. So the longest tiles come first: in groups of
heads, all heads' longest, then all second ones. Groups are as large as lets their keys and values
stay in the L2 cache, since all tiles of a head read them (so does FlashAttention-4's scheduler,
SingleTileLPTScheduler in Dao-AILab/flash-attention). No tile computes anything else for it: the
bits are the same.

The table is a model, and nothing in it was measured: programs that take time by the passes through
their loops are placed in their order (list scheduling), and the figure is how much longer that
takes than if their work could be spread evenly. It is an upper bound: where programs share an SM,
those that are left run faster.
"""

import argparse
import functools
import heapq
from collections.abc import Iterator

from kernels import tiles
from kernels.cards import CARDS, Card
from kernels.roofline import GPT2, passes

KERNELS = ("attention_forward", "attention_dq", "attention_dkdv")
# How many programs an SM holds at once: what kernels/audit.py finds for most tiles that ship.
CTAS = 2
# Loading its own tile and writing the result cost a program about one pass of the loop.
START = 1


@functools.lru_cache
def heads_in_group(head_bytes: int, l2_bytes: int) -> int:
    """The most heads, a power of two, of which all keys and values fit into the L2 cache.

    head_bytes: of the keys and values of one head. 1 where not even those fit.
    """
    fit = max(1, l2_bytes // head_bytes)
    return 1 << (fit.bit_length() - 1)


def order(heads: int, tiles_of_head: int, group: int) -> Iterator[tuple[int, int]]:
    """(tile, head) of each program: what attention._place computes of a program's number.

    Tile 0 is the longest. A group of 1 is head after head.
    """
    for first in range(0, heads, group):
        last = min(first + group, heads)
        for tile in range(tiles_of_head):
            for head in range(first, last):
                yield tile, head


def over_balance(lengths: list[float], places: int) -> float:
    """By how much the last of these programs ends later than if places shared the work evenly.

    They begin in the order of the list, each in the place that is free first. 0.05: 5 % later.
    """
    free_at = [0.0] * places
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + length)
    return max(free_at) / (sum(lengths) / places) - 1


def of_launch(kernel: str, card: Card, B: int, group: int) -> float:
    """The same of one launch for B sequences of GPT-2 124M, with the tile that ships."""
    tile = tiles.pick(kernel, card.arch, GPT2.C // GPT2.H)
    programs = passes(kernel, GPT2.T, tile.m, tile.n)
    longest_first = sorted((START + whole + masked for whole, masked in programs), reverse=True)
    placed = order(B * GPT2.H, len(longest_first), group)
    return over_balance([longest_first[tile] for tile, _ in placed], CTAS * card.sms)


def table(cards: list[str]) -> str:
    """A line for each kernel, card and batch size."""
    lines = [f"{'kernel':18} {'card':6} {'B':>3} {'programs':>8} {'SMs':>4} {'group':>5} "
             f"{'head after head':>16} {'longest first':>14}"]
    for kernel in KERNELS:
        for key in cards:
            card = CARDS[key]
            D = GPT2.C // GPT2.H
            group = heads_in_group(2 * GPT2.T * D * 2, card.l2_bytes)  # keys and values, bf16
            tile = tiles.pick(kernel, card.arch, D)
            rows = tile.n if kernel == "attention_dkdv" else tile.m
            for B in (64, 16, 8):
                one, grouped = (of_launch(kernel, card, B, heads) for heads in (1, group))
                lines.append(f"{kernel:18} {key:6} {B:3} {B * GPT2.H * GPT2.T // rows:8,} "
                             f"{card.sms:4} {group:5} {one:15.1%} {grouped:14.1%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    triton_cards = [key for key, card in CARDS.items() if card.has_bf16]
    parser.add_argument("cards", nargs="*", metavar="CARD", default=["h100", "a100"],
                        help=f"of {' '.join(triton_cards)}")
    args = parser.parse_args()
    for key in args.cards:
        if key not in triton_cards:
            parser.error(f"no card {key!r}: one of {' '.join(triton_cards)}")
    print("GPT-2 124M, T = 1,024: time over that of evenly spread work, in a model")
    print(table(args.cards))


if __name__ == "__main__":
    main()
