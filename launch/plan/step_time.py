"""The time of a step: a roofline of matrix products, attention, memory-bound kernels and links.

Each part is the larger of what its arithmetic and what its bytes take, at the share of the card's
limits that others have measured. One GPU has timed this program, an H200: a step of gpt2-124m took
0.91 of the "about" that is made of this (docs/gpu_report_h200.json, which --plan_card takes).
tests/test_launch_plan.py compares the result with published runs of other programs.

Shapes: B micro-batch, T time, N = B * T tokens, C width, L blocks, V vocabulary padded; e: bytes of
a number in the matrix products (Job.itemsize).
"""

import math

from kernels.cards import Card
from launch.plan import by_hand, muon, speedrun
from launch.plan.job import FP32, NODE, Job, gpus_of_moments, sequences_per_gpu
from launch.plan.own_card import MeasuredCard
from launch.plan.tables import Pass, total_bytes

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
LINK = 0.78
LINK_PCIE = 0.4
NETWORK = 0.7
LAUNCH = 5e-6  # seconds of a launch from Python: assumed
LAUNCHES = 61  # a block; 735 were counted in a step of 124M (12 blocks) without compile
TILE = 128  # rows and columns of the product that one SM computes


def matmul_rate(card: Card) -> float:
    """The fraction of the peak that matrix products reach."""
    if isinstance(card, MeasuredCard):
        return card.matmul_rate
    return MATMUL.get(card.arch, MATMUL_ASSUMED)


def attention_rate(card: Card) -> float:
    """The fraction of the peak that attention reaches."""
    if isinstance(card, MeasuredCard):
        return card.attention_rate
    return ATTENTION.get(card.arch, ATTENTION_ASSUMED)


def memory_rate(card: Card) -> float:
    """The fraction of the memory's bandwidth that a copy reaches."""
    if isinstance(card, MeasuredCard):
        return card.memory_rate
    return MEMORY


def link_rate(card: Card) -> float:
    """The fraction of the bandwidth inside a node that collectives reach."""
    if card.link.startswith("PCIe"):
        return LINK_PCIE
    return LINK


def copy_seconds(size: float, card: Card) -> float:
    """Seconds that the card's memory needs for so many bytes read or written."""
    return size / (card.memory_bandwidth * memory_rate(card))


# ---- matrix products and attention ----

def matmul(m: int, n: int, k: int, job: Job, card: Card) -> float:
    """Seconds of an (m, k) x (k, n) product: the tensor cores' time or the memory's."""
    # The last wave of tiles leaves SMs idle. Few tiles: the libraries split k instead.
    waves = math.ceil(m / TILE) * math.ceil(n / TILE) / card.sms
    idle = 1.0
    if waves > 1:
        idle = math.ceil(waves) / waves
    flops = 2.0 * m * n * k
    arithmetic = flops / (job.peak_flops(card) * matmul_rate(card)) * idle
    size = job.itemsize * (m * k + k * n + m * n)
    return max(arithmetic, copy_seconds(size, card))


def linear(N: int, inputs: int, outputs: int, job: Job, card: Card) -> tuple[float, float]:
    """Seconds of y = x W for N tokens: forward, and backward (dx = dy W^T, dW = x^T dy)."""
    forward = matmul(N, outputs, inputs, job, card)
    for_input = matmul(N, inputs, outputs, job, card)
    for_weight = matmul(outputs, inputs, N, job, card)
    return forward, for_input + for_weight


def matrix_products(job: Job, card: Card, B: int) -> float:
    """Seconds of all linear layers and of the logits, forward and backward."""
    C, N = job.n_embd, B * job.n_ctx
    layers = [
        linear(N, C, 3 * C, job, card),  # q, k, v
        linear(N, C, C, job, card),  # projection
        linear(N, C, 4 * C, job, card),  # MLP, up
        linear(N, 4 * C, C, job, card),  # and down
    ]
    forward = sum(layer[0] for layer in layers)
    backward = sum(layer[1] for layer in layers)
    logits = sum(linear(N, C, job.padded_vocab, job, card))
    return job.n_layer * (forward_passes(job) * forward + backward) + logits


def forward_passes(job: Job) -> int:
    """How often a block is computed forward in a micro-step."""
    if job.checkpointing:
        return 2
    return 1


