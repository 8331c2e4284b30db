"""QK-norm and rotary positions in one pass over the packed projection, forward and backward.

For the query or key x (D,) of every token and head, with its angles' c and s (D/2,), g = gain for
queries and 1 for keys, and halves x = (x_1, x_2):

    r = 1 / sqrt(sum x^2 / D + eps),   n = x r
    y_1 = g (n_1 c + n_2 s),   y_2 = g (n_2 c - n_1 s)

and backward, with the mean taken over the head:

    m = mean(dy y) = mean(dn n),   z = g dy - y m / g
    dx_1 = r (z_1 c - z_2 s),   dx_2 = r (z_1 s + z_2 c)

The last line is dx = r (dn - n m), the gradient of a norm, turned back as a whole: a rotation's
transpose is its inverse, so neither n nor dn is ever made. Hence y and r are all that has to be
kept of x, and y is what attention keeps anyway: 8 H bytes a token are saved (r, fp32), where
PyTorch saves x once more, 6 C in bf16. QK-norm: arXiv 2010.04245; rotary positions: arXiv
2104.09864.

Bytes a token in bf16: forward 12 C (all of qkv read and written; the values' part is a copy, since
an operator's output must not alias its input), backward 16 C (dy and the turned q and k read, dx
written). torch.compile can fuse the forward pass in as many; backward it has to keep x beside y
(6 C more of memory), or to make y anew for attention (6 C more of traffic). That much this pays
there; without torch.compile the reference is some twenty passes.

All arithmetic is fp32, whatever is stored. Shapes: N = B * T tokens, H heads, D head width (64 or
128), C = H * D, P rows of angles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launcher, tiles
from kernels.reference import product_dtype

HEAD_WIDTHS = (64, 128)


@triton.jit
def _angles(cos, sin, N, P, D: tl.constexpr, BLOCK: tl.constexpr):
    """The angles of this program's BLOCK tokens, c and s (BLOCK, D/2), for all of their heads."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    cells = (token % P).to(tl.int64) * (D // 2) + tl.arange(0, D // 2)[None, :]
    c = tl.load(cos + cells, mask=token < N, other=0.0).to(tl.float32)
    s = tl.load(sin + cells, mask=token < N, other=0.0).to(tl.float32)
    return c, s


