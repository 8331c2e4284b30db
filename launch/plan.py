"""What a run will need and cost on GPUs, before anyone pays for them: arithmetic alone.

    python train_gpt2.py gpt2-124m --plan 8xh100 --plan_price 2.5

It prints the memory of a GPU by part and the largest micro-batch that fits, the bytes on each link,
and step time, tokens/s, hours and cost as a range with the assumptions beside it. Memory is counted
tensor by tensor (tests/test_launch_plan.py holds it to what this program allocates); time is a
roofline, compared there with published runs of other programs: no GPU has timed this one.

Shapes: B micro-batch, T time, N = B * T tokens, C width, H heads, L blocks, V vocabulary padded.
"""

import difflib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kernels.cards import CARDS, MIB, Card
from kernels.roofline import Shape, work
from launch.errors import BadInput

NODE = 8  # GPUs joined by the card's own link; DGX and HGX nodes, and the usual rented machine
MOST_GPUS = 1024

# ---- memory ----
# Peak reserved over peak allocated by PyTorch's caching allocator in nine runs of GPT-2 (124M to
# 1558M, eager, compiled, FSDP2) on a stand-in for an H100, which allocates and computes nothing:
# 1.02 to 1.19, median 1.07.
FRAGMENTATION = 0.07
CONTEXT = 600 * MIB  # assumed: CUDA context and loaded kernels, cuBLAS's workspace (32 MiB, Hopper)
NCCL = 400 * MIB  # assumed: its buffers, where there is more than one GPU
LOGITS = 2**28  # held at once by the Triton loss: kernels/cross_entropy.py, CHUNK_ELEMENTS
LOGITS_TORCH = 2**25  # by the reference: kernels/reference.py, CHUNK_ELEMENTS

# ---- rates, as a fraction of what kernels/cards.py says ----
# Matrix products: the best that was measured in bf16 over many shapes (github.com/stas00/
# ml-engineering, compute/accelerator, "Maximum Achievable Matmul FLOPS": A100 271.2, H100 794.5,
# B200 1745, MI300X 781.9 TFLOP/s). Not measured there and assumed as on A100: the other cards.
MATMUL = {"sm_80": 0.869, "sm_90": 0.803, "sm_100": 0.776, "gfx942": 0.601}
MATMUL_ASSUMED = 0.85
# Attention, forward and backward, counting the causal half: FlashAttention-2's own charts at head
# width 64 and T = 1024 (github.com/Dao-AILab/flash-attention, assets): A100 119, H100 192 TFLOP/s.
ATTENTION = {"sm_80": 0.38, "sm_90": 0.19}
ATTENTION_ASSUMED = 0.19  # the lower of the two, where nobody published one
MEMORY = 0.867  # a copy on H100: 2,903 of 3,350 GB/s (github.com/aigatech/vpbenchmarking)
# NCCL's bus bandwidth: all-reduce of 8 A100 moves 230 to 250 of 300 GB/s, of 8 H100 460 to 480 of
# 450 with the switch's help (docs.alayanew.com, "NCCL-tests in practice"), while a pair of H100
# copies at 380 (github.com/NVIDIA/nccl, issue 1264): the lower. On PCIe, where consumer cards reach
# each other through the host's memory, and between nodes: assumed.
LINK, LINK_PCIE, NETWORK = 0.78, 0.4, 0.7
# A launch from Python: assumed. 735 were counted in a step of 124M without compile: 61 a block.
LAUNCH, LAUNCHES = 5e-6, 61
# What published runs took over what the roofline says (tests/test_launch_plan.py lists them): 1.04
# to 1.17 where the program is tuned, up to 1.61 where it isn't or evaluations are in the time.
TYPICAL, SLOWEST = 1.1, 1.65
VALIDATED = ("a100", "a100-40gb", "h100")  # cards with published runs, all on one node


