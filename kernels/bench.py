"""Times every operator on the GPU at hand, beside PyTorch's own.

    python -m kernels.bench [--json]    each operator at GPT-2 124M, 64 x 1,024 tokens
    python -m kernels.bench --tune      ranks the tiles of kernels/tiles.py, prints its rows anew

Medians of triton.testing.do_bench, in milliseconds; TFLOP/s counts the causal half of attention,
GB/s the bytes that must move at least once; `limit` is the least time the card's printed rates
allow, as a share of the time measured. Needs a GPU, and prints nothing without one.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import embedding, operators, passes, reference, tiles
from kernels.cards import Card, by_name
from kernels.launches import SOFTCAP, VOCAB
from kernels.roofline import GPT2, Shape, Work, floor, work


class Timing(NamedTuple):
    operator: str
    by: str  # whose implementation
    milliseconds: float | None  # None: it does not run here
    work: Work


def median(function: Callable) -> float:
    """Milliseconds."""
    from triton.testing import do_bench

    return do_bench(function, return_mode="median")


def forward_backward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable:
    """One call of function and of its backward pass, with a gradient made beforehand."""
    dy = torch.randn_like(function(*inputs))
    wanted = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(function(*inputs), wanted, dy)


def sdpa(backend: SDPBackend, n_head: int) -> Callable[[Tensor], Tensor]:
    """PyTorch's attention out of the packed projection, with the transposes it needs."""

    def run(qkv: Tensor) -> Tensor:
        B, T, C3 = qkv.shape
        q, k, v = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(B, T, C3 // 3)

    return run


def contestants(ops: operators.Operators, s: Shape) -> list[tuple[str, str, Callable, Work]]:
    """(operator, whose, what to time, its work); each makes its inputs only when asked for."""
    N = s.B * s.T

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)

    qkv, branch = random(s.B, s.T, 3 * s.C), random(s.B, s.T, s.C)
    x = random(s.B, s.T, s.C, dtype=torch.float32)
    weight, bias = (random(s.C, dtype=torch.float32) for _ in range(2))
    h, head = random(N, s.C), random(s.V, s.C)
    targets = torch.randint(0, VOCAB, (N,), device="cuda")
    wide = random(s.B, s.T, 4 * s.C)
    angle = torch.rand(s.T, s.C // s.H // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()

    def norm(f: Callable) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return f(*inputs)[1]

        return run

    def unfused(h: Tensor, weight: Tensor, softcap: float = 0.0) -> Tensor:
        """What nanoGPT does: all logits at once, in fp32 for the loss."""
        logits = (h @ weight.T)[:, :VOCAB].float()
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, targets)

    def unfused_capped(h: Tensor, weight: Tensor) -> Tensor:
        return unfused(h, weight, SOFTCAP)

    def turned(f: Callable) -> Callable[[Tensor], Tensor]:
        return lambda qkv: f(qkv, s.H, cos, sin)

    attention: dict[str, Callable] = {
        "triton": lambda qkv: ops.attention(qkv, s.H),
        "torch flash": sdpa(SDPBackend.FLASH_ATTENTION, s.H),
        "torch cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, s.H),
    }
    layer_norm: dict[str, Callable] = {
        "triton": norm(ops.layer_norm),
        "torch": norm(reference.layer_norm),
        "torch.compile": torch.compile(norm(reference.layer_norm)),
    }
    loss: dict[str, Callable] = {
        "triton": lambda h, w: ops.linear_cross_entropy(h, w, targets, VOCAB),
        "torch": unfused,
        "torch.compile": torch.compile(unfused),
    }
    capped: dict[str, Callable] = {
        "triton": lambda h, w: ops.linear_cross_entropy(h, w, targets, VOCAB, softcap=SOFTCAP),
        "torch": unfused_capped,
        "torch.compile": torch.compile(unfused_capped),
    }
    qk_norm_rotary: dict[str, Callable] = {
        "triton": turned(ops.qk_norm_rotary),
        "torch": turned(reference.qk_norm_rotary),
        "torch.compile": torch.compile(turned(reference.qk_norm_rotary)),
    }
    relu_squared: dict[str, Callable] = {
        "triton": ops.relu_squared,
        "torch": reference.relu_squared,
        "torch.compile": torch.compile(reference.relu_squared),
    }
    parts = {
        name: work(name, s) for name in ("attention_forward", "attention_dq", "attention_dkdv")
    }
    both = Work(sum(p.bytes for p in parts.values()), 3.5 * parts["attention_forward"].flops)
    norms = [work(f"layer_norm_{d}", s) for d in ("forward", "backward")]
    losses = work("cross_entropy", s), work("lm_head", s)
    norm_both = Work(norms[0].bytes + norms[1].bytes, 0.0)
    loss_both = Work(losses[0].bytes + losses[1].bytes, losses[1].flops)
    norm_inputs = [x, weight, bias, branch]
    rows: list[tuple[str, str, Callable, Work]] = []
    for by, f in attention.items():
        rows.append(("attention", by, partial(no_grad, f, [qkv]), parts["attention_forward"]))
        rows.append(("attention + backward", by, partial(forward_backward, f, [qkv]), both))
    for by, f in layer_norm.items():
        rows.append(("layer_norm", by, partial(no_grad, f, norm_inputs), norms[0]))
        prepare = partial(forward_backward, f, norm_inputs)
        rows.append(("layer_norm + backward", by, prepare, norm_both))
    for by, f in loss.items():
        rows.append(("loss + backward", by, partial(forward_backward, f, [h, head]), loss_both))
    for by, f in capped.items():
        prepare = partial(forward_backward, f, [h, head])
        rows.append(("softcap loss + backward", by, prepare, loss_both))
    for name, contest, x in (
        ("qk_norm_rotary", qk_norm_rotary, qkv),
        ("relu_squared", relu_squared, wide),
    ):
        one, other = (work(f"{name}_{d}", s) for d in ("forward", "backward"))
        both = Work(one.bytes + other.bytes, 0.0)
        for by, f in contest.items():
            rows.append((name, by, partial(no_grad, f, [x]), one))
            rows.append((f"{name} + backward", by, partial(forward_backward, f, [x]), both))
    return rows


