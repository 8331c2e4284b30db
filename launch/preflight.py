"""Before a paid run: is every machine fit for it?

    python -m launch.preflight --data fineweb10B      # this machine
    launch/torchrun.sh gpt2-124m --preflight True     # all ranks, against what this run needs

One line a check: ok, warn or fail, and what to do. Piped, or with --json, the last line is JSON.
Exit code 1 where anything failed. It takes seconds, plus the kernels' compilation on GPUs.
"""

import contextlib
import json
import os
import shutil
import statistics
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kernels import cards
from launch import cli, flags, probes
from launch.console import colour
from launch.errors import run_command
from launch.files import human_size
from launch.probes import MIB, SLOW, Line, Status
from launch.ranks import read_ranks
from launch.world import choose_device

ANSWER = timedelta(seconds=60)  # torch is imported and GPUs are awake well before that
PROBE = timedelta(seconds=300)  # for a rank's own probes: kernels compile, disks are slow
MESSAGE = 64 * MIB  # bytes all-reduced: past the size where latency counts on any link
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
SKEW = 1.0  # seconds; beyond that the logs of two nodes can't be read side by side


@dataclass(frozen=True)
class Needs:
    """What the run will ask for; the defaults ask for nothing."""

    data: Path | None = None
    """Folder of shards, or a text."""
    out_dir: Path = Path("runs")
    """Where checkpoints will be written."""
    checkpoint_bytes: int = 0
    """Size of one checkpoint."""
    keep: int = 3
    """Checkpoints kept."""
    head_width: int = 64
    """Width of an attention head, for the kernels' check."""
    wandb: str = "disabled"
    """online asks for a key."""
    json: bool = False
    """JSON as the last line also on a terminal."""

    def __post_init__(self) -> None:
        cli.within("checkpoint_bytes", self.checkpoint_bytes, 0, 10**18)
        cli.within("keep", self.keep, 1, cli.MOST_STEPS)
        cli.within("head_width", self.head_width, 1, 100_000)


def run(needs: Needs) -> int:
    """Checks every rank that torchrun started; rank 0 prints. Returns the exit code."""
    rank, size = read_ranks()
    if size == 1:
        return report({0: local_lines(needs, choose_device(), first=True)}, needs.json)
    store = open_store(rank)
    silent = missing(store, "here", rank, size, os.uname().nodename, ANSWER)
    if silent:
        return report({0: [no_answer(silent, size)]}, needs.json) if rank == 0 else 1
    device = choose_device()
    lines = local_lines(needs, device, first=os.environ.get("LOCAL_RANK", "0") == "0")
    lines += collective_lines(store, rank, size, device)
    mine = json.dumps([asdict(line) for line in lines])
    silent = missing(store, "lines", rank, size, mine, PROBE)
    if rank > 0:
        return told_by_rank0(store, rank)
    found: dict[int, list[Line]] = {}
    for other in range(size):
        if other not in silent:
            rows = json.loads(store.get(f"lines/{other}"))
            found[other] = [Line(**row) for row in rows]
    if silent:
        found[0].append(no_answer(silent, size))
    exit_code = report(found, needs.json)
    tell(store, exit_code, [other for other in found if other > 0])
    return exit_code


def tell(store: dist.Store, exit_code: int, ranks: list[int]) -> None:
    """Has all ranks leave with this code: on each node a script goes on, or not, by its own."""
    sys.stdout.flush()  # torchrun may end this rank as soon as another has left with a 1
    store.set("exit code", str(exit_code))
    with contextlib.suppress(dist.DistError):  # the store may be this rank's
        store.wait([f"told/{rank}" for rank in ranks], ANSWER)


def told_by_rank0(store: dist.Store, rank: int) -> int:
    """What tell() was given; 1 where rank 0 has gone without a word."""
    try:
        store.wait(["exit code"], ANSWER)
        exit_code = int(store.get("exit code"))
        store.set(f"told/{rank}", "")
    except dist.DistError:
        return 1
    return exit_code