@dataclass(frozen=True)
class PlanConfig:
    """What to find out before a run is paid for; the run itself then doesn't start."""

    plan: str = ""
    """COUNTxGPU, as in 8xh100: print what the run needs and costs there, and exit."""
    plan_price: float = 0.0
    """Dollars per GPU-hour, for --plan; 0: not known."""
    preflight: bool = False
    """Check these machines against what the run will need (launch/preflight.py), and exit."""


@dataclass(frozen=True)
class Job:
    """The numbers of a run that its cost depends on. BadInput for a dtype that no GPU trains in."""

    n_layer: int
    n_head: int
    n_embd: int
    n_ctx: int
    n_vocab: int  # true, without padding rows
    parameters: int  # without padding rows
    flops_per_token: int  # as the MFU counts them
    batch_tokens: int
    micro_batch: int  # at most
    steps: int
    dtype: str = "bf16"  # bf16, fp16 or fp32
    parallel: Literal["ddp", "zero1", "fsdp"] = "ddp"
    checkpointing: bool = False  # blocks computed again in the backward pass
    compile: bool = True
    kernels: str = "auto"  # auto, triton or torch
    gelu: str = "tanh"  # or exact: the same bytes and about the same time

    @classmethod
    def of(cls, settings: Mapping, parameters: int, flops_per_token: int) -> "Job":
        """From a run's settings, as config.json has them."""
        compute = settings["compute"]
        return cls(
            **settings["model"], parameters=parameters, flops_per_token=flops_per_token,
            **{key: settings[key] for key in ("batch_tokens", "micro_batch", "steps")},
            dtype="bf16" if compute["dtype"] == "auto" else compute["dtype"],
            parallel=compute["parallel"], kernels=compute["kernels"],
            checkpointing=compute["activation_checkpointing"],
            compile=compute["compile"] is not False,
        )

    def __post_init__(self) -> None:
        if self.dtype not in ("bf16", "fp16", "fp32"):
            raise BadInput(f"--plan knows bf16, fp16 and fp32, not {self.dtype}")

    @property
    def width(self) -> int:
        """Bytes of a number in what the matrix products take."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def fused(self) -> bool:
        """Whether the Triton kernels compute it: all cards listed can run them."""
        return self.kernels != "torch" and self.n_embd // self.n_head in (64, 128)

    @property
    def padded_vocab(self) -> int:
        return -(-self.n_vocab // 128) * 128

    @property
    def embeddings(self) -> int:
        """Numbers in both embeddings."""
        return (self.padded_vocab + self.n_ctx) * self.n_embd

    @property
    def stored(self) -> int:
        """Parameters with padding rows."""
        return self.parameters + (self.padded_vocab - self.n_vocab) * self.n_embd


def cluster(text: str) -> tuple[int, Card]:
    """How many of which GPU: "8xh100". Raises BadInput with the nearest that there is."""
    match = re.fullmatch(r"(?:(-?\d+)\s*x\s*)?([a-z0-9-]+)", text.strip().lower())
    known = f"there are {', '.join(CARDS)}"
    if not match:
        raise BadInput(f"--plan {text}: expected COUNTxGPU as in 8xh100; {known}")
    count, key = int(match[1] or 1), match[2]
    if key not in CARDS:
        close = difflib.get_close_matches(key, CARDS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise BadInput(f"--plan {text}: no GPU is called {key!r}: {hint}{known}")
    if not 1 <= count <= MOST_GPUS:
        raise BadInput(f"--plan {text}: 1 to {MOST_GPUS:,} GPUs, not {count:,}")
    if count > NODE and (rest := count % NODE):
        near = f"{count - rest} or {count - rest + NODE}"
        raise BadInput(f"--plan {text}: beyond one node GPUs come in nodes of {NODE}: {near}")
    return count, CARDS[key]


def share(job: Job, gpus: int) -> int:
    """Sequences of a step for each GPU. Raises BadInput where they can't be shared out."""
    sequences, rest = divmod(job.batch_tokens, job.n_ctx)
    if rest or sequences % gpus:
        counts = [n for n in range(1, MOST_GPUS + 1)
                  if sequences % n == 0 and (n <= NODE or n % NODE == 0)]
        near = sorted(counts, key=lambda n: abs(math.log(n / gpus)))[:2]
        whole = max(1, round(sequences / gpus)) * gpus * job.n_ctx
        raise BadInput(f"{job.batch_tokens:,} tokens a step are {sequences:,} sequences of "
                       f"{job.n_ctx:,}, which {gpus} GPUs can't share equally: --batch_tokens "
                       f"{whole}, or {' or '.join(map(str, sorted(near)))} GPUs")
    return sequences // gpus