def contestants_by_hand(s: Shape) -> list[tuple[str, str, Callable, Work]]:
    """The passes of a block by hand that no operator above launches, as contestants()."""
    N, W = s.B * s.T, 4 * s.C

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype)

    x, branch, dy = random(N, s.C, dtype=torch.float32), random(N, s.C), random(N, s.C)
    vectors = random(3, s.C, dtype=torch.float32)
    wide, gradient, qkv = random(N, W), random(N, W), random(N, 3 * s.C)
    bias = random(W, dtype=torch.float32)
    statistics = x.mean(-1), x.var(-1).rsqrt()
    rows: list[tuple[str, str, Callable, Work]] = []
    for by, p in (("triton", passes.triton_passes()), ("torch", passes.REFERENCE)):
        sums = random(min(N, p.programs(x.device)), W, dtype=torch.float32)
        norm = partial(p.layer_norm_forward, x, branch, *vectors, 1e-5, torch.bfloat16)
        norm_backward = partial(p.layer_norm_backward, dy, x, x, vectors[1], *statistics,
                                sums[:, : 3 * s.C], torch.float32, torch.bfloat16, True)
        timed = {
            "layer_norm_forward_bias": norm,
            "layer_norm_backward_bias": norm_backward,
            "gelu_forward": partial(p.gelu_forward, wide, bias),
            "gelu_backward": partial(p.gelu_backward, wide, bias, gradient, sums),
            "column_sums": partial(p.column_sums, qkv, dy, sums),
        }
        for kernel, function in timed.items():
            prepare = partial(no_grad, function, [])
            rows.append((CALLED_BY[kernel], by, prepare, work(kernel, s)))
    return rows


