"""Who can compute attention on a card, pass by pass: our kernels, PyTorch's flash, and cuDNN.

    case = AttentionCase(64, 1024, 12, 64, torch.bfloat16, device)        # a run's own shape
    forward = case.forward_runs(NAMES)                     # for kernels/race.py
    backward = case.backward_runs(NAMES, "triton")         # of what triton's forward pass left
    dq = case.tile_runs("attention_dq", ["64x64 w4 s2 tma"])     # a kernel of ours, other tiles
    y = attention_by("triton", "cudnn")(qkv, n_head)       # forward by one, backward by another

All keep the same for the backward pass: qkv, the output, and the log-sum-exp of each row. Ours
writes that in units of ln 2, PyTorch's as it is: here all pass it on in ours. PyTorch's read q, k
and v where they lie in qkv, and write as many tensors, which one more launch packs into dqkv: that
launch, and those that change the unit, are timed with them.

Shapes: B batch, T time, C width, H heads, D head width.
"""

import functools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kernels import passes, reference, tiles
from kernels.attention import attention as triton_attention
from kernels.attention import launch_backward, launch_forward
from kernels.passes import Passes
from kernels.race import Run

aten = torch.ops.aten
LOG2E = 1 / math.log(2)

NAMES = ("triton", "flash", "cudnn")
TILED = ("attention_forward", "attention_dq", "attention_dkdv")  # kernels of ours
TORCH = "torch"  # kernels/reference.py's: no candidate, but what there is where none is left

HALF = (torch.bfloat16, torch.float16)  # what PyTorch's compute in

# Relative errors (Frobenius) against fp64, as kernels/selfcheck.py has them: 2.5 unit roundoffs.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2.5 * 2**-11}
# An error of e in a log-sum-exp is one of e in all p of its row. In GPT-2 it is about 10, in units
# of ln 2: so this is 1e-3 of p, a quarter of bf16's roundoff. Sums in fp32 are off by some 1e-6.
LSE_LIMIT = 1e-4


def _heads(x: Tensor, n_head: int) -> Tensor:
    """(B, T, C) -> (B, H, T, D), a view."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def _qkv_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """(B, T, 3C) -> q, k, v, each (B, H, T, D), views."""
    return tuple(_heads(x, n_head) for x in qkv.chunk(3, -1))


def _saved(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, T, D), natural logarithms -> (B, T, C), (B, H, T) in units of ln 2."""
    lse = lse.reshape(out.shape[:3]).contiguous()  # some keep (B, H, T, 1), or (B, T, H) in memory
    return out.transpose(1, 2).flatten(2), lse * LOG2E


def _packed(gradients: tuple[Tensor, ...]) -> Tensor:
    """dq, dk, dv, each (B, H, T, D) -> (B, T, 3C)."""
    return torch.stack([x.transpose(1, 2) for x in gradients], 2).flatten(2)


def _flash_forward(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    q, k, v = _qkv_heads(qkv, n_head)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)
    return _saved(out, lse)


def _flash_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int) -> Tensor:
    T, nothing = qkv.shape[1], qkv.new_empty((), dtype=torch.int64)  # dropout's seed and offset
    gradients = aten._scaled_dot_product_flash_attention_backward(
        _heads(dout, n_head), *_qkv_heads(qkv, n_head), _heads(out, n_head), lse / LOG2E,
        None, None, T, T, 0.0, True, nothing, nothing)
    return _packed(gradients)


def _cudnn_forward(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    q, k, v = _qkv_heads(qkv, n_head)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, is_causal=True)
    return _saved(out, lse)


def _cudnn_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int) -> Tensor:
    T, nothing = qkv.shape[1], qkv.new_empty((), dtype=torch.int64)
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        _heads(dout, n_head), *_qkv_heads(qkv, n_head), _heads(out, n_head),
        (lse / LOG2E).unsqueeze(-1), nothing, nothing, None, None, None, T, T, 0.0, True)
    return _packed(gradients)


# (qkv, n_head) -> out (B, T, C), lse (B, H, T) in units of ln 2
FORWARD = {"triton": launch_forward, "flash": _flash_forward, "cudnn": _cudnn_forward,
           TORCH: passes.REFERENCE.attention_forward}