def activations(job: Job, B: int) -> float:
    """Bytes that the blocks keep for their backward pass.

    One block: two sums of the residual stream (fp32); two LayerNorms' outputs, q, k, v, attention's
    output, the MLP's 4C before and after GELU; attention's log-sum-exp; means and deviations. And
    its weights as the products take them, which FSDP has anyway. Compiled blocks keep the same.
    With checkpointing this is an upper bound: what is computed again isn't there during the loss.
    """
    C, H, N, e = job.n_embd, job.n_head, B * job.n_ctx, job.width
    block = N * (8 * C + 14 * C * e + 4 * H + 16)
    casts = 0 if e == 4 or job.parallel == "fsdp" else 12 * C * C * e
    if job.checkpointing:  # each keeps its two inputs; the one being computed again, everything
        return job.n_layer * (N * (4 + e) * C + casts) + block
    return job.n_layer * (block + casts)


def moments(job: Job, B: int) -> dict[str, float]:
    """Bytes beside all that the blocks keep, at each moment of a step that may be its peak."""
    C, V, N, e = job.n_embd, job.padded_vocab, B * job.n_ctx, job.width
    head = 4 * V * C  # the embedding's fp32 gradient, which the loss makes in its forward pass
    last = N * ((8 if job.fused else 4 + e) * C + 8) + head  # last LayerNorm's input, dh, dW
    chunk = V * C * e  # the embedding as cast
    if job.fused:  # logits, in whole tiles of 128 rows
        chunk += e * min(LOGITS + 127 * V, N * V)
    else:  # logits with their fp32 copy and its softmax, later with their share of dW
        logits = min(LOGITS_TORCH, N * V)
        chunk += max((e + 8) * logits, e * (logits + V * C))
    return {
        "loss": last + chunk + N * C * e,
        "loss backward": last + max(N * C * (4 + e), N * C * e + head),  # both gradients, scaled
        # the stream's gradient, a branch's, two of the MLP's 4C; the gradient of its weight
        "block backward": head + N * C * (4 + 5 * e) + 4 * C * C * e,
        # the tied embedding's two gradients and their sum, when the blocks have let go of theirs
        "embedding backward": 3 * head - activations(job, B),
    }


def memory(job: Job, gpus: int, B: int) -> dict[str, float]:
    """Bytes of one GPU at the worst moment of a step, by part."""
    C, e, held = job.n_embd, job.width, min(gpus, NODE) if job.parallel == "fsdp" else 1
    parts = {
        "weights (fp32)": 4.0 * job.stored / held,
        "gradients (fp32; DDP's buckets are the same)": 4.0 * job.stored / held,
        "optimizer (two moments)": 8.0 * job.stored / (gpus if job.parallel == "zero1" else held),
        "activations": activations(job, B),
        "loss and workspace": max(moments(job, B).values()),
    }
    if job.parallel == "fsdp":  # fp32 embeddings; two blocks, and their gradients to be scattered
        parts["weights gathered"] = 4.0 * job.embeddings + 2 * 12.0 * C * C * (e + 4)
        if share(job, gpus) > B:  # gradients that wait for the last micro-step are whole
            parts["gradients not scattered yet"] = 4.0 * job.stored
    parts["fragmentation (7 %)"] = FRAGMENTATION * sum(parts.values())
    parts["CUDA, cuBLAS, NCCL"] = CONTEXT + (NCCL if gpus > 1 else 0)
    return parts


