"""What a block whose backward pass is by hand (model/fused_block.py) has in memory, and moves.

Shapes and e: launch/plan/memory.py.
"""

from launch.plan.job import FP32, Job
from launch.plan.tables import Held, Pass, total


def kept_of_mlp(job: Job, B: int) -> Held:
    """GELU's output is made again."""
    return Held("the MLP's 4C before GELU", B * job.n_ctx * 4 * job.n_embd, job.itemsize)


def backward_peak(job: Job, B: int) -> int:
    """Bytes at the worst of three moments of the backward pass, beside what the forward pass kept.

    What came in is there until the function returns, and so are the gradients of its weights.
    """
    N, C, e = B * job.n_ctx, job.n_embd, job.itemsize
    of_weights = e if job.parallel == "fsdp" else FP32
    came_in = [Held("gradient of the residual stream", N * C, FP32),
               Held("gradient of the branch", N * C, e)]
    stream = Held("the same behind the second LayerNorm", N * C, FP32)
    gelu = [
        Held("gradient of the MLP's 4C, and GELU's output", N * 2 * 4 * C, e),
        Held("gradient of the MLP's second weight", 4 * C * C, of_weights),
    ]
    attention = [
        stream,
        Held("gradients of attention's output and of q, k, v", N * (1 + 3) * C, e),
        Held("gradients of three weights", (4 + 4 + 1) * C * C, of_weights),
    ]
    layer_norm = [
        stream,
        Held("gradient of the first LayerNorm's output", N * C, e),
        Held("gradients of stream and branch, to be returned", N * C, FP32 + e),
        Held("gradients of all weights", 12 * C * C, of_weights),
    ]
    return total(came_in) + max(total(gelu), total(attention), total(layer_norm))


def pointwise(job: Job, B: int, forward_passes: int) -> list[Pass]:
    """GELU on the MLP's 4C with its bias, and the gradients of the two biases left over."""
    e, each = job.itemsize, B * job.n_ctx * job.n_embd * job.n_layer
    return [
        Pass("GELU forward", e, e, 4 * each * forward_passes, "x -> y"),
        Pass("GELU backward", e + e, e + e, 4 * each, "dy, x -> dx, y"),
        Pass("biases' gradients", e, 0, (3 + 1) * each, "dy of q, k, v and of the MLP, summed"),
    ]
