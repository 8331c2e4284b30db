"""What is planned: the numbers of a run (Job), and how many of which GPU it gets."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kernels.cards import CARDS, Card
from kernels.constants import FUSED_WIDTH
from launch.errors import BadInput

NODE = 8  # GPUs joined by the card's own link; DGX and HGX nodes, and the usual rented machine
MOST_GPUS = 1024
FP32 = 4  # bytes of a number in fp32


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
    reduce_dtype: str = "fp32"  # or bf16: of gradients between GPUs
    checkpointing: bool = False  # blocks computed again in the backward pass
    compile: bool = True
    by_hand: bool = False  # blocks with a backward pass by hand, where the kernels run
    kernels: str = "auto"  # auto, triton or torch
    gelu: str = "tanh"  # or exact: the same bytes and about the same time
    dropout: float = 0.0
    arch: str = "gpt2"  # or speedrun
    tables: int = 1  # (V, C) each: embedding, head where it's another, value embeddings
    optimizer: str = "adamw"  # or muon

    @classmethod
    def of(cls, settings: Mapping, parameters: int, flops_per_token: int) -> "Job":
        """From a run's settings, as config.json has them."""
        model, compute = settings["model"], settings["compute"]
        dtype = compute["dtype"]
        if dtype == "auto":
            dtype = "bf16"
        if model["document_mask"]:
            raise BadInput("--plan doesn't know the masked attention of --model.document_mask: "
                           "plan without it, and measure with --steps 20 what it costs")
        tables = 1
        if model["arch"] == "speedrun":
            tables = 2 + model["value_embeddings"] * (model["n_layer"] // 2)
        return cls(
            n_layer=model["n_layer"],
            n_head=model["n_head"],
            n_embd=model["n_embd"],
            n_ctx=model["n_ctx"],
            n_vocab=model["n_vocab"],
            parameters=parameters,
            flops_per_token=flops_per_token,
            batch_tokens=settings["batch_tokens"],
            micro_batch=settings["micro_batch"],
            steps=settings["steps"],
            dtype=dtype,
            parallel=compute["parallel"],
            reduce_dtype=compute["reduce_dtype"],
            checkpointing=compute["activation_checkpointing"],
            compile=compute["compile"] is not False,
            by_hand=(compute["compile"] is None and model["arch"] == "gpt2"
                     and model["gelu"] == "tanh" and not model["dropout"]
                     and model["n_embd"] <= FUSED_WIDTH),
            kernels=compute["kernels"],
            dropout=model["dropout"],
            arch=model["arch"],
            tables=tables,
            optimizer=settings["optim"]["optimizer"],
        )

    def __post_init__(self) -> None:
        if self.dtype not in ("bf16", "fp16", "fp32"):
            raise BadInput(f"--plan knows bf16, fp16 and fp32, not {self.dtype}")

    def on(self, card: Card) -> "Job":
        """The run as this card computes it: before sm_80 in fp16 and by PyTorch's own kernels."""
        if card.has_bf16:
            return self
        dtype = "fp16" if self.dtype == "bf16" else self.dtype
        return replace(self, dtype=dtype, kernels="torch")

    @property
    def itemsize(self) -> int:
        """Bytes of a number in what the matrix products take: `e` in every formula of the plan."""
        if self.dtype == "fp32":
            return FP32
        return 2

    @property
    def sent_size(self) -> int:
        """Bytes of a gradient's number on its way to another GPU."""
        if self.reduce_dtype == "bf16":
            return 2
        return FP32

    @property
    def fused(self) -> bool:
        """Whether the Triton kernels compute it; on() says where they do not run."""
        return self.kernels != "torch" and self.n_embd // self.n_head in (64, 128)

    @property
    def blocks_by_hand(self) -> bool:
        """Whether model/fused_block.py computes the blocks."""
        return self.by_hand and self.fused

    @property
    def padded_vocab(self) -> int:
        """V: rows of the embedding matrix in memory."""
        return math.ceil(self.n_vocab / 128) * 128

    @property
    def embeddings(self) -> int:
        """Numbers in all embeddings and the head, padding rows included."""
        positions = self.n_ctx if self.arch == "gpt2" else 0
        return (self.tables * self.padded_vocab + positions) * self.n_embd

    @property
    def stored(self) -> int:
        """Parameters with padding rows."""
        padding = self.padded_vocab - self.n_vocab
        return self.parameters + self.tables * padding * self.n_embd

    def peak_flops(self, card: Card) -> float:
        """FLOP/s of this dtype that the card's maker promises."""
        if self.dtype == "fp32":
            return card.fp32_flops
        return card.bf16_flops


def parse_cluster(text: str, own: Card | None = None) -> tuple[int, Card]:
    """How many of which GPU: "8xh100", or "8x" of one's own. Raises BadInput with the nearest that
    there is."""
    known = (f"there are {', '.join(CARDS)}; of any other: --plan 1x --plan_card FILE "
             "(launch/plan/own_card.py says what is in it)")
    match = re.fullmatch(r"(?:(-?\d+)\s*x\s*)?([a-z0-9-]*)", text.strip().lower())
    if not match:
        raise BadInput(f"--plan {text}: expected COUNTxGPU as in 8xh100; {known}")
    digits, key = match.groups(default="1")
    if own and key:
        raise BadInput(f"--plan {text} names a GPU and --plan_card another: --plan {digits}x")
    if own is None and key not in CARDS:
        problem = f"no GPU is called {key!r}: {_nearest(key)}" if key else "of which GPU? "
        raise BadInput(f"--plan {text}: {problem}{known}")
    card = own or CARDS[key]
    gpus = int(digits)
    if not 1 <= gpus <= MOST_GPUS:
        raise BadInput(f"--plan {text}: 1 to {MOST_GPUS:,} GPUs, not {gpus:,}")
    left_over = gpus % NODE
    if gpus > NODE and left_over:
        near = f"{gpus - left_over} or {gpus - left_over + NODE}"
        raise BadInput(f"--plan {text}: beyond one node GPUs come in nodes of {NODE}: {near}")
    return gpus, card


def _nearest(key: str) -> str:
    """The cards that may have been meant, as a question; '' where none is near."""
    close = difflib.get_close_matches(key, CARDS, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(close)}? " if close else ""


def sequences_per_gpu(job: Job, gpus: int) -> int:
    """Sequences of a step for each GPU. Raises BadInput where they can't be shared out."""
    sequences, rest = divmod(job.batch_tokens, job.n_ctx)
    if rest == 0 and sequences % gpus == 0:
        return sequences // gpus
    counts = [*range(1, NODE), *range(NODE, MOST_GPUS + 1, NODE)]
    possible = [n for n in counts if sequences % n == 0]
    possible.sort(key=lambda n: abs(math.log(n / gpus)))
    near = " or ".join(str(n) for n in sorted(possible[:2]))
    tokens = max(1, round(sequences / gpus)) * gpus * job.n_ctx
    raise BadInput(
        f"{job.batch_tokens:,} tokens a step are {sequences:,} sequences of {job.n_ctx:,}, which "
        f"{gpus} GPUs can't share equally: --batch_tokens {tokens}, or {near} GPUs")


def gpus_of_shard(job: Job, gpus: int) -> int:
    """Over how many GPUs FSDP shares out weights and gradients: those of a node; others don't."""
    if job.parallel == "fsdp":
        return min(gpus, NODE)
    return 1


def gpus_of_moments(job: Job, gpus: int) -> int:
    """Over how many GPUs AdamW's moments are shared out, and with them the update."""
    if job.parallel == "zero1":
        return gpus
    return gpus_of_shard(job, gpus)