def attention(job: Job, card: Card, B: int) -> float:
    """Seconds of attention in all blocks."""
    T, C, N = job.n_ctx, job.n_embd, B * job.n_ctx
    product = 2 * N * T * C / 2  # FLOP of T x T scores of every head, the causal half of them
    # Forward: q k^T and p v. Backward: q k^T again, dv = p^T dy, dp = dy v^T, dq, dk.
    products = forward_passes(job) * 2 + 5
    return job.n_layer * products * product / (job.peak_flops(card) * attention_rate(card))


# ---- memory-bound kernels ----

def layer_norms(job: Job, B: int) -> list[Pass]:
    """Two LayerNorms a block and the last one, each with the addition to the residual stream.

    Branches are counted with 2 bytes, also under fp32.
    """
    e = 2
    each = B * job.n_ctx * job.n_embd * (2 * job.n_layer + 1)
    again = each * forward_passes(job)
    if job.fused or job.compile:  # one kernel for each direction
        return [
            Pass("forward", FP32 + e, FP32 + e, again, "x, branch -> their sum, y"),
            Pass("backward", e + FP32 + FP32, FP32 + e, each, "dy, sum, dsum -> dx, dbranch"),
        ]
    return [
        Pass("add", FP32 + e, FP32, again, "x, branch -> their sum"),
        Pass("normalise", FP32, FP32, again, "sum -> y"),
        Pass("cast", FP32, e, again, "y for the next product"),
        Pass("cast back", e, FP32, each, "dy"),
        Pass("normalise backward", FP32 + FP32, FP32, each, "dy, sum -> dx"),
        Pass("add backward", FP32 + FP32, FP32, each, "dx, dsum -> their sum"),
        Pass("cast for branch", FP32, e, each, "sum -> dbranch"),
    ]


def pointwise(job: Job, B: int) -> list[Pass]:
    """GELU on the MLP's 4C, and the biases' gradients."""
    e, each = job.itemsize, B * job.n_ctx * job.n_embd * job.n_layer
    again = each * forward_passes(job)
    biases = 3 + 1 + 4 + 1  # C of them: q, k, v; projection; the MLP's two
    if job.blocks_by_hand:
        return by_hand.pointwise(job, B, forward_passes(job))
    return [
        Pass("GELU forward", e, e, 4 * again, "x -> y"),
        Pass("GELU backward", e + e, e, 4 * each, "dy, x -> dx"),
        Pass("biases' gradients", e, 0, biases * each, "dy of four layers, summed"),
    ]


def loss(job: Job, B: int) -> list[Pass]:
    """Cross-entropy on the logits, its gradient in their place."""
    e, each = job.itemsize, B * job.n_ctx * job.padded_vocab
    if job.fused:
        return [Pass("cross-entropy", e + e, e, each, "twice: for the sum, for the gradient")]
    wide = 2 * e  # fp32 beside bf16; too much under fp32, where nothing is cast
    return [
        Pass("cast", e, wide, each, "logits -> fp32"),
        Pass("softmax", wide, wide, each, "fp32 -> fp32"),
        Pass("two maxima", wide + wide, 0, each, "of logits and of softmax, for the log-sum-exp"),
        Pass("cast back", wide, e, each, "softmax in the logits' place"),
        Pass("padding and targets", 0, e, each, "few columns in truth: rounded up to a pass"),
    ]


def casts(job: Job) -> list[Pass]:
    """Each parameter, once a micro-step; counted with 2 bytes, also under fp32."""
    e = 2
    gradient = [Pass("gradient cast", e, FP32, job.stored, "from them")]
    if job.blocks_by_hand and job.parallel != "fsdp":  # products write it in fp32
        gradient = []
    return [
        Pass("weight cast", FP32, e, job.stored, "for the products"),
        *gradient,
        Pass("gradient added", FP32 + FP32, FP32, job.stored, "to those of earlier micro-steps"),
    ]


def optimizer(job: Job, gpus: int) -> list[Pass]:
    """Clipping and update, once a step; numbers: parameters of one GPU."""
    adamw, rest = job.stored, []
    if job.optimizer == "muon":
        adamw, rest = job.stored - muon.matrices(job), muon.passes(job, gpus)
    owned = adamw / gpus_of_moments(job, gpus)
    return [
        Pass("norm", FP32, 0, job.stored, "gradient"),
        Pass("clipping", FP32, FP32, job.stored, "gradient"),
        Pass("AdamW", 4 * FP32, 3 * FP32, owned, "w, dw, two moments -> w, two moments"),
        *rest,
    ]


