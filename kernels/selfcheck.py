"""Compares the kernels with the reference on the very GPU that is about to train, in seconds.

    python -m kernels.selfcheck
    ops, line = selfcheck.checked("auto", device, head_width=64)

Prints one line. Every operator runs forward and backward on random data, in bf16 and in fp32, and
each result is held against the reference in fp64. The interpreter has already shown that the
kernels compute the right thing; this shows that this GPU, driver and compiler do.
"""

import importlib.util
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import operators, reference, verdict
from kernels.constants import IGNORE, Choice

# Relative errors (Frobenius). What the interpreter shows is 2e-3 to 3e-3 in bf16 and 1e-7 to 6e-7
# in fp32; a GPU's own exponentials and order of summation may double that, a wrong tile gives 0.1
# and more. bf16: 2.5 unit roundoffs of 2^-8. fp32: 2^-16.6, room for a sum of thousands of terms.
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


def checked(
    choice: Choice,
    device: torch.device,
    head_width: int | None = None,
    weights: torch.dtype = torch.float32,
    speedrun: bool = True,
    training: bool = True,
) -> tuple[operators.Operators, str]:
    """The operators to train with, and one line to print. speedrun: check its network's, too;
    training: also what drawing text has no use for, the loss and all gradients.

    Where kernels were chosen they are compared first. If one disagrees with the reference, or fails
    to run, "triton" stops with a RuntimeError, and else its operator falls back to the reference,
    with a warning; both name operator, tensor and error.
    """
    ops = operators.choose(choice, device, head_width, weights)
    if ops is operators.TORCH:
        return ops, "kernels: torch"
    start = time.perf_counter()
    worst, faults = compare(ops, device, head_width or 64, speedrun, training)
    seconds = time.perf_counter() - start
    if not faults:
        shown = ", ".join(f"{name} {value:.0e}" for name, value in worst.items())
        return ops, f"kernels: triton, checked in {seconds:.1f} s (largest errors: {shown})"
    line = "kernels disagree with the reference: " + "; ".join(faults)
    if choice == "triton":
        raise RuntimeError(f"{line}; use --kernels torch")
    wrong = [name for name in ops._fields if any(f.startswith(f"{name} in ") for f in faults)]
    warnings.warn(f"{line}; {', '.join(wrong)} by torch", stacklevel=2)
    return operators.without(ops, wrong), f"kernels: triton, {', '.join(wrong)} by torch ({line})"


def checked_judge(device: torch.device) -> tuple[Callable, str]:
    """What judges training steps on a device (kernels/verdict.py), and a warning or nothing: on a
    GPU the kernel, if it has the definition's bits."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return verdict.judge_step, ""
    try:
        from kernels.judge_step import judge_step

        fault = judge_differs(judge_step, device)
    except Exception as error:  # one that does not compile or launch
        fault = f"{type(error).__name__}: {error}"
    if not fault:
        return judge_step, ""
    return verdict.judge_step, f"warning: steps are judged by PyTorch, for the kernel: {fault}"


def judge_differs(judge: Callable, device: torch.device) -> str:
    """On which of some steps a judge isn't the definition, to the bit; '' for none of them."""
    W, draw = 128, torch.Generator().manual_seed(0)
    limits = verdict.Limits(7.0, 0.01, 10, 10.0, outliers=True, halts=False)
    for count, streak, loss, norm in (
        (W, 0, 3.0, 1.0), (W, 0, 9.0, 1.0), (W, 0, 3.0, 9.0), (W, 1, 3.0, 9.0), (W, 1, 3.0, 11.0),
        (W, 0, math.nan, 1.0), (W, 0, 3.0, math.inf), (11, 0, 3.0, 1.0), (10, 0, 3.0, 99.0),
        (10, 1, 3.0, 99.0), (0, 0, 11.0, 2.0),
    ):
        windows = torch.tensor(((3.0,), (1.0,))) + 0.1 * torch.randn(2, W, generator=draw)
        windows[:, : W - count] = 0
        counts = torch.tensor((float(count), float(streak), 0.0))
        state = torch.cat((windows.flatten(), counts)).double()
        step = torch.tensor(loss), torch.tensor(norm)
        exact = verdict.judge_step(state, *step, None, 1.0, limits)
        got = judge(state.to(device), *(x.to(device) for x in step), None, 1.0, limits)
        for a, b in zip(got, exact, strict=True):
            if not torch.equal(a.cpu().nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0)):
                return f"a loss of {loss} and a norm of {norm} after {count} steps"
    return ""


def worse(one: float, other: float) -> float:
    """The larger error; NaN is the largest."""
    return one if math.isnan(one) or one > other else other


