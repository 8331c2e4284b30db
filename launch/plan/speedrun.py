"""What the speedrun's network keeps and moves where GPT-2 does otherwise: model/speedrun.py.

No biases and no gains, the residual stream mixed with the embedding x0 before each block, queries
and keys normalised and turned, relu squared, and a head that isn't the embedding.
tests/test_launch_plan_memory.py holds the tables of memory to what autograd saves.

Shapes: B micro-batch, T time, N = B * T tokens, C width, H heads, L blocks, V vocabulary padded;
D head width; e: bytes of a number in the matrix products (Job.itemsize).
"""

from launch.plan.job import FP32, Job
from launch.plan.tables import Held, Pass

# ---- memory ----

def kept_by_block(job: Job, B: int) -> list[Held]:
    """One block, for its backward pass. The stream that the first one gets is x0."""
    N, C, H, e = B * job.n_ctx, job.n_embd, job.n_head, job.itemsize
    streams = 2 if job.compile else 3  # compiled, the mixture is made anew
    kept = [
        Held("residual stream: as it comes, mixed with x0, after attention", N * streams * C, FP32),
        Held("outputs of two norms", N * 2 * C, e),
        Held("q, k, v, turned", N * 3 * C, e),
        Held("attention's output", N * C, e),
        Held("the MLP's 4C before and after relu squared", N * 2 * 4 * C, e),
        Held("attention's log-sum-exp", N * H, FP32),
        Held("roots of mean squares of two norms", N * 2, FP32),
    ]
    if job.fused:
        return [*kept, Held("the same of each q and k", N * 2 * H, FP32)]
    raw = 3 if e == FP32 else 2  # in fp32 the projection itself, else q and k in fp32
    return [*kept, Held("q, k before they are normalised", N * raw * C, FP32),
            Held("the same of each q and k, before and after the root", N * 4 * H, FP32)]


def kept_around_blocks(job: Job, B: int) -> list[Held]:
    """By the norms behind the embedding and before the head, and the angles of all positions."""
    N, C, T, D = B * job.n_ctx, job.n_embd, job.n_ctx, job.n_embd // job.n_head
    return [
        Held("inputs of two norms", N * 2 * C, FP32),
        Held("roots of their mean squares", N * 2, FP32),
        Held("cosines and sines", 2 * T * D // 2, FP32),
    ]


# ---- passes over the memory ----

def block_passes(job: Job, B: int) -> list[Pass]:
    """All blocks and what lies around them, but for products, attention and loss.

    Compiled, neighbours are one kernel; else each operation is.
    """
    e, each = job.itemsize, B * job.n_ctx * job.n_embd * job.n_layer
    again = each * (2 if job.checkpointing else 1)
    around = 2 * B * job.n_ctx * job.n_embd  # two norms: behind the embedding, before the head
    rows = [
        Pass("norms around the blocks", FP32, e, around, "x -> y"),
        Pass("the same, backward", e + FP32, FP32, around, "dy, x -> dx"),
        Pass("branch's gradient", FP32, e, 2 * each, "cast for the product, twice a block"),
    ]
    if job.compile:
        rows += [
            Pass("mix, norm", 2 * FP32, FP32 + e, again, "x, x0 -> their mixture, y"),
            Pass("add, norm", FP32 + e, FP32 + e, again, "x, branch -> their sum, y"),
            Pass("add", FP32 + e, FP32, again, "x, branch -> their sum"),
            Pass("norm, add, backward", e + 2 * FP32, FP32, each, "dy, sum, dsum -> dx"),
            Pass("norm, mix, backward", e + 4 * FP32, 2 * FP32, each, "and x0's, added up"),
        ]
    else:
        rows += [
            Pass("mix", 4 * FP32, 3 * FP32, again, "two products and their sum"),
            Pass("norm", FP32, FP32, 2 * again, "x -> y"),
            Pass("cast", FP32, e, 2 * again, "y for the next product"),
            Pass("add", FP32 + e, FP32, 2 * again, "x, branch -> their sum"),
            Pass("norm backward", e + 3 * FP32, 3 * FP32, 2 * each, "cast; dy, x -> dx; added"),
            Pass("mix backward", 6 * FP32, 4 * FP32, each, "dx, dx0, and the mixture's weights"),
        ]
    # q and k in fp32: squared, averaged, scaled, turned in six passes, joined; backward as much.
    forward, backward = (e, e) if job.fused else (e + 9 * FP32, 9 * FP32 + e)
    qk = [
        Pass("q, k normalised and turned", forward, backward, 3 * again, "and v handed on"),
        Pass("the same, backward", forward + e * 2 / 3, backward, 3 * each, "dy, y -> dx"),
    ]
    passes = 1 if job.fused or job.compile else 2
    return [*rows, *qk,
            Pass("relu squared", e * passes, e * passes, 4 * again, "x -> y"),
            Pass("relu squared backward", 2 * e * passes, e * passes, 4 * each, "dy, x -> dx")]