# (dout, qkv, out, lse, n_head) -> dqkv (B, T, 3C)
BACKWARD = {"triton": launch_backward, "flash": _flash_backward, "cudnn": _cudnn_backward,
            TORCH: passes.REFERENCE.attention_backward}


def _able(name: str, qkv: Tensor) -> str:
    """Who takes this: PyTorch's know no fp32, in which kernels are checked too, nor no sequence."""
    if name in ("flash", "cudnn") and (qkv.dtype not in HALF or not qkv.numel()):
        return "triton"
    return name


def forward_by(name: str, qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    """The forward pass of this name."""
    return FORWARD[_able(name, qkv)](qkv, n_head)


def backward_by(
    name: str, dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int
) -> Tensor:
    """The backward pass of this name."""
    return BACKWARD[_able(name, qkv)](dout, qkv, out, lse, n_head)


# ---- both passes as an operator ----


@torch.library.custom_op("gpt2::attention_by", mutates_args=())
def _attention(qkv: Tensor, n_head: int, forward: str, backward: str) -> tuple[Tensor, Tensor]:
    return forward_by(forward, qkv, n_head)


@_attention.register_fake
def _attention_outputs(qkv, n_head, forward, backward):
    B, T, C3 = qkv.shape
    return qkv.new_empty(B, T, C3 // 3), qkv.new_empty(B, n_head, T, dtype=torch.float32)


@torch.library.custom_op("gpt2::attention_backward_by", mutates_args=())
def _attention_backward(
    name: str, dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int
) -> Tensor:
    return backward_by(name, dout, qkv, out, lse, n_head)


@_attention_backward.register_fake
def _attention_gradient(name, dout, qkv, out, lse, n_head):
    return qkv.new_empty(qkv.shape)


def _remember(ctx, inputs, output):
    qkv, ctx.n_head, _, ctx.backward = inputs
    ctx.save_for_backward(qkv, *output)


def _gradient(ctx, dout, dlse):
    dqkv = torch.ops.gpt2.attention_backward_by(
        ctx.backward, dout, *ctx.saved_tensors, ctx.n_head)
    return dqkv, None, None, None


_attention.register_autograd(_gradient, setup_context=_remember)


def attention_by(forward: str, backward: str) -> Callable[[Tensor, int], Tensor]:
    """kernels/reference.py's attention, by the one forward and by the other backward."""
    if forward == TORCH:  # which leaves nothing for another's backward pass
        return reference.attention
    if (forward, backward) == ("triton", "triton"):
        return triton_attention

    def attention(qkv: Tensor, n_head: int) -> Tensor:
        qkv = qkv.to(reference.product_dtype(qkv.dtype, qkv.device))
        return torch.ops.gpt2.attention_by(qkv, n_head, forward, backward)[0]

    return attention


def passes_by(own: Passes, forward: str, backward: str) -> Passes:
    """A block's passes, with attention's by these."""
    others: dict[str, Callable] = {}  # own has Triton's
    if forward != "triton":
        others["attention_forward"] = functools.partial(forward_by, forward)
    if backward != "triton":
        others["attention_backward"] = functools.partial(backward_by, backward)
    return own._replace(**others)


# ---- the race ----


class AttentionCase:
    """Attention at a run's own shape: random inputs, and by fp64 what is right for the first and
    the last sequence. Made when they are asked for: what there's no memory for, is a fault then."""

    def __init__(
        self, B: int, T: int, n_head: int, head_width: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.B, self.T, self.n_head, self.dtype, self.device = B, T, n_head, dtype, device
        self.C = n_head * head_width

    @functools.cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """qkv (B, T, 3C) and dout (B, T, C)."""
        generator = torch.Generator(self.device).manual_seed(0)
        shapes = ((self.B, self.T, columns) for columns in (3 * self.C, self.C))
        qkv, dout = (torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
                     for shape in shapes)
        return qkv, dout

    def ends(self, x: Tensor) -> Tensor:
        """Of the first and the last sequence."""
        return x[[0, -1]]

    @functools.cached_property
    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """out (2, T, C), lse (2, H, T) in units of ln 2, and dqkv (2, T, 3C), in fp64.

        One head at a time: all scores of all heads would be gigabytes.
        """
        qkv, dout = (self.ends(x).double().unflatten(-1, (-1, self.n_head, self.C // self.n_head))
                     for x in self.inputs)  # (2, T, 3, H, D) and (2, T, 1, H, D)
        heads = [_exact_head(qkv[..., h, :].flatten(2), dout[..., h, :].flatten(2))
                 for h in range(self.n_head)]
        outs, lses, gradients = zip(*heads, strict=True)
        dqkv = torch.stack([g.unflatten(-1, (3, -1)) for g in gradients], 3)  # (2, T, 3, H, D)
        return torch.cat(outs, -1), torch.stack(lses, 1), dqkv.flatten(2)

    def forward_runs(self, names: Iterable[str]) -> dict[str, Run]:
        def run(name: str) -> tuple[Tensor, ...]:
            qkv, _ = self.inputs
            return forward_by(name, qkv, self.n_head)

        return {name: functools.partial(run, name) for name in names}

    def backward_runs(self, names: Iterable[str], forward: str) -> dict[str, Run]:
        """forward: by whom the pass before them was, one that was found right."""
        @functools.cache
        def saved() -> tuple[Tensor, Tensor]:
            return forward_by(forward, self.inputs[0], self.n_head)

        def run(name: str) -> tuple[Tensor, ...]:
            qkv, dout = self.inputs
            return (backward_by(name, dout, qkv, *saved(), self.n_head),)

        return {name: functools.partial(run, name) for name in names}

    def key(self, kernel: str) -> tiles.Key:
        """The row of kernels/tiles.py for one of TILED."""
        return kernel, tiles.arch(self.device), self.C // self.n_head

    def tile_runs(self, kernel: str, names: Iterable[str]) -> dict[str, Run]:
        """The pass that one of TILED belongs to, with tiles of its row by their names. The other
        kernel of the backward pass has the same tile in all of them."""
        key = self.key(kernel)
        named = {str(tile): tile for tile in tiles.TABLE[key]}
        runs = self.forward_runs(["triton"])
        if kernel != "attention_forward":
            runs = self.backward_runs(["triton"], "triton")

        def run(tile: tiles.Tile) -> tuple[Tensor, ...]:
            with tiles.first(key, tile):
                return runs["triton"]()

        return {name: functools.partial(run, named[name]) for name in names}

    def forward_fault(self, got: tuple[Tensor, ...]) -> str:
        """What is wrong with (out, lse), "" for nothing."""
        out, lse, _ = self.exact
        return self._off("out", got[0], out, LIMITS[self.dtype]) or self._off(
            "lse", got[1], lse, LSE_LIMIT)

    def backward_fault(self, got: tuple[Tensor, ...]) -> str:
        """What is wrong with (dqkv,), "" for nothing."""
        parts = got[0].chunk(3, -1), self.exact[2].chunk(3, -1)  # each (., T, C)
        for name, part, exact in zip(("dq", "dk", "dv"), *parts, strict=True):
            if fault := self._off(name, part, exact, LIMITS[self.dtype]):
                return fault
        return ""

    def _off(self, tensor: str, got: Tensor, exact: Tensor, limit: float) -> str:
        got, exact = self.ends(got).cpu().double(), exact.cpu()  # the one judge not on trial
        off = ((got - exact).norm() / exact.norm()).item()
        return "" if off <= limit else f"{tensor} is off by {off:.1e}"  # NaN, and 0 / 0, too


def _exact_head(qkv: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(2, T, 3D), (2, T, D) in fp64 -> out (2, T, D), lse (2, T) in units of ln 2, dqkv."""
    with torch.enable_grad():
        qkv = qkv.requires_grad_()
        out = reference.attention(qkv, 1)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    q, k, _ = qkv.detach().chunk(3, -1)  # each (2, T, D)
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (2, T, T)
    future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    lse = scores.masked_fill(future, -math.inf).logsumexp(-1)  # (2, T)
    return out.detach(), lse * LOG2E, dqkv

