"""What the check should find, from --plan, kernels/roofline.py and what the stand-in counted.

    predicted = predict(card, settings)     # part -> figure -> number, by the names of parts.py

Time is --plan's "about": what tuned programs took, on a roofline. Of what nobody has predicted
(errors, losses) the limit stands here, beyond which something is wrong.
"""

import torch

from kernels.cards import PCIE4, Card
from kernels.selfcheck import LIMITS
from launch.plan import report, step_time
from launch.plan.job import NODE
from launch.plan.memory import memory
from model.size import parameters
from tests.gpucheck.runs import TOLERANCE
from tests.gpucheck.settings import BATCH, Settings
from tests.nullgpu import table
from tests.nullgpu.largest import largest

Figures = dict[str, dict[str, float]]

# The cards that were counted, and others' nearest: launches are the same on all of them.
COUNTED = {"sm_80": "a100", "sm_90": "h100", "sm_100": "b200"}
STATE = 12  # bytes a parameter in a checkpoint: the weight and two moments in fp32
NOT_TENSORS = ("fragmentation (7 %)", "CUDA, cuBLAS, NCCL")  # of --plan's memory
# Tokens of a question that the model reads, as tests/bench/hellaswag.py draws them: a context of 55
# in the mean, and four endings of 20 without their last.
TOKENS_A_QUESTION = 55 + 4 * 19
BF16 = 2  # bytes


def predict(card: Card | None, settings: Settings) -> Figures:
    """Everything that is known; of a card that kernels/cards.py doesn't know, the limits alone."""
    predicted: Figures = {
        "errors": {"bf16": LIMITS[torch.bfloat16], "fp32": LIMITS[torch.float32]},
        "losses": {"difference": TOLERANCE},
    }
    if settings.quick or card is None:
        return predicted
    predicted["steps"] = step(card, settings, 1)
    if settings.gpus > 1:
        predicted["all GPUs"] = step(card, settings, settings.gpus)
    peak = settings.job().peak_flops(card)
    matmul = peak * step_time.matmul_rate(card)
    reads = card.memory_bandwidth * step_time.MEMORY
    forward = settings.job().flops_per_token / 3
    weights = parameters(settings.model)
    return predicted | {
        "rates": {"matmul_flops": matmul,
                  "attention_flops": peak * step_time.attention_rate(card),
                  "memory_bandwidth": reads},
        # All weights are read once a token.
        "sampling": {"tokens_per_second": reads / (BF16 * weights)},
        "HellaSwag": {"questions_per_second": matmul / (forward * TOKENS_A_QUESTION)},
        "saving": {"stall": STATE * weights / PCIE4},
        "largest": {"sequences": largest_micro_batch(card, settings)},
    }


def step(card: Card, settings: Settings, gpus: int) -> dict[str, float]:
    """A training step on so many GPUs of one node."""
    job, tokens = settings.job(gpus), settings.batch * settings.model.n_ctx * gpus
    parts = step_time.step(job.on(card), card, min(gpus, NODE), settings.batch)
    seconds = sum(parts.values())
    typical = report.TYPICAL * seconds
    found = {
        "step_ms": 1e3 * typical,
        "tokens_per_second": tokens / typical,
        "mfu": job.flops_per_token * tokens / typical / (gpus * job.peak_flops(card)),
        "idle": parts["waiting for launches"] / seconds,
        "peak_mib": tensors_mib(settings, gpus, settings.batch),
    }
    if settings.batch != BATCH:
        return found
    counted = table.read()[row_name(card, gpus)]["step"]
    return found | {"peak_mib": counted["peak MiB"]} | {
        f"launches: {kind}": count for kind, count in counted["launches"].items()}


def row_name(card: Card, gpus: int) -> str:
    """The row of tests/nullgpu/counted.json that is this step's, or the nearest."""
    if gpus > 1:
        return "gpt2-124m, ddp, 8 h100"
    return f"gpt2-124m, {COUNTED.get(card.arch, 'h100')}"


def tensors_mib(settings: Settings, gpus: int, batch: int) -> float:
    """MiB of tensors in a step, by --plan."""
    parts = memory(settings.job(gpus), gpus, batch)
    return sum(size for part, size in parts.items() if part not in NOT_TENSORS) / 2**20


def largest_micro_batch(card: Card, settings: Settings) -> int:
    """Counted on the stand-in, or else by --plan."""
    counted = table.read().get(f"largest micro-batch of gpt2-124m, {card.key}")
    if counted:
        return counted["sequences"]
    job = settings.job()
    return largest(lambda batch: sum(memory(job, 1, batch).values()) <= card.memory_bytes, BATCH)
