"""The settings of model/: the network's shape, its optimizer, how it is computed and saved.

As in every room they lie in a file of their own, which needs no PyTorch: importing it takes
seconds, and --help, --plan and a wrong flag do without.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kernels.constants import Choice
from launch import cli
from launch.config import Dtype
from launch.errors import BadInput

if TYPE_CHECKING:
    import torch

VOCAB_MULTIPLE = 128  # 50,257 is odd; tensor cores want their dimensions in multiples of 64 or 128
# Sizes beyond any published model of this kind: a slip of the keyboard, not a wish.
LARGEST = dict(n_layer=1000, n_head=1000, n_embd=100_000, n_ctx=1_000_000, n_vocab=1_000_000)

Mode = Literal["ddp", "zero1", "fsdp"]


@dataclass(frozen=True)
class GPTConfig:
    """GPT-2's shape; the defaults are the 124M model. Field names are OpenAI's."""

    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads; divides n_embd."""
    n_embd: int = 768
    """Width C of the residual stream."""
    n_ctx: int = 1024
    """Context length: the longest T."""
    n_vocab: int = 50257
    """Vocabulary: 256 bytes, 50,000 merges, end of text."""

    gelu: Literal["tanh", "exact"] = "tanh"
    """GPT-2's is the tanh approximation; exact is what nanoGPT trains with."""
    arch: Literal["gpt2", "speedrun"] = "gpt2"
    """GPT-2's network (model/gpt2.py), or the speedrun's of the same shape (model/speedrun.py)."""
    value_embeddings: bool = False
    """speedrun only: every other layer adds an embedding of the token to its values; V x C each."""
    document_mask: bool = False
    """speedrun only: attention ends at document borders while the loss is computed."""
    dropout: float = 0.0
    """While training: the share of embeddings, attention and branches left out (nanoGPT: 0.2)."""

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= largest:
                raise ValueError(f"{name} {size!r}: expected a whole number, 1 to {largest:,}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.gelu not in ("tanh", "exact"):
            raise ValueError(f"gelu is tanh or exact, not {self.gelu!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout!r}: expected 0 to less than 1")
        if self.arch not in ("gpt2", "speedrun"):
            raise ValueError(f"arch is gpt2 or speedrun, not {self.arch!r}")
        if self.arch == "speedrun":
            self._check_speedrun()
        for name in ("value_embeddings", "document_mask"):
            if getattr(self, name) and self.arch == "gpt2":
                raise ValueError(f"{name}: only --model.arch speedrun has it")

    def _check_speedrun(self) -> None:
        """What the speedrun's network has not, or can't do."""
        if self.gelu != "tanh":
            raise ValueError("gelu exact: the speedrun's network has no GELU, but relu(x)^2")
        if self.n_embd // self.n_head % 2:
            raise ValueError(f"heads {self.n_embd // self.n_head} wide: rotary positions turn "
                             "pairs, so the width of a head (n_embd / n_head) must be even")
        if self.dropout:
            raise ValueError("dropout: the speedrun's network has none")
        if self.document_mask and self.n_vocab != GPTConfig.n_vocab:
            raise ValueError("document_mask needs GPT-2's vocabulary, whose last token begins a "
                             "document")

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding matrix in memory."""
        return math.ceil(self.n_vocab / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class MuonConfig:
    """What --optim.optimizer muon needs beside the rest: the rates of what AdamW trains then, at
    width 768 (modded-nanogpt, track 3, entry 36)."""

    momentum: float = 0.95
    """Of Muon, after its warm-up from 0.85."""
    momentum_warmup: int = 300
    """Steps of that warm-up."""
    embed_lr: float = 0.7
    """Peak learning rate of the embeddings."""
    head_lr: float = 0.004
    """Peak learning rate of the output head, where it isn't the embedding."""
    vector_lr: float = 0.015
    """Peak learning rate of everything that is no matrix."""
    adamw_weight_decay: float = 0.001
    """On what AdamW trains."""

    def __post_init__(self) -> None:
        cli.within("optim.muon.momentum", self.momentum, 0, 0.999999)
        cli.within("optim.muon.momentum_warmup", self.momentum_warmup, 0, cli.MOST_STEPS)
        cli.within("optim.muon.embed_lr", self.embed_lr, 0, 1e38)
        cli.within("optim.muon.head_lr", self.head_lr, 0, 1e38)
        cli.within("optim.muon.vector_lr", self.vector_lr, 0, 1e38)
        cli.within("optim.muon.adamw_weight_decay", self.adamw_weight_decay, 0, 100)


@dataclass(frozen=True)
class OptimConfig:
    """Hyper-parameters; the defaults are the 124M model's (GPT-3: arXiv 2005.14165)."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW on everything, or Muon on the blocks' matrices and AdamW on the rest."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: a cosine; constant, then linear over the last decay_ratio; constant."""
    decay_ratio: float = 0.7
    """wsd (warm-up, stable, decay; 2404.06395): the share of all steps in which the rate falls."""
    lr: float = 6e-4
    """Peak learning rate (GPT-3, table 2.1); of Muon's matrices under muon."""
    final_lr: float = 0.0
    """Last step's learning rate as a fraction of the peak (llm.c's -q)."""
    warmup_steps: int = 700
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """On matrices only: not on biases and LayerNorms (GPT-3, appendix B)."""
    beta1: float = 0.9
    """Decay of the first moment (GPT-3, appendix B)."""
    beta2: float = 0.95
    """Decay of the second moment (GPT-3, appendix B)."""
    eps: float = 1e-8
    """Added to the root of the second moment (GPT-3, appendix B)."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is (GPT-3, appendix B)."""
    muon: MuonConfig = field(default_factory=MuonConfig)

    def __post_init__(self) -> None:
        cli.within("optim.lr", self.lr, 0, 1e38)  # fp32 ends at 3.4e38
        cli.within("optim.final_lr", self.final_lr, 0, 1)
        cli.within("optim.warmup_steps", self.warmup_steps, 0, cli.MOST_STEPS)
        cli.within("optim.weight_decay", self.weight_decay, 0, 100)
        cli.within("optim.beta1", self.beta1, 0, 0.999999)
        cli.within("optim.beta2", self.beta2, 0, 0.999999)
        # Padding rows have no gradient: their update is 0 / (0 + eps), NaN where fp32 makes eps 0.
        cli.within("optim.eps", self.eps, 1e-37, 1)
        cli.within("optim.clip", self.clip, 0, 1e38)
        cli.within("optim.decay_ratio", self.decay_ratio, 0, 1)
        if self.optimizer == "muon" and self.lr == 0:
            raise BadInput("--optim.lr 0 with --optim.optimizer muon: other rates are multiples")


@dataclass(frozen=True)
class SavingConfig:
    """When a run is saved."""

    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """Newest checkpoints to keep."""
    keep_best: bool = False
    """Save what is evaluated better than all before, and keep it: checkpoints/best.json."""

    def __post_init__(self) -> None:
        cli.within("save_every", self.save_every, 1, cli.MOST_STEPS)
        cli.within("keep", self.keep, 1, cli.MOST_STEPS)


@dataclass(frozen=True)
class ComputeConfig:
    """How a run computes; none of it changes what is computed, beyond rounding."""

    dtype: Dtype = "auto"
    """Format of the matrix products. Weights and optimizer are fp32 (fp64 for fp64)."""
    compile: bool | None = None
    """torch.compile the blocks; None: on CUDA, unless they have a backward pass by hand. False
    compiles nothing, the loss neither."""
    kernels: Choice = "auto"
    """Of what is right on this GPU the fastest that repeats its bits, or just the fastest; or ours;
    or plain PyTorch."""
    parallel: Mode = "ddp"
    """What ranks share out: gradients only averaged (ddp); moments (zero1); weights too (fsdp)."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Format in which gradients travel between ranks: bf16 is half the bytes, and rounds them."""
    activation_checkpointing: bool = False
    """Keep only each block's input, and compute the block twice: less memory, more time."""
    deterministic: bool = False
    """PyTorch's deterministic algorithms too; our kernels always are. May be slower."""

    def compiled(self, device: "torch.device") -> bool:
        """What compile means on this device."""
        return device.type == "cuda" if self.compile is None else self.compile


def check_diagnosable(every: int, model: GPTConfig, optim: OptimConfig) -> None:
    """Raises BadInput for what it can't look into."""
    if every and (model.arch != "gpt2" or optim.optimizer != "adamw"):
        raise BadInput("--diagnose_every knows GPT-2's network under AdamW: leave it out with "
                       "--model.arch speedrun and --optim.optimizer muon")