def largest_micro_batch(job: Job, card: Card, gpus: int) -> int:
    """The largest divisor of a GPU's share whose memory fits; 0: not even one sequence does."""
    n = share(job, gpus)
    fits = (B for B in range(1, n + 1) if n % B == 0
            and sum(memory(job, gpus, B).values()) <= card.memory_bytes)
    return max(fits, default=0)


def traffic(job: Job, gpus: int, micro_steps: int) -> tuple[float, float]:
    """Bytes that each GPU sends in a step, over the node's link and over the network.

    Collectives go in rings: first inside the nodes, then between GPUs of the same place in each,
    which have an eighth of it to send. DDP averages fp32 gradients once a step (two passes of the
    ring: reduce-scatter, all-gather); ZeRO-1 then sends the new fp32 weights (one pass). FSDP's
    shards stay inside a node: it gathers blocks twice and embeddings once a micro-step, scatters
    fp32 gradients once a step, and averages them between nodes.
    """
    inside, nodes = min(gpus, NODE), max(1, gpus // NODE)
    link = network = {"ddp": 8.0, "zero1": 12.0, "fsdp": 8.0}[job.parallel] * job.stored
    if job.parallel == "fsdp":
        blocks = job.stored - job.embeddings
        link = 4.0 * job.stored + micro_steps * (2.0 * job.width * blocks + 4 * job.embeddings)
    return link * (inside - 1) / inside, network / inside * (nodes - 1) / nodes


def matmul(m: int, n: int, k: int, job: Job, card: Card) -> float:
    """Seconds of an (m, k) x (k, n) product: the tensor cores' time or the memory's."""
    # The last wave of 128 x 128 tiles leaves SMs idle. Few tiles: the libraries split k instead.
    waves = -(-m // 128) * -(-n // 128) / card.sms
    idle = math.ceil(waves) / waves if waves > 1 else 1.0
    peak = card.fp32_flops if job.dtype == "fp32" else card.bf16_flops
    flops = 2.0 * m * n * k / (peak * MATMUL.get(card.arch, MATMUL_ASSUMED)) * idle
    size = job.width * (m * k + k * n + m * n)
    return max(flops, size / (card.memory_bandwidth * MEMORY))


def micro_step(job: Job, card: Card, B: int) -> dict[str, float]:
    """Seconds of one forward and backward pass of B sequences, by part."""
    L, C, T, V, N = job.n_layer, job.n_embd, job.n_ctx, job.padded_vocab, B * job.n_ctx
    shape = Shape(B, T, C, job.n_head, V)
    e = job.width / 2  # what follows counts 2 bytes (LayerNorm's stream is fp32)

    def products(inputs: int, outputs: int) -> tuple[float, float]:
        forward = matmul(N, outputs, inputs, job, card)
        return forward, matmul(N, inputs, outputs, job, card) + matmul(
            outputs, inputs, N, job, card)

    sides = [products(C, 3 * C), products(C, C), products(C, 4 * C), products(4 * C, C)]
    again = 2 if job.checkpointing else 1  # forward passes of a block
    block = again * sum(side[0] for side in sides) + sum(side[1] for side in sides)
    peak = card.fp32_flops if job.dtype == "fp32" else card.bf16_flops
    attention = (again * 2 + 5) * N * T * C / (
        peak * ATTENTION.get(card.arch, ATTENTION_ASSUMED))  # causal: 2 and 5 products of T x T / 2
    forward, backward = (work(f"layer_norm_{way}", shape).bytes for way in ("forward", "backward"))
    if not (job.fused or job.compile):  # sum, normalisation and casts apart, each there and back
        forward, backward = N * C * 24.0, N * C * 36.0
    norms = (2 * L + 1) * (again * forward + backward)
    # GELU of 4C: two passes forward, three backward; biases' gradients read 9C together
    pointwise = L * N * C * (again * 16 + 24 + 18) * e
    logit = 6 if job.fused else 30  # bytes: the kernel's passes, or those of reference.py
    # Each parameter: cast for the products (6), its gradient cast back (6), added up (12).
    other = norms + pointwise + logit * e * N * V + 24 * job.stored
    return {
        "matrix products": L * block + sum(products(C, V)),
        "attention": L * attention,
        "memory-bound kernels": other / (card.memory_bandwidth * MEMORY),
    }


def link_rate(card: Card) -> float:
    return LINK_PCIE if card.link.startswith("PCIe") else LINK


def step(job: Job, card: Card, gpus: int, B: int, net: float = NETWORK) -> dict[str, float]:
    """Seconds of an optimizer step, by part, at the rates above: what good software can reach."""
    micro_steps = share(job, gpus) // B
    parts = {key: value * micro_steps for key, value in micro_step(job, card, B).items()}
    compute = sum(parts.values())
    launches = LAUNCH * LAUNCHES * job.n_layer * micro_steps
    parts["waiting for launches"] = max(0.0, launches - compute)
    # AdamW reads weight, gradient, two moments and writes three; clipping reads, reads and writes.
    owned = {"ddp": 1.0, "zero1": 1 / gpus, "fsdp": 1 / min(gpus, NODE)}[job.parallel]
    parts["optimizer"] = (28 * owned + 12) * job.stored / (card.memory_bandwidth * MEMORY)
    if gpus > 1:
        link, network = traffic(job, gpus, micro_steps)
        seconds = (link / (card.link_bandwidth * link_rate(card))
                   + network / (card.network_bandwidth * net))
        # DDP sends during the last backward pass, two thirds of a micro-step, all but the tied
        # embedding, whose gradient is ready last; ZeRO-1 sends its weights after the step; FSDP
        # hides what fits behind the computation of all micro-steps.
        hidden = compute
        if job.parallel != "fsdp":
            late = job.padded_vocab * job.n_embd / job.stored
            gradients = seconds * (8 / 12 if job.parallel == "zero1" else 1)
            hidden = min(compute / micro_steps * 2 / 3, gradients * (1 - late))
        parts["communication not hidden"] = max(0.0, seconds - hidden)
    return parts


def fit(job: Job, text: str) -> tuple[int, Card, int, int]:
    """GPUs, card, micro-batch to take, largest that fits. BadInput where not one sequence does."""
    gpus, card = cluster(text)
    most = largest_micro_batch(job, card, gpus)
    if most == 0:
        need = sum(memory(job, gpus, 1).values())
        changes: list[tuple[str, Job]] = [
            ("--parallel zero1", replace(job, parallel="zero1")),
            ("--parallel fsdp", replace(job, parallel="fsdp")),
            ("--activation_checkpointing True", replace(job, checkpointing=True)),
        ]
        ways = [flag for flag, other in changes if largest_micro_batch(other, card, gpus)]
        larger = [c for c in CARDS.values() if c.memory_bytes >= need]
        ways += [f"{gpus}x{c.key}" for c in sorted(larger, key=lambda c: c.memory_bytes)[:2]]
        raise BadInput(f"{text}: one sequence needs {gib(need)}, {gib(need - card.memory_bytes)} "
                       f"more than a {card.key} has; what fits: {' or '.join(ways) or 'nothing'}")
    n = share(job, gpus)
    B = max(b for b in range(1, min(most, max(1, job.micro_batch)) + 1) if n % b == 0)
    return gpus, card, B, most


def gib(number: float) -> str:
    return f"{number / 2**30:,.2f} GiB"


def report(job: Job, text: str, price: float = 0.0) -> str:
    """The whole plan of a run on COUNTxGPU, for a terminal. price: dollars a GPU-hour, 0: unknown.

    Raises BadInput for a GPU, a count or a price that is none, and for a run that doesn't fit.
    """
    if not 0 <= price < math.inf:
        raise BadInput(f"--plan_price {price}: expected dollars per GPU-hour, as in 2.5")
    gpus, card, B, most = fit(job, text)
    micro_steps = (per_gpu := share(job, gpus)) // B
    held, parts = memory(job, gpus, B), step(job, card, gpus, B)
    low = sum(parts.values())
    high = SLOWEST * sum(step(job, card, gpus, B, NETWORK / 2).values())
    link, network = traffic(job, gpus, micro_steps)
    tokens, hours = job.batch_tokens, job.steps / 3600
    peak = gpus * card.bf16_flops if job.width == 2 else gpus * card.fp32_flops
    mfu = [job.flops_per_token * tokens / seconds / peak for seconds in (high, low)]
    money = [gpus * hours * seconds * (price or 1) for seconds in (low, high)]
    cost = f"${money[0]:,.2f} to ${money[1]:,.2f} at ${price:g} per GPU-hour" if price else (
        f"{money[0]:,.1f} to {money[1]:,.1f} GPU-hours (--plan_price 2.5 makes dollars of them)")
    return "\n".join([
        f"plan for {gpus} x {card.key}: {card.memory_bytes / 1e9:.0f} GB, "
        f"{peak / gpus / 1e12:.0f} TFLOP/s, {card.memory_bandwidth / 1e9:,.0f} GB/s each",
        f"model      {job.parameters:,} parameters, {job.flops_per_token / 1e6:,.0f} MFLOP a token",
        f"run        {job.steps:,} steps x {tokens:,} tokens = {job.steps * tokens / 1e9:,.2f} B "
        f"tokens, {job.dtype}, {job.parallel}",
        f"memory     {gib(sum(held.values()))} of {gib(card.memory_bytes)} at micro-batch {B} "
        f"({micro_steps} micro-steps); the largest that fits: {most} of {per_gpu}",
        *(f"  {key:<46}{gib(value):>12}" for key, value in held.items()),
        f"traffic    a GPU sends {link / 1e9:,.2f} GB over {card.link} and {network / 1e9:,.2f} GB "
        "over the network a step",
        f"step       {low * 1e3:,.0f} to {high * 1e3:,.0f} ms; about {low * TYPICAL * 1e3:,.0f} "
        "where the software is as good as the best published; at the roofline:",
        *(f"  {key:<46}{value * 1e3:>9,.1f} ms" for key, value in parts.items()),
        f"speed      {tokens / high:,.0f} to {tokens / low:,.0f} tokens/s, MFU "
        f"{mfu[0]:.0%} to {mfu[1]:.0%}",
        f"time       {hours * low:,.2f} to {hours * high:,.2f} hours, evaluations not included\n"
        f"cost       {cost}",
        f"assumed    matrix products at {MATMUL.get(card.arch, MATMUL_ASSUMED):.0%} of the peak, "
        f"attention at {ATTENTION.get(card.arch, ATTENTION_ASSUMED):.0%}, memory at {MEMORY:.0%}; "
        f"{card.link} at {link_rate(card):.0%} of {card.link_bandwidth / 1e9:g} GB/s"
        + (f", network at {NETWORK:.0%} (slow end: half that) of "
           f"{card.network_bandwidth / 1e9:g} GB/s a GPU, nodes of {NODE}" if gpus > NODE else ""),
        f"           slow end: x {SLOWEST}, the slowest published run of twelve"
        + ("" if card.key in VALIDATED else f"; none of them was on a {card.key}")
        + ("; none was on several nodes" if gpus > NODE else ""),
    ])


def show(settings: Mapping, parameters: int, flops_per_token: int) -> int:
    """Prints the plan that a run's settings ask for. Returns the exit code."""
    asked, job = settings["planning"], Job.of(settings, parameters, flops_per_token)
    if os.environ.get("RANK", "0") == "0":
        print(report(job, asked["plan"], asked["plan_price"]))
    return 0