def compare(
    ops: operators.Operators, device: torch.device, head_width: int, speedrun: bool = True,
    training: bool = True,
) -> tuple[dict[str, float], list[str]]:
    """The largest error of each dtype, and for each tensor beyond its limit "OPERATOR in DTYPE: "
    and what is wrong."""
    worst, faults = {}, []
    for dtype, limit in LIMITS.items():
        name = str(dtype).removeprefix("torch.")
        worst[name] = 0.0
        for operator, tensors, inputs, run in _cases(dtype, device, head_width, speedrun):
            if operator in TRAINING_ONLY and not training:
                continue
            gradients = training and operator not in FORWARD_ONLY
            try:
                wide = [x.double() for x in inputs]
                exact = _results(getattr(reference, operator), run, wide, gradients)
                got = _results(getattr(ops, operator), run, inputs, gradients)
            except Exception as error:  # a kernel that does not compile or launch is a fault too
                faults.append(f"{operator} in {name}: {type(error).__name__}: {error}")
                continue
            for tensor, a, b in zip(tensors[: len(exact)], got, exact, strict=True):
                a, b = a.cpu().double(), b.cpu().double()  # the one judge that is not on trial
                off = ((a - b).norm() / b.norm()).item()
                worst[name] = worse(worst[name], off)
                if not off <= limit:  # NaN too, and 0 / 0 of a GPU that does nothing
                    faults.append(f"{operator} in {name}: {tensor} is off by {off:.1e}")
    return worst, faults


TRAINING_ONLY = ("linear_cross_entropy", "embedding")
FORWARD_ONLY = ("decode_attention", "draw")  # they have no gradients

Case = tuple[str, list[str], list[Tensor], Callable]


def _cases(
    dtype: torch.dtype, device: torch.device, D: int, speedrun: bool
) -> Iterator[Case]:
    """(operator, its tensors' names, inputs, how to call it). Sizes are odd on purpose.

    At T = 333 every tile has a ragged end, C = 768 fills three quarters of a block, and GPT-2's
    vocabulary has padding.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    B, T, H, C, N, V, padded = 1, 333, 2, 768, 24, 50257, 50304
    yield "attention", ["o", "dqkv"], [random(B, T, 3 * H * D)], lambda f, qkv: f(qkv, H)
    yield (
        "layer_norm",
        ["x + branch", "y", "dx", "dweight", "dbias", "dbranch"],
        [random(N, C), random(C), random(C), random(N, C)],
        lambda f, *inputs: f(*inputs),
    )
    targets = torch.randint(0, V, (N,), generator=generator).to(device)
    targets[::7] = IGNORE
    yield (
        "linear_cross_entropy",
        ["loss", "dh", "dweight"],
        [random(N, 64), random(padded, 64) / 8],
        lambda f, h, weight: f(h, weight, targets, V),
    )
    idx = torch.tensor([[0, 3, 3, 8], [3, 0, 3, 5]], device=device)
    order = idx.flatten().argsort(stable=True).int()
    yield (
        "embedding",
        ["x", "the head's wte", "dwte", "dwpe"],
        [random(9, C), random(6, C)],
        lambda f, wte, wpe: f(idx, wte, wpe, order),
    )
    position = torch.tensor([T - 30], device=device)
    yield (
        "decode_attention",
        ["o"],
        [random(2, 1, 3 * H * D), random(2, 2, H, T, D)],
        lambda f, qkv, kv: f(qkv, kv.clone(), position, H),
    )
    u = torch.tensor([0.3], dtype=torch.float64, device=device)
    vocab = 4200  # a block of the kernel's and some more, and padding
    yield (
        "draw",
        ["token"],
        [random(1, 4224)[:, :vocab]],
        lambda f, logits: F.one_hot(f(logits, u, 0.8, 50, 0.9), vocab).float(),
    )
    if not speedrun:
        return
    few = targets[:6]
    yield (
        "linear_cross_entropy",
        ["loss with softcap", "dh with softcap", "dweight with softcap"],
        [random(len(few), 64), random(padded, 64) / 8],
        lambda f, h, weight: f(h, weight, few, V, softcap=2.0),  # logits of 1: 2 bends them
    )
    angle = torch.arange(T)[:, None] * torch.linspace(1, 0, D // 2)  # (T, D/2)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    yield (
        "qk_norm_rotary",
        ["turned qkv", "dqkv"],
        [random(B, T, 3 * H * D)],
        lambda f, qkv: f(qkv, H, cos, sin, 1.36),
    )
    yield "relu_squared", ["y", "dx"], [random(N, C)], lambda f, x: f(x)


def _results(
    function: Callable, run: Callable, inputs: list[Tensor], gradients: bool
) -> list[Tensor]:
    """The outputs, and the gradients for the same gradients of the outputs each time.

    Those are rounded to bf16, so that every dtype holds them exactly.
    """
    inputs = [x.detach().clone().requires_grad_(gradients) for x in inputs]
    outputs = run(function, *inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not gradients:
        return list(outputs)
    generator = torch.Generator("cpu").manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs]
    torch.autograd.backward(outputs, upstream)
    return [y.detach() for y in outputs] + [x.grad for x in inputs]


def main() -> int:
    if not torch.cuda.is_available():
        print("kernels.selfcheck needs a GPU; without one, `make test` interprets the kernels")
        return 2
    try:
        print(checked("triton", torch.device("cuda"))[1])
    except (RuntimeError, ValueError) as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
