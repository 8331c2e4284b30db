"""The memory of one GPU at the worst moment of a step, added up from tables of tensors.

tests/test_launch_plan_memory.py holds the sums to what this program allocates.

Shapes: B micro-batch, T time, N = B * T tokens, C width, H heads, L blocks, V vocabulary padded;
e: bytes of a number in the matrix products (Job.itemsize).
"""

from kernels.cards import MIB, Card
from kernels.constants import FSDP_BLOCKS, GPU_CHUNK_ELEMENTS
from launch.plan import by_hand, muon, speedrun
from launch.plan.job import FP32, Job, gpus_of_moments, gpus_of_shard, sequences_per_gpu
from launch.plan.tables import Held, total

# Peak reserved over peak allocated by PyTorch's caching allocator in nine runs of GPT-2 (124M to
# 1558M, eager, compiled, FSDP2) on a stand-in for an H100, which allocates and computes nothing:
# 1.02 to 1.19, median 1.07.
FRAGMENTATION = 0.07
CONTEXT = 600 * MIB  # assumed: CUDA context and loaded kernels, cuBLAS's workspace (32 MiB, Hopper)
NCCL = 400 * MIB  # assumed: its buffers, where there is more than one GPU
LOGITS = GPU_CHUNK_ELEMENTS  # held at once by the loss
TILE_ROWS = 128  # the Triton loss holds its logits in whole tiles of so many tokens


# ---- what the blocks keep for their backward pass ----

def kept_by_block(job: Job, B: int) -> list[Held]:
    """One block of GPT-2, by hand, eager or compiled; the speedrun's: speedrun.py."""
    if job.arch == "speedrun":
        return speedrun.kept_by_block(job, B)
    N, C, H, e = B * job.n_ctx, job.n_embd, job.n_head, job.itemsize
    mlp = Held("the MLP's 4C before and after GELU", N * 2 * 4 * C, e)
    if job.blocks_by_hand:
        mlp = by_hand.kept_of_mlp(job, B)
    stream = [Held("residual stream, as either LayerNorm takes it", N * 2 * C, FP32)]
    if job.compile and not job.fused:  # the compiler adds up the second one's again
        stream = [Held("residual stream", N * C, FP32), Held("what is added to it", N * C, e)]
    masks = []
    if job.dropout:  # CUDA's native_dropout keeps a byte a number; flash attention keeps a seed
        masks = [Held("masks of two branches", N * 2 * C, 1)]
    return [
        *masks,
        *stream,
        Held("outputs of two LayerNorms", N * 2 * C, e),
        Held("q, k, v", N * 3 * C, e),
        Held("attention's output", N * C, e),
        mlp,
        Held("attention's log-sum-exp", N * H, FP32),
        Held("means and deviations of two LayerNorms", N * 2 * 2, FP32),
    ]


def kept_when_checkpointing(job: Job, B: int) -> list[Held]:
    """One block that will be computed again: its inputs alone."""
    N, C, e = B * job.n_ctx, job.n_embd, job.itemsize
    stream = Held("residual stream", N * C, FP32)
    if job.arch == "speedrun":
        return [stream]
    return [stream, Held("the branch that is added to it next", N * C, e)]


def cast_weights(job: Job) -> list[Held]:
    """One block's weights as the products take them, beside the fp32 ones; FSDP has them anyway."""
    C, e = job.n_embd, job.itemsize
    if job.dtype == "fp32" or job.parallel == "fsdp":
        return []
    return [Held("weights as cast: q, k, v; projection; the MLP's two", (3 + 1 + 4 + 4) * C * C, e)]


def activations(job: Job, B: int) -> int:
    """Bytes that all blocks keep for their backward pass.

    With checkpointing an upper bound: what one block computes again isn't there during the loss.
    """
    block = total(kept_by_block(job, B))
    casts = total(cast_weights(job))
    if job.checkpointing:
        return job.n_layer * (total(kept_when_checkpointing(job, B)) + casts) + block
    return job.n_layer * (block + casts)


# ---- what is there beside it, at each moment that may be the peak ----

def head_gradient(job: Job) -> Held:
    """Of the head, which is GPT-2's embedding: the loss makes it in its forward pass."""
    return Held("the head's gradient", job.padded_vocab * job.n_embd, FP32)


def kept_by_loss(job: Job, B: int) -> list[Held]:
    """From the loss's forward pass to its backward pass."""
    N, C = B * job.n_ctx, job.n_embd
    norms = [Held("last LayerNorm's input", N * C, FP32),
             Held("its mean and deviation", N * 2, FP32)]
    if job.arch == "speedrun":
        norms = speedrun.kept_around_blocks(job, B)
    return [
        *norms,
        Held("gradient of what the head reads", N * C, FP32 if job.fused else job.itemsize),
        head_gradient(job),
    ]


def loss_workspace(job: Job, B: int) -> int:
    """Bytes of one chunk of logits and what is computed with it."""
    N, C, V, e = B * job.n_ctx, job.n_embd, job.padded_vocab, job.itemsize
    embedding = Held("the embedding as cast", V * C, e)
    if job.fused:
        whole_tiles = LOGITS + (TILE_ROWS - 1) * V
        return total([embedding, Held("logits", min(whole_tiles, N * V), e)])
    chunk = min(LOGITS, N * V)
    reads = Held("what the head reads, 0 where there is no target", N * C, e)
    logits = Held("logits", chunk, e)
    softmax = [embedding, reads, logits]
    if job.compile:
        softmax += [Held("their gradient, before it takes their place", chunk, e)]
    else:
        softmax += [Held("their softmax", chunk, FP32)]
        if job.arch == "speedrun":  # while they are capped: fp32 copies, which are padding
            softmax += [Held("the cap's slope", chunk, e), Held("two copies", 2 * chunk, FP32),
                        Held("where the padding is", chunk, 1)]
    gradient = [embedding, reads, logits,
                Held("this chunk's share of the embedding's gradient", V * C, e)]
    return max(total(softmax), total(gradient))