def contestants_of_drawing(
    ops: operators.Operators, s: Shape
) -> list[tuple[str, str, Callable, Work]]:
    """What text is drawn with: a new token of each of s.B streams that are s.T long, as
    contestants()."""
    D = s.C // s.H
    qkv = torch.randn(s.B, 1, 3 * s.C, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(2, s.B, s.H, s.T, D, device="cuda", dtype=torch.bfloat16)
    position = torch.tensor([s.T - 1], device="cuda")
    logits = torch.randn(s.B, s.V, device="cuda", dtype=torch.bfloat16)[:, :VOCAB]
    u = torch.rand(s.B, device="cuda", dtype=torch.float64)
    rows: list[tuple[str, str, Callable, Work]] = []
    for by, f in (("triton", ops), ("torch", operators.TORCH)):
        timed = {
            "decode_attention": partial(f.decode_attention, qkv, kv, position, s.H),
            "draw": partial(f.draw, logits, u, 0.8, 50),
        }
        for kernel, function in timed.items():
            rows.append((CALLED_BY[kernel], by, partial(no_grad, function, []), work(kernel, s)))
    return rows


def contestants_of_embedding(s: Shape) -> list[tuple[str, str, Callable, Work]]:
    """GPT-2's two embeddings, fp32, as contestants(). The tokens are drawn evenly: a text has some
    that are far more frequent."""
    idx = torch.randint(0, VOCAB, (s.B, s.T), device="cuda")
    order = idx.flatten().argsort(stable=True).int()
    wte = torch.randn(s.V, s.C, device="cuda", requires_grad=True)
    wpe = torch.randn(s.T, s.C, device="cuda", requires_grad=True)
    one, other = work("embedding_forward", s), work("embedding_backward", s)
    both = Work(one.bytes + other.bytes, 0.0)
    rows: list[tuple[str, str, Callable, Work]] = []
    for by, f in (("triton", embedding.embedding), ("torch", reference.embedding)):
        def run(wte: Tensor, wpe: Tensor, f: Callable = f) -> Tensor:
            return f(idx, wte, wpe, order)[0]

        rows.append(("embedding", by, partial(no_grad, run, [wte, wpe]), one))
        rows.append(("embedding + backward", by, partial(forward_backward, run, [wte, wpe]), both))
    return rows


def everyone(ops: operators.Operators, s: Shape) -> list[tuple[str, str, Callable, Work]]:
    """All contestants."""
    return (contestants(ops, s) + contestants_by_hand(s) + contestants_of_embedding(s)
            + contestants_of_drawing(ops, s))


def no_grad(function: Callable, inputs: list[Tensor]) -> Callable:
    def run() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return run


def measure(
    ops: operators.Operators, s: Shape, left_out: tuple[str, ...] = ()
) -> list[Timing]:
    """left_out: whose implementations aren't timed."""
    timings = []
    for operator, by, prepare, needed in everyone(ops, s):
        if by in left_out:
            continue
        try:
            milliseconds = median(prepare())
        except RuntimeError as error:  # no cuDNN, too little memory: the others still count
            print(f"{operator}, {by}: {str(error).splitlines()[0]}", file=sys.stderr)
            milliseconds = None
        timings.append(Timing(operator, by, milliseconds, needed))
    return timings


def as_row(t: Timing, card: Card | None) -> dict:
    row = {"operator": t.operator, "by": t.by, "milliseconds": t.milliseconds}
    if t.milliseconds:
        seconds = t.milliseconds / 1e3
        row |= {"tflops": t.work.flops / seconds / 1e12, "gbs": t.work.bytes / seconds / 1e9}
        if card:
            row["limit"] = floor(t.work, card)[0] / seconds
    return row


def table(rows: list[dict]) -> str:
    lines = [f"{'operator':25} {'by':14} {'ms':>8} {'TFLOP/s':>8} {'GB/s':>6} {'limit':>6}"]
    for r in rows:
        cells = [f"{r['operator']:25} {r['by']:14}"]
        if r["milliseconds"]:
            cells.append(f"{r['milliseconds']:8.3f} {r['tflops']:8.0f} {r['gbs']:6.0f}")
            cells.append(f"{r['limit']:6.0%}" if "limit" in r else "")
        lines.append(" ".join(cells))
    return "\n".join(lines)


CALLED_BY = {  # what launches a kernel
    "attention_forward": "attention",
    "attention_dq": "attention + backward",
    "attention_dkdv": "attention + backward",
    "layer_norm_forward": "layer_norm",
    "layer_norm_backward": "layer_norm + backward",
    "cross_entropy": "loss + backward",
    "cross_entropy_softcap": "softcap loss + backward",
    "qk_norm_rotary_forward": "qk_norm_rotary",
    "qk_norm_rotary_backward": "qk_norm_rotary + backward",
    "relu_squared_forward": "relu_squared",
    "relu_squared_backward": "relu_squared + backward",
    "layer_norm_forward_bias": "layer_norm with bias",
    "layer_norm_backward_bias": "its backward alone",
    "gelu_forward": "gelu with bias",
    "gelu_backward": "its backward alone, and y",
    "column_sums": "column sums",
    "embedding_forward": "embedding",
    "embedding_backward": "embedding + backward",
    "decode_attention": "attention to a cache",
    "draw": "draw of a token",
}


def sized(kernel: str, size: int, s: Shape) -> Shape:
    """s with heads, or rows, of the size of one row of kernels/tiles.py, and as many elements."""
    if kernel.startswith(("attention", "decode_attention", "qk_norm_rotary")):
        return s._replace(H=s.C // size)
    if kernel.startswith(("layer_norm", "embedding_forward")):
        C = {1024: 768, 2048: 1600}.get(size, size)  # the widths of GPT-2 that such a row holds
        return s._replace(C=C, H=1, B=max(1, s.B * s.C // C))
    return s


def tune(ops: operators.Operators, s: Shape) -> None:
    """Times each candidate of each row of the table in the place where training calls it.

    Prints the row anew, best first. fp32's tiles, for checking, judge_step's and embedding_join's
    have no rivals.
    """
    here = tiles.arch(torch.device("cuda"))
    rows = [key for key in tiles.TABLE if key[0] in CALLED_BY and key[1] == here]
    for key in rows:
        kernel, arch, size = key
        shape = sized(kernel, size, s)
        calls = {row[:2]: row[2] for row in everyone(ops, shape)}
        shipped, ranked = tiles.TABLE[key], []
        for tile in shipped:
            tiles.TABLE[key] = (tile,)
            ranked.append((median(calls[CALLED_BY[kernel], "triton"]()), tile))
        tiles.TABLE[key] = shipped
        ranked.sort(key=lambda timed: timed[0])
        print(f"# {CALLED_BY[kernel]}: " + ", ".join(f"{ms:.3f} ms" for ms, _ in ranked))
        print(f'("{kernel}", "{arch}", {size}): ({", ".join(map(as_source, ranked))},),')


def as_source(ranked: tuple[float, tiles.Tile]) -> str:
    return f"Tile({', '.join(map(str, ranked[1]))})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tune", action="store_true", help="rank the tiles of kernels/tiles.py")
    parser.add_argument("--json", action="store_true", help="rows instead of a table")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels.bench needs a GPU; `python -m kernels.audit` needs none", file=sys.stderr)
        return 2
    ops = operators.choose("triton", torch.device("cuda"), head_width=64)
    if args.tune:
        tune(ops, GPT2)
        return 0
    name = torch.cuda.get_device_name()
    card = by_name(name)
    rows = [as_row(t, card) for t in measure(ops, GPT2)]
    if args.json:
        print(json.dumps({"gpu": name, "torch": torch.__version__, "rows": rows}, indent=1))
    else:
        print(name if card else f"{name}: not in kernels/cards.py, so no limits")
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
