"""Lesson 10: GPT-2's count, start, data, schedule and gradients; and the fault in a film.

accumulate_as_filmed of lessons/10_gpt2.py runs, its losses fall, and with two ranks they aren't
those of one. The last exercise is to find out why, and to write it right.
"""

from collections.abc import Iterable

from torch import Tensor, nn


def parameters(n_layer: int, n_embd: int, n_ctx: int, n_vocab: int) -> int:
    """How many numbers GPT-2 learns: 12, 768, 1024 and 50257 make 124,439,808.

    Biases everywhere, two LayerNorms a block and one at the end, and the head is the embedding.
    """
    raise NotImplementedError


def init_std(name: str, n_layer: int) -> float:
    """The standard deviation of a matrix's first weights: of "wte.weight", "h.3.attn.c_attn.weight"
    and the like. Those that write into the residual stream are the two c_proj of each block."""
    raise NotImplementedError


def rows(tokens: Tensor, step: int, rank: int, ranks: int, B: int, T: int) -> tuple[Tensor, Tensor]:
    """A rank's inputs and targets in a step, (B, T) each; a target is the token after its input.

    Sequences begin at every T-th token. Step 0 takes the first ranks x B of them, rank 0 the first
    B of these, rank 1 the next, and step 1 goes on where step 0 has ended.
    """
    raise NotImplementedError


def get_lr(step: int, steps: int, warmup: int, peak: float, final: float) -> float:
    """The rate of a step, counted from 0: step 0 has peak / warmup and step warmup - 1 the peak.

    From step warmup on half a cosine leads from the peak to final x peak, which step `steps` would
    have.
    """
    raise NotImplementedError


def decayed(parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the parameters that weight decay pulls on: all with two axes, no others."""
    raise NotImplementedError


def accumulate(model: nn.Module, micro_batches: Tensor) -> float:
    """The mean loss of (micro-steps, B, T + 1) tokens; adds up its gradients in the parameters.

    model: DistributedDataParallel around what gives the mean loss of (B, T) inputs and targets. Its
    ranks average their gradients once: in the last micro-step.
    """
    raise NotImplementedError