def open_store(rank: int) -> dist.Store:
    """torchrun's key-value store. Unlike a process group it comes up with ranks missing."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False,
        is_master=rank == 0 and not agent, timeout=ANSWER,
    )


def missing(
    store: dist.Store, key: str, rank: int, size: int, value: str, patience: timedelta
) -> list[int]:
    """Leaves `value` in the store; rank 0 collects, and all learn which ranks did not answer."""
    store.set(f"{key}/{rank}", value)
    if rank > 0:
        try:
            store.wait([f"{key}/verdict"], 2 * patience)
        except dist.DistError:
            return [0]
        return json.loads(store.get(f"{key}/verdict"))
    deadline, silent = time.monotonic() + patience.total_seconds(), []
    for other in range(1, size):
        left = max(deadline - time.monotonic(), 0.01)
        try:
            store.wait([f"{key}/{other}"], timedelta(seconds=left))
        except dist.DistError:
            silent.append(other)
    store.set(f"{key}/verdict", json.dumps(silent))
    return silent


def no_answer(silent: list[int], size: int) -> Line:
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = sorted({rank // per_node for rank in silent})
    return Line("ranks", "fail", f"no answer from rank {', '.join(map(str, silent))} of {size}",
                f"look at node {', '.join(map(str, nodes))}: hung, or cut off from the others")


def local_lines(needs: Needs, device: torch.device, first: bool) -> list[Line]:
    """What one rank can say alone; the disks are looked at by the first rank of each node."""
    lines = probes.gpu(device) + probes.kernel_check(device, needs.head_width)
    lines.append(matmul_line(probes.matmul_flops(device), known_card(device)))
    if first:
        lines += probes.data_folder(needs.data)
        lines += probes.run_folder(needs.out_dir, needs.checkpoint_bytes, needs.keep)
        lines += probes.versions() + probes.open_files() + probes.wandb_login(needs.wandb)
    return lines


def known_card(device: torch.device) -> cards.Card | None:
    """The GPU's limits, where kernels/cards.py has them."""
    if device.type != "cuda":
        return None
    return cards.by_name(torch.cuda.get_device_name(device))


def matmul_line(flops: float, card: cards.Card | None) -> Line:
    """The speed of a matrix product against the card's own peak."""
    found = f"{flops / 1e12:.2f} TFLOP/s"
    if card is None:
        return Line("matrix product", "ok", found)
    share = flops / card.bf16_flops
    found += f", {share:.0%} of the card's peak"
    if share > 0.5:  # a bound chosen, not measured
        return Line("matrix product", "ok", found)
    return Line("matrix product", "warn", found, "look at clocks, power limit and other processes")


def collective_lines(store: dist.Store, rank: int, size: int, device: torch.device) -> list[Line]:
    """What takes all ranks: bandwidth, who is slow, clocks. Rank 0 gets the lines."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.PrefixStore("group", store),
                                rank=rank, world_size=size, timeout=ANSWER)
        bandwidth = all_reduce_rate(size, device)
        links = [neighbour_rate(rank, size, device, shift) for shift in (0, 1)]
        dist.barrier()
        mine = {"node": os.uname().nodename, "now": time.time(), "links": links,
                "flops": probes.matmul_flops(device), "torch": torch.__version__}
        everyone: list = [None] * size
        dist.all_gather_object(everyone, mine)
        dist.destroy_process_group()
    except (RuntimeError, dist.DistError) as error:  # gloo's and NCCL's; the ranks still report
        line = str(error).splitlines()[0]
        return [Line("all-reduce", "fail", line, "NCCL_DEBUG=INFO tells which link")]
    if rank > 0:
        return []
    return [bandwidth_line(bandwidth, everyone, device), *comparisons(everyone)]


def all_reduce_rate(size: int, device: torch.device) -> float:
    """bytes/s on the wire of each rank, best of five: a ring moves 2 (n - 1) / n of the message."""
    message = torch.ones(MESSAGE // 4, device=device)
    best = float("inf")
    for _ in range(6):
        dist.barrier()
        start = probes.clock()
        dist.all_reduce(message)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, probes.clock() - start)
        message.fill_(1)
    return MESSAGE * 2 * (size - 1) / size / best


def neighbour_rate(rank: int, size: int, device: torch.device, shift: int) -> tuple[int, float]:
    """(the other rank, bytes/s) where ranks exchange in pairs: 0-1 2-3 ..., shifted by one 1-2 3-4.

    A rank without a partner (an odd number of them, or the ends) gets itself and 0.
    """
    other = rank + 1 if (rank - shift) % 2 == 0 else rank - 1
    if not 0 <= other < size:
        if size % 2 or size == 2:
            dist.barrier()
            return rank, 0.0
        other = size - 1 if rank == 0 else 0  # the ring closes
    out, back = (torch.ones(MESSAGE // 16, device=device) for _ in range(2))
    dist.barrier()
    best = float("inf")
    for _ in range(3):
        start = probes.clock()
        pair = [dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, back, other)]
        for work in dist.batch_isend_irecv(pair):
            work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, probes.clock() - start)
    return other, MESSAGE / 4 / best


def bandwidth_line(rate: float, everyone: list[dict], device: torch.device) -> Line:
    """All-reduce against the slowest link on its way."""
    found = f"{human_size(rate)}/s a rank, {len(everyone)} ranks"
    card = known_card(device)
    if card is None:
        return Line("all-reduce", "ok", found + ", no limit known to compare with")
    limit, link = card.link_bandwidth, card.link
    nodes = {one["node"] for one in everyone}
    if len(nodes) > 1:
        limit, link = card.network_bandwidth, "the network"  # a default: clusters differ
    found += f", {rate / limit:.0%} of {human_size(limit)}/s ({link})"
    if rate > limit / 2:  # a bound chosen, not measured
        return Line("all-reduce", "ok", found)
    return Line("all-reduce", "warn", found, "NCCL_DEBUG=INFO tells the transport: NET/Socket "
                "between nodes means no InfiniBand, SHM inside one means no NVLink")


def comparisons(everyone: list[dict]) -> list[Line]:
    """Ranks and nodes against one another: speed, links, clocks, versions."""
    names = [f"rank {rank} ({one['node']})" for rank, one in enumerate(everyone)]
    return [
        speed_line(everyone, names),
        links_line(everyone, names),
        skew_line(everyone),
        torch_line(everyone),
    ]


def speed_line(everyone: list[dict], names: list[str]) -> Line:
    """Who multiplies matrices more slowly than the rest."""
    usual = statistics.median(one["flops"] for one in everyone)
    slow = []
    for name, one in zip(names, everyone, strict=True):
        if one["flops"] < SLOW * usual:
            slow.append(name)
    if slow:
        return Line("speed of ranks", "warn", f"slow: {', '.join(slow)}",
                    "leave that node out, or find what else it does")
    return Line("speed of ranks", "ok", "alike")


def links_line(everyone: list[dict], names: list[str]) -> Line:
    """Which rank inside a node, and which node, is slow on all its links."""
    inside, between = [], []
    for rank, one in enumerate(everyone):
        for other, rate in one["links"]:
            if other <= rank:  # the other end has said it
                continue
            if everyone[other]["node"] == one["node"]:
                inside.append((names[rank], names[other], rate))
            else:
                between.append((one["node"], everyone[other]["node"], rate))
    slow = probes.slow_ones(inside) + probes.slow_ones(between)
    if slow:
        return Line("links", "warn", f"slow: {', '.join(slow)}",
                    "leave it out, or look at its cable and network card")
    return Line("links", "ok", "none stands out")


def skew_line(everyone: list[dict]) -> Line:
    """How far the nodes' clocks are apart, as seen right after a barrier."""
    now = [one["now"] for one in everyone]
    skew = max(now) - min(now)
    if skew > SKEW:
        return Line("clock skew", "warn", f"{skew:.3f} s", "set the clocks by NTP (chrony)")
    return Line("clock skew", "ok", f"{skew:.3f} s")