def peaks(job: Job, B: int) -> dict[str, int]:
    """Bytes beside `activations`, at each moment of a step that may be its peak."""
    N, C, e = B * job.n_ctx, job.n_embd, job.itemsize
    last = total(kept_by_loss(job, B))
    head = head_gradient(job)
    output = Held("last LayerNorm's output", N * C, e if job.arch == "gpt2" else FP32)
    # dh and dW are multiplied by the gradient that comes in: first one has a copy, then the other.
    scaled = [
        total([output, output._replace(what="gradient of that, scaled")]),
        total([output, head._replace(what="the embedding's gradient, scaled")]),
    ]
    tied = [head] if job.arch == "gpt2" else []  # another head's is added up before the blocks
    block = [
        *tied,
        Held("gradient of the residual stream", N * C, FP32),
        Held("gradient of the branch", N * C, e),
        # before and after GELU; its output, which the block kept, is let go of in between
        Held("gradients of the MLP's 4C, less what is let go of", N * (2 - 1) * 4 * C, e),
        Held("gradient of one of the MLP's weights", 4 * C * C, e),
    ]
    gone = kept = activations(job, B)  # when the blocks' backward passes are done
    in_block = total(block)
    if job.blocks_by_hand:
        gone -= job.n_layer * total(cast_weights(job))  # they are kept to the next forward pass
        in_block = total(tied) + by_hand.backward_peak(job, B)
    embedding = [head._replace(what="the embedding's gradient, from the tokens")]
    if tied:
        embedding += [head, head._replace(what="their sum")]
    update = muon.workspace(job) if job.optimizer == "muon" else 0
    return {  # in the order in which they come; the last block goes backward first
        "loss": last + loss_workspace(job, B) + total([output]),
        "loss backward": last + max(scaled),
        "block backward": in_block,
        "first block's backward": in_block - kept * (job.n_layer - 1) // job.n_layer,
        "embedding backward": total(embedding) - gone,
        "update": update - gone,
    }


# Until then a step with one micro-step has no gradient but the head's, which is counted there: the
# update has let go of the last step's. DDP's buckets stay.
BEFORE_GRADIENTS = ("loss", "loss backward", "block backward")
# When DDP's copies of gradients in bf16, if they travel so, may all be there and wait their turn.
UNDER_WAY = ("first block's backward", "embedding backward")


def gradients_and_workspace(job: Job, gpus: int, B: int) -> tuple[float, int]:
    """Bytes of gradients that one GPU has at the worst moment, and beside `activations`."""
    gradients = FP32 * job.stored / gpus_of_shard(job, gpus)
    moments = peaks(job, B)
    buckets = gpus > 1 and job.parallel != "fsdp"
    if buckets and job.reduce_dtype == "bf16":
        for moment in UNDER_WAY:
            moments[moment] += job.sent_size * job.stored
    if buckets or sequences_per_gpu(job, gpus) > B:
        return gradients, max(moments.values())
    held = [(0.0 if moment in BEFORE_GRADIENTS else gradients, size)
            for moment, size in moments.items()]
    return max(held, key=sum)


# ---- one GPU ----

def optimizer_state(job: Job) -> tuple[str, int]:
    """What the optimizer keeps, and its bytes on all GPUs that share it out."""
    if job.optimizer == "muon":
        return "optimizer (a momentum; beside matrices, two)", muon.state(job)
    return "optimizer (two moments)", 2 * FP32 * job.stored


def memory(job: Job, gpus: int, B: int) -> dict[str, float]:
    """Bytes of one GPU at the worst moment of a step, by part."""
    shard = gpus_of_shard(job, gpus)
    kept, state = optimizer_state(job)
    gradients, workspace = gradients_and_workspace(job, gpus, B)
    parts = {
        "weights (fp32)": FP32 * job.stored / shard,
        "gradients (fp32) that are there by then": gradients,
        kept: state / gpus_of_moments(job, gpus),
        "activations": activations(job, B),
        "loss and workspace": workspace,
    }
    if job.parallel == "fsdp":
        parts["weights gathered"] = total(gathered(job))
        if sequences_per_gpu(job, gpus) > B:  # gradients wait for the last micro-step, and whole
            parts["gradients not scattered yet"] = FP32 * job.stored
    parts["fragmentation (7 %)"] = FRAGMENTATION * sum(parts.values())
    parts["CUDA, cuBLAS, NCCL"] = CONTEXT
    if gpus > 1:
        parts["CUDA, cuBLAS, NCCL"] += NCCL
    return parts


def gathered(job: Job) -> list[Held]:
    """What FSDP has whole for a while: the embeddings, and blocks that go together. The next ones
    are on their way, too, but not at the worst moment: 1 to 8 sequences of 1558m and 1 to 64 of
    124m are within 2 % of what the stand-in for a GPU counts."""
    blocks = 12 * job.n_embd**2 * min(FSDP_BLOCKS, job.n_layer)
    return [
        Held("embeddings", job.embeddings, FP32),
        Held("blocks", blocks, job.itemsize),
        Held("gradients of blocks, to be scattered", blocks, job.sent_size),
    ]


def largest_micro_batch(job: Job, card: Card, gpus: int) -> int:
    """The largest divisor of a GPU's share whose memory fits; 0: not even one sequence does."""
    largest = 0
    sequences = sequences_per_gpu(job, gpus)
    for B in range(1, sequences + 1):
        if sequences % B == 0 and sum(memory(job, gpus, B).values()) <= card.memory_bytes:
            largest = B
    return largest
