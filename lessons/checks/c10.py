"""Checks of lesson 10."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from launch.world import GROUPS_LEFT
from lessons.checks import describe, expect, expect_shape, same
from lessons.course import Wrong
from lessons.solutions import e10

ROUNDING = 1e-12  # doubles of size 1 in ten operations


def parameters(answer: Callable) -> None:
    for L, C, T, V in ((12, 768, 1024, 50257), (3, 8, 16, 100)):
        right = e10.parameters(L, C, T, V)
        same(f"parameters({L}, {C}, {T}, {V})", answer(L, C, T, V), right, {
            "the head is the embedding, and was counted again": right + V * C,
            "the positions have an embedding too": right - T * C,
            "the biases are missing": right - L * 9 * C,
            "the last LayerNorm is missing": right - 2 * C,
            "a block has two LayerNorms, and the end another": right - L * 2 * C - 2 * C,
            "a LayerNorm has a weight and a bias": right - L * 2 * C - C,
            "c_proj of the attention is missing": right - L * (C * C + C)})


def init_std(answer: Callable) -> None:
    for layers in (12, 8):
        for name in ("h.0.attn.c_proj.weight", "h.5.mlp.c_proj.weight"):
            right = 0.02 / math.sqrt(2 * layers)
            expect(f"init_std({name!r}, {layers})", answer(name, layers), right, ROUNDING, {
                "a block writes twice into the stream: sqrt(2 n_layer)": 0.02 / math.sqrt(layers),
                "variances add up, so it's the root": 0.02 / (2 * layers),
                "it writes into the stream, and is scaled down": 0.02,
                "scaled down, not up": 0.02 * math.sqrt(2 * layers)})
        for name in ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_fc.weight"):
            expect(f"init_std({name!r}, {layers})", answer(name, layers), 0.02, ROUNDING, {
                "it doesn't write into the stream": 0.02 / math.sqrt(2 * layers)})


def rows(answer: Callable) -> None:
    B, T = 2, 4
    for step, rank, ranks in ((0, 0, 1), (2, 1, 3), (1, 3, 4)):
        seen = answer(torch.arange(500), step, rank, ranks, B, T)
        if not isinstance(seen, tuple | list) or len(seen) != 2:
            raise Wrong(f"inputs and targets are asked for, not {describe(seen)}")
        at = f"at step {step} on rank {rank} of {ranks}"
        for what, tensor in zip(("inputs", "targets"), seen, strict=True):
            expect_shape(what, tensor, (B, T))
        x, y = seen[0].tolist(), seen[1].tolist()
        right = [tensor.tolist() for tensor in e10.rows(torch.arange(500), step, rank, ranks, B, T)]
        expect(f"the first input {at}", x[0][0], right[0][0][0], 0, {
            "all ranks took the same": step * ranks * B * T,
            "a step takes the sequences of all ranks": (step + rank) * B * T,
            "a rank begins a whole B x T after the one before": step * ranks * B * T + rank,
            "B T + 1 tokens are read, but the next rank begins B T further on":
                (step * ranks + rank) * (B * T + 1)})
        same(f"inputs {at}", x, right[0], {})
        same(f"targets {at}", y, right[1], {
            "the model would be shown what it has to say: a target is the token after its input": x,
            "a target is one token after its input, not two": [[t + 2 for t in row] for row in x],
            "a target is the token after its input": [[t - 1 for t in row] for row in x],
            "a row's last target was taken from its beginning (torch.roll)":
                [[*row[1:], row[0]] for row in x]})


def get_lr(answer: Callable) -> None:
    steps, warmup, peak, final = 100, 10, 6e-4, 0.1
    for step in (0, 4, 9, 10, 32, 55, 99):
        right = e10.get_lr(step, steps, warmup, peak, final)
        done, whole = (step - warmup) / (steps - warmup), step / steps
        falling = {
            "that is a straight line": peak * (1 - (1 - final) * done),
            "the cosine begins after the warm-up: (step - warmup) / (steps - warmup)":
                e10.get_lr(step + warmup, steps + warmup, warmup, peak, final)
                if step < warmup else peak * (final + (1 - final) * (1 + math.cos(
                    math.pi * whole)) / 2),
            "it ends at 0 instead of final x peak":
                peak * (1 + math.cos(math.pi * done)) / 2,
            "final is added to the whole cosine, whose share is 1 - final":
                peak * (final + (1 + math.cos(math.pi * done)) / 2),
            "that is a whole cosine": peak * (final + (1 - final) * (1 + math.cos(
                2 * math.pi * done)) / 2),
            "final is a share of the peak": final + (peak - final) * (1 + math.cos(
                math.pi * done)) / 2}
        rising = {"steps count from 0, and the first one has a rate too": peak * step / warmup,
                  "there is no warm-up": peak}
        expect(f"get_lr({step}, 100, 10, 6e-4, 0.1)", answer(step, steps, warmup, peak, final),
               right, ROUNDING, rising if step < warmup else falling)


def decayed(answer: Callable) -> None:
    shapes = {"wte.weight": (5, 4), "h.0.ln_1.weight": (4,), "h.0.ln_1.bias": (4,),
              "h.0.attn.c_attn.weight": (12, 4), "h.0.attn.c_attn.bias": (12,)}
    named = [(name, torch.zeros(shape)) for name, shape in shapes.items()]
    same("decayed", sorted(answer(iter(named))), ["h.0.attn.c_attn.weight", "wte.weight"], {
        "a LayerNorm's weight is called weight too, and has one axis":
            ["h.0.attn.c_attn.weight", "h.0.ln_1.weight", "wte.weight"],
        "embeddings have two axes and decay too": ["h.0.attn.c_attn.weight"],
        "biases and LayerNorms don't decay": sorted(shapes),
        "those are the ones that don't decay":
            ["h.0.attn.c_attn.bias", "h.0.ln_1.bias", "h.0.ln_1.weight"]})


class Line(nn.Module):
    """y = w x, and its squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.w * x - y).square().mean()


