"""What Muon takes: one momentum for AdamW's two, Newton-Schulz iterations, an exchange of their
results (model/muon.py).

Shapes: C width, L blocks. A block's matrices: q, k, v and the projection (C, C), two of (C, 4C).
"""

from kernels.cards import Card
from launch.plan.job import FP32, NODE, Job, gpus_of_moments, gpus_of_shard
from launch.plan.tables import Held, Pass, total

ITERATIONS = 5
BF16 = 2
BUCKET = 1 << 27  # numbers at once: model/parallel.py
SQUARE, WIDE = 4, 2  # matrices of a block, (C, C) and (C, 4C)


def matrices(job: Job) -> int:
    """Numbers in the matrices that Muon trains."""
    return job.n_layer * (SQUARE + 4 * WIDE) * job.n_embd**2


def state(job: Job) -> int:
    """Bytes that the optimizers keep on all GPUs together."""
    return FP32 * matrices(job) + 2 * FP32 * (job.stored - matrices(job))


def flops(job: Job) -> int:
    """Of all iterations: three products each, X X^T, its square, and that times X."""
    C = job.n_embd
    square = 3 * 2 * C**3
    wide = 2 * (2 * C * C * 4 * C) + 2 * C**3
    return ITERATIONS * job.n_layer * (SQUARE * square + WIDE * wide)


def ranks(job: Job, gpus: int) -> int:
    """Over how many GPUs the iterations are shared out: all, or those that share the weights."""
    return gpus_of_shard(job, gpus) if job.parallel == "fsdp" else gpus


def passes(job: Job, gpus: int) -> list[Pass]:
    """Over the momentum and the weights, once a step; the iterations are products."""
    owned = matrices(job) / gpus_of_moments(job, gpus)
    return [
        Pass("momentum", 2 * FP32, FP32, owned, "dw, momentum -> momentum"),
        Pass("Nesterov", 2 * FP32 + FP32, FP32 + BF16, owned, "dw, momentum -> U; U cast"),
        Pass("iterations", 8 * ITERATIONS * BF16, 2 * ITERATIONS * BF16,
             matrices(job) / ranks(job, gpus), "X in and out of three products"),
        Pass("results", BF16, BF16, matrices(job), "scaled, and put together"),
        Pass("decay", FP32, FP32, owned, "w"),
        Pass("update", FP32 + BF16, FP32, owned, "w, O -> w"),
    ]


def seconds(job: Job, card: Card, gpus: int, matmul_rate: float) -> float:
    """Of the iterations' products, in bf16 also under fp16; in fp32 under fp32."""
    return flops(job) / ranks(job, gpus) / (job.peak_flops(card) * matmul_rate)


def traffic(job: Job, gpus: int) -> tuple[float, float]:
    """Bytes that a GPU sends in a step, over the node's link and over the network: the results, and
    where rows are shared out the momentum's before."""
    size = job.itemsize * matrices(job) * (1 if job.parallel == "ddp" else 2)
    inside, nodes = min(gpus, NODE), max(1, gpus // NODE)
    link = size * (inside - 1) / inside
    if job.parallel == "fsdp":  # in the node alone
        return link, 0.0
    return link, size / inside * (nodes - 1) / nodes


def workspace(job: Job) -> int:
    """Bytes of a bucket's matrices when all are orthogonal, beside weights, gradients, momenta. The
    three shapes, with a third of the numbers each, are a batch one after the other."""
    bucket, e = min(BUCKET, matrices(job)), job.itemsize
    return total([
        Held("U, results of each matrix, results of each parameter", 3 * bucket, e),
        Held("the last batch, before and after", 2 * bucket // 3, e),
    ])
