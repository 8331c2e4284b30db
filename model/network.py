"""The networks that can be trained, and the small interface by which everything else knows them.

    model = new_network(GPTConfig())                     # model/gpt2.py's GPT
    model = new_network(GPTConfig(arch="speedrun"))      # model/speedrun.py's SpeedrunGPT

Whoever writes a third one gives it these attributes and methods and a name in ARCHITECTURES;
training, ranks, checkpoints, sampling and evaluation then work as they are.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernels import operators, reference
from kernels.operators import Operators
from model.first_weights import draw_normal
from model.gpt2 import GPT, Attend, GPTConfig
from model.speedrun import SpeedrunGPT


class Network(Protocol):
    """What the rest of the house uses of a network, an nn.Module. Shapes: model/gpt2.py."""

    config: GPTConfig
    ops: Operators
    checkpoint_activations: bool  # keep a block's input only, and compute it twice
    wte: nn.Embedding  # its weight's device and dtype are the model's
    h: nn.ModuleList  # the blocks: what torch.compile compiles one by one, and FSDP shards by two

    def hidden(
        self, idx: Tensor, positions: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """(B, T) tokens -> (B, T, C), what the head reads."""
        ...

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) of hidden() -> (..., V), without padding."""
        ...

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, reduction: str = "mean",
        order: Tensor | None = None,
    ) -> Tensor:
        """(B, T) tokens -> logits (B, T, V), or with targets (B, T) the loss, a scalar in nats.

        order: of the tokens, for the embedding's gradient (kernels/embedding.py).
        """
        ...


def has_vocabulary_rows(name: str) -> bool:
    """Whether a parameter has a row for each token: (Vp, C) in memory, stored without padding."""
    return name in ("wte.weight", "lm_head.weight") or name.startswith("value_embeddings.")


ARCHITECTURES: dict[str, Any] = {"gpt2": GPT, "speedrun": SpeedrunGPT}


def new_network(config: GPTConfig, ops: Operators = operators.TORCH) -> Any:
    """The network that config.arch names, with its first weights."""
    return ARCHITECTURES[config.arch](config, ops)


def use_operators(model: Any, ops: Operators) -> None:
    """Has a network computed by these, in place: one that was loaded before they were chosen."""
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = ops


def compile_blocks(model: Any) -> None:
    """torch.compile on each block, in place, so that parameter names stay.

    Block by block the compiler sees one small graph twelve times over (compiled once), and
    gradients arrive block by block, so DDP can send them while the backward pass goes on.
    """
    # Under DDP it would cut each block's graph once more, at the borders of DDP's buckets, and
    # pass by the cache of compiled graphs: a warm first step of 124M took 6.0 s for 1.5 (on a
    # stand-in for a GPU).
    torch._dynamo.config.optimize_ddp = False
    for block in model.h:
        block.compile()


def compile_loss(model: Any) -> None:
    """On a GPU, where the loss is plain PyTorch's, that of compiled_loss() in its place."""
    plain = model.ops.linear_cross_entropy is reference.linear_cross_entropy
    if plain and model.wte.weight.is_cuda:
        use_operators(model, model.ops._replace(linear_cross_entropy=compiled_loss()))


@functools.cache  # else who asks again would have it compiled again
def compiled_loss() -> Callable:
    """Plain PyTorch's loss, with what becomes of a chunk of logits compiled."""
    of_chunk = torch.compile(reference.loss_of_chunk)
    return functools.partial(reference.linear_cross_entropy, of_chunk=of_chunk)


def is_compiled(model: Any) -> bool:
    """Whether torch.compile makes its blocks: where they aren't by hand, and none is wrong here."""
    return any(block._compiled_call_impl is not None for block in model.h)


def without_compiling(model: Any) -> AbstractContextManager:
    """Inside it the blocks compute as they are written, for inputs of many lengths."""
    # Of a model that isn't compiled torch.compile isn't asked: its import takes a second.
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


CONSTANTS = (nn.init.ones_, nn.init.zeros_, nn.init.constant_)  # LayerNorm's gains, say


class NoFirstWeights(TorchFunctionMode):
    """Inside it torch.nn.init and draw_normal() draw nothing: matrices have memory and, but for
    padding rows, any numbers in it; what is constant at first is there. For a network whose weights
    are about to be loaded, or drawn by its own init_weights(): nn.Linear and nn.Embedding draw them
    once before it does. 124M numbers take half a second."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is draw_normal:
            return None
        drawn = getattr(func, "__module__", "") == "torch.nn.init" and func not in CONSTANTS
        if drawn:
            return args[0] if args else kwargs["tensor"]  # type: ignore[index]
        return func(*args, **(kwargs or {}))


@functools.lru_cache
def without_weights(config: GPTConfig) -> Any:
    """The model with shapes and no numbers, for counting: what is counted is what is trained."""
    with torch.device("meta"), NoFirstWeights():
        return new_network(config)


def get_num_params(model: Any) -> int:
    """Parameters without padding rows of the vocabulary."""
    padding_rows = model.config.padded_vocab - model.config.n_vocab
    count = 0
    for name, parameter in model.named_parameters():
        count += parameter.numel()
        if has_vocabulary_rows(name):
            count -= padding_rows * parameter.shape[1]
    return count


def parameter_count(config: GPTConfig) -> int:
    """The same of a model of this shape: 124,439,808 for the default."""
    return get_num_params(without_weights(config))


def flops_per_token(config: GPTConfig) -> int:
    """Matrix-product FLOPs of forward and backward for one token at T = n_ctx.

    6 per matrix parameter and 12 L C T for attention, counted as dense: PaLM's formula (arXiv
    2204.02311, appendix B), as in nanoGPT and llm.c, so that the MFU compares with theirs.
    """
    L, C, T = config.n_layer, config.n_embd, config.n_ctx
    blocks = without_weights(config).h.parameters()
    matrices = sum(p.numel() for p in blocks if p.dim() == 2)
    head = config.n_vocab * C
    return 6 * (matrices + head) + 12 * L * C * T