@contextmanager
def beside_an_idle_rank() -> Iterator[DistributedDataParallel]:
    """A model in DDP whose other rank has gradients of 0: averaging halves this one's."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(Line())
        model.register_comm_hook(None, halve)
        yield model
    finally:
        GROUPS_LEFT.append(dist.group.WORLD)  # launch/world.py says why
        dist.destroy_process_group()


def halve(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer() / 2)
    return done


def accumulate(answer: Callable) -> None:
    batches = torch.tensor([[[1.0, 3.0, 2.0]], [[2.0, -1.0, 4.0]], [[5.0, 1.0, 1.0]]],
                           dtype=torch.float64)  # (3 micro-steps, 1, T + 1)
    x, y = batches[..., :-1], batches[..., 1:]
    losses = (x - y).square().mean((1, 2))
    first, second, third = ((x - y) * 2 * x).mean((1, 2)).tolist()  # each one's gradient at w = 1
    with beside_an_idle_rank() as model:
        loss = answer(model, batches)
        gradient = model.module.w.grad
    if gradient is None:
        raise Wrong("the parameters have no gradient: is there a backward()?")
    total = first + second + third
    expect("the gradient of w, averaged over two ranks of which one has 0", gradient, total / 6,
           ROUNDING, {
        "each loss is divided by the number of micro-steps": total / 2,
        "the ranks never averaged": total / 3,
        "the first micro-step's gradient was averaged, and the last one's wasn't: DDP looks at its "
        "switch in the forward pass, so it has to be set before": first / 6 + (second + third) / 3,
        "the ranks averaged in every micro-step, once is enough: off in all but the last, and "
        "before the forward pass": ((first / 6 + second / 3) / 2 + third / 3) / 2,
        "gradients of earlier micro-steps are lost": third / 6,
        "a micro-step's loss was left out": (first + second) / 6})
    expect("the loss", loss, losses.mean().item(), ROUNDING, {
        "that is the last micro-step's share": losses[-1].item() / 3,
        "that is the last micro-step's": losses[-1].item(),
        "that is the sum": losses.sum().item(), "it is divided twice": losses.mean().item() / 3})


CHECKS = {"parameters": parameters, "init_std": init_std, "rows": rows, "get_lr": get_lr,
          "decayed": decayed, "accumulate": accumulate}