def micro_step(job: Job, card: Card, B: int) -> dict[str, float]:
    """Seconds of one forward and backward pass of B sequences, by part."""
    blocks = layer_norms(job, B) + pointwise(job, B)
    if job.arch == "speedrun":
        blocks = speedrun.block_passes(job, B)
    passes = blocks + loss(job, B) + casts(job)
    return {
        "matrix products": matrix_products(job, card, B),
        "attention": attention(job, card, B),
        "memory-bound kernels": copy_seconds(total_bytes(passes), card),
    }


# ---- communication ----

def traffic(job: Job, gpus: int, micro_steps: int) -> tuple[float, float]:
    """Bytes that each GPU sends in a step, over the node's link and over the network.

    Collectives go in rings: first inside the nodes, then between GPUs of the same place in each,
    which have an eighth of it to send. In a ring of n each GPU sends (n - 1) / n of the buffer in
    one pass; a reduce-scatter and an all-gather are one pass each.
    """
    inside, nodes = min(gpus, NODE), max(1, gpus // NODE)
    gradients = 2 * job.sent_size * job.stored  # averaged once a step: reduce-scatter, all-gather
    link = network = gradients
    if job.parallel == "zero1":
        new_weights = FP32 * job.stored  # all-gather
        link = network = gradients + new_weights
    if job.parallel == "fsdp":  # shards stay inside a node, nodes average their gradients
        blocks = job.stored - job.embeddings
        gathers = 2 * job.itemsize * blocks + FP32 * job.embeddings  # blocks for either pass
        link = job.sent_size * job.stored + micro_steps * gathers  # gradients are scattered once
    return link * (inside - 1) / inside, network / inside * (nodes - 1) / nodes


def communication(job: Job, card: Card, gpus: int, micro_steps: int, net: float) -> float:
    """Seconds of all of it, one after the other. net: the share of the network's bandwidth."""
    return sending(*traffic(job, gpus, micro_steps), card, net)


def sending(link: float, network: float, card: Card, net: float) -> float:
    """Seconds that these bytes take, inside the node and then between nodes."""
    inside = link / (card.link_bandwidth * link_rate(card))
    between = network / (card.network_bandwidth * net)
    return inside + between


def to_bf16_and_back(job: Job) -> list[Pass]:
    """Gradients that travel in bf16, once a step. FSDP copies them in any case, to be sent."""
    if job.reduce_dtype != "bf16" or job.parallel == "fsdp":
        return []
    return [Pass("rounded", FP32, 2, job.stored, "gradient -> what is sent"),
            Pass("put back", 2, FP32, job.stored, "their mean -> gradient")]


def hidden(job: Job, seconds: float, compute: float, micro_steps: int) -> float:
    """Seconds of communication that go on behind the computation."""
    if job.parallel == "fsdp":  # behind all micro-steps
        return compute
    # DDP sends during the last backward pass, two thirds of a micro-step, all but the tied
    # embedding, whose gradient is ready last; ZeRO-1 sends its weights after the step.
    backward = compute / micro_steps * 2 / 3
    gradients = seconds
    if job.parallel == "zero1":  # two passes of three, the third in fp32
        gradients = seconds * 2 * job.sent_size / (2 * job.sent_size + FP32)
    late = job.padded_vocab * job.n_embd / job.stored
    return min(backward, gradients * (1 - late))


# ---- a step ----

def step(job: Job, card: Card, gpus: int, B: int, net: float = NETWORK) -> dict[str, float]:
    """Seconds of an optimizer step, by part, at the rates above: what good software can reach."""
    micro_steps = sequences_per_gpu(job, gpus) // B
    parts = {}
    for part, seconds in micro_step(job, card, B).items():
        parts[part] = seconds * micro_steps
    compute = sum(parts.values())
    launches = LAUNCH * LAUNCHES * job.n_layer * micro_steps
    parts["waiting for launches"] = max(0.0, launches - compute)
    parts["optimizer"] = copy_seconds(total_bytes(optimizer(job, gpus)), card)
    if job.optimizer == "muon":
        parts["optimizer"] += muon.seconds(job, card, gpus, matmul_rate(card))
    if gpus > 1:
        seconds = communication(job, card, gpus, micro_steps, net)
        left = seconds - hidden(job, seconds, compute, micro_steps)
        parts["communication not hidden"] = max(0.0, left)
        if copies := to_bf16_and_back(job):
            parts["gradients to bf16 and back"] = copy_seconds(total_bytes(copies), card)
        if job.optimizer == "muon":  # after the backward pass, with nothing to hide behind
            parts["communication not hidden"] += sending(*muon.traffic(job, gpus), card, net)
    return parts