def torch_line(everyone: list[dict]) -> Line:
    """Whether all ranks run the same PyTorch."""
    versions = sorted({one["torch"] for one in everyone})
    if len(versions) > 1:
        return Line("same torch", "fail", ", ".join(versions),
                    "install one version on every node")
    return Line("same torch", "ok", versions[0])


def report(found: dict[int, list[Line]], as_json: bool = False) -> int:
    """Prints each check once, its trouble rank by rank, and where nobody watches, or as_json, the
    whole as JSON. 1 if any failed."""
    checks: dict[str, list[tuple[int, Line]]] = defaultdict(list)
    for rank, lines in found.items():
        for line in lines:
            checks[line.check].append((rank, line))
    rows = []
    for check, all_of_it in checks.items():
        trouble = [(rank, line) for rank, line in all_of_it if line.status != "ok"]
        for rank, line in trouble or all_of_it[:1]:
            rows.append({"rank": rank, **asdict(line)})
            text = line.found
            if trouble and len(found) > 1:
                text = f"rank {rank}: {text}"
            if line.advice:
                text += f" -> {line.advice}"
            print(table_row(line.status, check, text))
    failed = [row["check"] for row in rows if row["status"] == "fail"]
    if sys.stdout.isatty():
        print(colour(f"not fit: {', '.join(failed)}", "red") if failed else colour("fit", "green"))
    if as_json or not sys.stdout.isatty():
        print(json.dumps({"fit": not failed, "ranks": len(found), "checks": rows}), flush=True)
    return int(bool(failed))


def table_row(status: Status, check: str, text: str) -> str:
    """A check's line; on a terminal in colour, and broken so that its columns stay in place."""
    start = f"{colour(f'{status:<5}', COLOURS[status])} {check:<15} "
    if not sys.stdout.isatty():
        return start + text
    indent = 22  # 5 and 15, and a blank after each
    width = max(shutil.get_terminal_size().columns - indent, 30)
    return start + f"\n{'':{indent}}".join(textwrap.wrap(text, width, break_on_hyphens=False))


def of_run(settings: Mapping, parameters: int) -> int:
    """Checks all ranks against what a run with these settings will need. Returns the exit code."""
    data, model = settings["data"], settings["model"]
    source = data["chat"] or data["text"] or data["dir"]
    return run(Needs(
        data=Path(source) if source else None, out_dir=Path(settings["out_dir"]),
        checkpoint_bytes=12 * parameters,  # weights and two moments in fp32
        keep=settings["saving"]["keep"] + settings["saving"]["keep_best"],
        head_width=model["n_embd"] // model["n_head"],
        wandb=settings["tracker"]["wandb"],
    ))


def main() -> int:
    """The machine alone, or under torchrun every machine."""
    return run(flags.parse(Needs))


if __name__ == "__main__":
    run_command(main)