@triton.jit
def _load_head(x, cells, inside, D: tl.constexpr):
    """Both halves of a head, (BLOCK, D/2) each in fp32; 0 from token N on."""
    first = tl.load(x + cells, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + cells + D // 2, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_head(x, cells, inside, first, second, D: tl.constexpr):
    """Writes both halves of a head, in x's dtype."""
    tl.store(x + cells, first.to(x.dtype.element_ty), mask=inside)
    tl.store(x + cells + D // 2, second.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _hand_on(source, to, cells, inside, H, D: tl.constexpr):
    """Copies the last H of the 3 H heads, the values' (or their gradients')."""
    for head in range(2 * H, 3 * H):
        at = cells + head * D
        tl.store(to + at, tl.load(source + at, mask=inside), mask=inside)
        tl.store(to + at + D // 2, tl.load(source + at + D // 2, mask=inside), mask=inside)


# N, P and H differ from call to call (generation) and from model to model: no variant for each.
@triton.jit(do_not_specialize=["N", "P", "H"])
def qk_norm_rotary_forward(
    qkv, cos, sin, out, rstd, N, P, H, gain, eps, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program, BLOCK tokens with all of their heads: grid (cdiv(N, BLOCK),).

    It alone writes these rows of out (N, 3C) and columns of rstd (2H, N). qkv: (N, 3C); cos, sin:
    (P, D/2), row (token mod P) for each.
    """
    c, s = _angles(cos, sin, N, P, D, BLOCK)
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (token < N)[:, None]
    cells = token[:, None] * (3 * H * D) + tl.arange(0, D // 2)[None, :]
    for head in range(2 * H):
        x1, x2 = _load_head(qkv, cells + head * D, inside, D)
        r = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / D + eps)  # r = 1 / sqrt(sum x^2 / D + eps)
        tl.store(rstd + tl.cast(head, tl.int64) * N + token, r, mask=token < N)
        g = tl.where(head < H, gain, 1.0)
        n1, n2 = x1 * (r * g)[:, None], x2 * (r * g)[:, None]  # g n
        # y_1 = g (n_1 c + n_2 s),   y_2 = g (n_2 c - n_1 s)
        _store_head(out, cells + head * D, inside, n1 * c + n2 * s, n2 * c - n1 * s, D)
    _hand_on(qkv, out, cells, inside, H, D)


@triton.jit(do_not_specialize=["N", "P", "H"])
def qk_norm_rotary_backward(
    dout, out, cos, sin, rstd, dqkv, N, P, H, gain, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program, BLOCK tokens with all of their heads: grid (cdiv(N, BLOCK),).

    It alone writes these rows of dqkv (N, 3C). dout, out: (N, 3C); cos, sin: (P, D/2); rstd:
    (2H, N).
    """
    c, s = _angles(cos, sin, N, P, D, BLOCK)
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (token < N)[:, None]
    cells = token[:, None] * (3 * H * D) + tl.arange(0, D // 2)[None, :]
    for head in range(2 * H):
        dy1, dy2 = _load_head(dout, cells + head * D, inside, D)
        y1, y2 = _load_head(out, cells + head * D, inside, D)
        r = tl.load(rstd + tl.cast(head, tl.int64) * N + token, mask=token < N, other=0.0)
        g = tl.where(head < H, gain, 1.0)
        m = tl.sum(dy1 * y1 + dy2 * y2, 1) / D  # m = mean(dy y)
        a, b = (r * g)[:, None], (r * m / g)[:, None]
        z1, z2 = dy1 * a - y1 * b, dy2 * a - y2 * b  # r z = r (g dy - y m / g)
        # dx_1 = r (z_1 c - z_2 s),   dx_2 = r (z_1 s + z_2 c)
        _store_head(dqkv, cells + head * D, inside, z1 * c - z2 * s, z1 * s + z2 * c, D)
    _hand_on(dout, dqkv, cells, inside, H, D)


@torch.library.custom_op("gpt2::qk_norm_rotary_forward", mutates_args=())
def _forward(
    qkv: Tensor, n_head: int, cos: Tensor, sin: Tensor, gain: float, eps: float
) -> tuple[Tensor, Tensor]:
    """qkv (B, T, 3C) -> its normalised and turned twin (B, T, 3C), r (2H, N)."""
    out, rstd = _forward_outputs(qkv, n_head, cos, sin, gain, eps)
    N, P, D = rstd.shape[1], cos.numel() // cos.shape[-1], 2 * cos.shape[-1]
    if N == 0:  # no token: nothing to launch
        return out, rstd
    tile = tiles.pick("qk_norm_rotary_forward", tiles.arch(qkv.device), D)
    launcher.launch(qk_norm_rotary_forward, (tiles.cdiv(N, tile.m),),
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), out, rstd, N, P, n_head, gain, eps,
        D=D, BLOCK=tile.m, num_warps=tile.warps,
    )
    return out, rstd


@_forward.register_fake
def _forward_outputs(qkv, n_head, cos, sin, gain, eps):
    B, T, _ = qkv.shape
    return qkv.new_empty(qkv.shape), qkv.new_empty((2 * n_head, B * T), dtype=torch.float32)


@torch.library.custom_op("gpt2::qk_norm_rotary_backward", mutates_args=())
def _backward(
    dout: Tensor, out: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor, n_head: int, gain: float
) -> Tensor:
    """dqkv (B, T, 3C)."""
    dqkv = _backward_outputs(dout, out, cos, sin, rstd, n_head, gain)
    N, P, D = rstd.shape[1], cos.numel() // cos.shape[-1], 2 * cos.shape[-1]
    if N == 0:
        return dqkv
    tile = tiles.pick("qk_norm_rotary_backward", tiles.arch(out.device), D)
    launcher.launch(qk_norm_rotary_backward, (tiles.cdiv(N, tile.m),),
        dout.contiguous(), out.contiguous(), cos.contiguous(), sin.contiguous(), rstd, dqkv,
        N, P, n_head, gain, D=D, BLOCK=tile.m, num_warps=tile.warps,
    )
    return dqkv


@_backward.register_fake
def _backward_outputs(dout, out, cos, sin, rstd, n_head, gain):
    return out.new_empty(out.shape)


def _remember(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # rstd has no gradient
    _, ctx.n_head, cos, sin, ctx.gain, _ = inputs
    out, rstd = output
    ctx.save_for_backward(out, cos, sin, rstd)


def _gradient(ctx, dout, drstd):
    dqkv = torch.ops.gpt2.qk_norm_rotary_backward(dout, *ctx.saved_tensors, ctx.n_head, ctx.gain)
    return dqkv, None, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_remember)


def qk_norm_rotary(
    qkv: Tensor, n_head: int, cos: Tensor, sin: Tensor, gain: float = 1.0, eps: float = 1e-6
) -> Tensor:
    """Normalises the queries and keys of every head, and turns them by their positions.

    qkv: (B, T, 3C), bf16, fp16 or fp32; cos, sin: of real angles, (T, D/2) or (B, T, D/2), which
    take no gradient. Each q and k (D,) is divided by its root mean square, then its pairs (x_i,
    x_{i + D/2}) are turned by their angle; q is multiplied by gain, which is not 0. Values are
    handed on. Returns (B, T, 3C) in qkv's dtype, or under autocast in its dtype. ValueError for
    another dtype or shape, or a head width other than 64 and 128. Defined by
    kernels/reference.py.
    """
    B, T, C3 = qkv.shape
    D = C3 // 3 // n_head
    if D not in HEAD_WIDTHS:
        raise ValueError(f"qk_norm_rotary kernel: head width 64 or 128, not {D}")
    for angles in (cos, sin):
        if angles.shape not in ((T, D // 2), (B, T, D // 2)):
            raise ValueError(
                f"qk_norm_rotary kernel: cos and sin of shape ({T}, {D // 2}) or "
                f"({B}, {T}, {D // 2}), not {tuple(angles.shape)}"
            )
    if gain == 0:
        raise ValueError("qk_norm_rotary kernel: a gain of 0 leaves no queries to go back by")
    qkv = qkv.to(product_dtype(qkv.dtype, qkv.device))
    tiles.check_dtype("qk_norm_rotary", qkv.dtype)
    return torch.ops.gpt2.qk_norm_rotary_forward(qkv, n_head, cos, sin, gain, eps)[0]
