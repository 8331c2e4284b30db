"""The plan as it is printed: memory, traffic, step time, speed, hours and cost of a run."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kernels.cards import CARDS, Card
from launch.errors import BadInput
from launch.files import human_size
from launch.plan import muon, step_time
from launch.plan.job import NODE, Job, parse_cluster, sequences_per_gpu
from launch.plan.memory import largest_micro_batch, memory
from launch.plan.own_card import MeasuredCard, read_card

# What published runs took over what the roofline says (tests/test_launch_plan.py lists them): 1.04
# to 1.17 where the program is tuned, up to 1.61 where it isn't or evaluations are in the time.
TYPICAL = 1.1
SLOWEST = 1.65
VALIDATED = ("a100", "a100-40gb", "h100")  # cards with published runs, all on one node


def show(settings: Mapping, parameters: int, flops_per_token: int) -> int:
    """Prints the plan that a run's settings ask for. Returns the exit code."""
    job = Job.of(settings, parameters, flops_per_token)
    asked = settings["planning"]
    if os.environ.get("RANK", "0") == "0":
        own = read_card(Path(asked["plan_card"])) if asked["plan_card"] else None
        print(report(job, asked["plan"], asked["plan_price"], own))
    return 0


def report(job: Job, text: str, price: float = 0.0, own: Card | None = None) -> str:
    """The whole plan of a run on COUNTxGPU, for a terminal. price: dollars a GPU-hour, 0: unknown.
    own: the card of --plan_card, where the text is only a count.

    Raises BadInput for a GPU or a count that is none, and for a run that doesn't fit.
    """
    gpus, card = parse_cluster(text, own)
    job = job.on(card)
    B, largest = choose_micro_batch(job, gpus, card, text)
    parts = step_time.step(job, card, gpus, B)
    slow_parts = step_time.step(job, card, gpus, B, step_time.NETWORK / 2)
    least, typical, slowest = over_roofline(card)
    low = least * sum(parts.values())
    high = slowest * sum(slow_parts.values())
    return "\n".join([
        describe_cluster(job, gpus, card),
        *describe_run(job),
        *describe_memory(job, gpus, card, B, largest),
        describe_traffic(job, gpus, card, B),
        *describe_step(parts, low, high, typical, card),
        describe_speed(job, gpus, card, low, high),
        *describe_cost(job, gpus, low, high, price),
        *describe_assumptions(gpus, card),
    ])


def over_roofline(card: Card) -> tuple[float, float, float]:
    """How much longer a step takes than the roofline's: at least, typically, at most."""
    if isinstance(card, MeasuredCard):
        return card.over_roofline, card.over_roofline, card.over_roofline
    return 1.0, TYPICAL, SLOWEST


def choose_micro_batch(job: Job, gpus: int, card: Card, text: str) -> tuple[int, int]:
    """(the micro-batch to take, the largest that fits). BadInput where not one sequence does."""
    largest = largest_micro_batch(job, card, gpus)
    if largest == 0:
        raise BadInput(does_not_fit(job, gpus, card, text))
    sequences = sequences_per_gpu(job, gpus)
    wanted = min(largest, job.micro_batch)
    B = max(b for b in range(1, wanted + 1) if sequences % b == 0)
    return B, largest


def does_not_fit(job: Job, gpus: int, card: Card, text: str) -> str:
    """What is missing, and what would fit: another mode, or another card."""
    needed = sum(memory(job, gpus, 1).values())
    modes = {
        "--parallel zero1": replace(job, parallel="zero1"),
        "--parallel fsdp": replace(job, parallel="fsdp"),
        "--activation_checkpointing True": replace(job, checkpointing=True),
    }
    ways = [flag for flag, other in modes.items() if largest_micro_batch(other, card, gpus)]
    larger = [other for other in CARDS.values() if other.memory_bytes >= needed]
    larger.sort(key=lambda other: other.memory_bytes)
    ways += [f"{gpus}x{other.key}" for other in larger[:2]]
    missing = needed - card.memory_bytes
    return (f"{text}: one sequence needs {gib(needed)}, {gib(missing)} more than a {card.key} has; "
            f"what fits: {' or '.join(ways) or 'nothing'}")


def gib(size: float) -> str:
    return human_size(size, base=1024)


# ---- the report, a section each ----

def describe_cluster(job: Job, gpus: int, card: Card) -> str:
    return (f"plan for {gpus} x {card.key}: {card.memory_bytes / 1e9:.0f} GB, "
            f"{job.peak_flops(card) / 1e12:.0f} TFLOP/s, "
            f"{card.memory_bandwidth / 1e9:,.0f} GB/s each")


def describe_run(job: Job) -> list[str]:
    tokens = job.steps * job.batch_tokens
    sent = ", gradients sent in bf16" * (job.reduce_dtype == "bf16")
    return [
        f"model      {job.parameters:,} parameters, {job.flops_per_token / 1e6:,.0f} MFLOP a token",
        f"run        {job.steps:,} steps x {job.batch_tokens:,} tokens = {tokens:,} "
        f"tokens, {job.dtype}, {job.parallel}{sent}",
    ]


def describe_memory(job: Job, gpus: int, card: Card, B: int, largest: int) -> list[str]:
    parts = memory(job, gpus, B)
    sequences = sequences_per_gpu(job, gpus)
    lines = [
        f"memory     {gib(sum(parts.values()))} of {gib(card.memory_bytes)} at micro-batch {B} "
        f"({sequences // B} micro-steps); the largest that fits: {largest} of {sequences}"
    ]
    for part, size in parts.items():
        lines.append(f"  {part:<46}{gib(size):>12}")
    return lines


def describe_traffic(job: Job, gpus: int, card: Card, B: int) -> str:
    micro_steps = sequences_per_gpu(job, gpus) // B
    link, network = step_time.traffic(job, gpus, micro_steps)
    if job.optimizer == "muon":
        more_link, more_network = muon.traffic(job, gpus)
        link, network = link + more_link, network + more_network
    return (f"traffic    a GPU sends {human_size(link)} over {card.link} and "
            f"{human_size(network)} over the network a step")


def describe_step(
    parts: dict[str, float], low: float, high: float, typical: float, card: Card
) -> list[str]:
    seconds = typical * sum(parts.values())
    whose = "where the software is as good as the best published"
    if isinstance(card, MeasuredCard):
        whose = "as measured on one GPU"
    lines = [
        f"step       {low * 1e3:,.0f} to {high * 1e3:,.0f} ms; about {seconds * 1e3:,.0f} "
        f"{whose}; at the roofline:"
    ]
    for part, seconds in parts.items():
        lines.append(f"  {part:<46}{seconds * 1e3:>9,.1f} ms")
    return lines


def describe_speed(job: Job, gpus: int, card: Card, low: float, high: float) -> str:
    tokens = job.batch_tokens
    best_flops = gpus * job.peak_flops(card)
    worst, best = (job.flops_per_token * tokens / s / best_flops for s in (high, low))
    return (f"speed      {tokens / high:,.0f} to {tokens / low:,.0f} tokens/s, "
            f"MFU {worst:.0%} to {best:.0%}")


def describe_cost(job: Job, gpus: int, low: float, high: float, price: float) -> list[str]:
    gpu_hours = [gpus * job.steps / 3600 * seconds for seconds in (low, high)]
    digits = ".1f" if gpu_hours[0] >= 0.1 else ".1g"
    cost = (f"{gpu_hours[0]:,{digits}} to {gpu_hours[1]:,{digits}} GPU-hours "
            "(--plan_price 2.5 makes dollars of them)")
    if price:
        cost = (f"${gpu_hours[0] * price:,.2f} to ${gpu_hours[1] * price:,.2f} "
                f"at ${price:g} per GPU-hour")
    return [
        f"time       {duration(job.steps * low, job.steps * high)}, evaluations not included",
        f"cost       {cost}",
    ]


def duration(low: float, high: float) -> str:
    """A range of seconds, in the largest unit of which there is one."""
    unit, seconds = "seconds", 1
    if high >= 3600:
        unit, seconds = "hours", 3600
    elif high >= 60:
        unit, seconds = "minutes", 60
    return f"{low / seconds:,.2f} to {high / seconds:,.2f} {unit}"


def describe_assumptions(gpus: int, card: Card) -> list[str]:
    rates = (f"{step_time.matmul_rate(card):.0%} of the peak, "
             f"attention at {step_time.attention_rate(card):.0%}, "
             f"memory at {step_time.memory_rate(card):.0%}; {card.link} at "
             f"{step_time.link_rate(card):.0%} of {card.link_bandwidth / 1e9:g} GB/s")
    if isinstance(card, MeasuredCard):
        rates = f"measured   matrix products at {rates}, assumed"
        slow_end = (f"           a step of gpt2-124m took {card.over_roofline:.2f} times the "
                    "roofline of these rates")
    else:
        rates = f"assumed    matrix products at {rates}"
        slow_end = f"           slow end: x {SLOWEST}, the slowest published run of fourteen"
        if card.key not in VALIDATED:
            slow_end += f"; none of them was on a {card.key}"
    if gpus > NODE:
        rates += (f", network at {step_time.NETWORK:.0%} (slow end: half that) of "
                  f"{card.network_bandwidth / 1e9:g} GB/s a GPU, nodes of {NODE}")
        if not isinstance(card, MeasuredCard):
            slow_end += "; none was on several nodes"
    return [rates, slow_end]
