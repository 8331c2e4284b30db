"""GPT-2's block with its backward pass written by hand, for the step on a GPU.

    fuse_blocks(model, passes, copies=True)      # blocks then compute themselves this way

model/gpt2.py's Block is the definition; here stand the same lines and their derivatives, so that
what autograd can't know is used: of the four biases two (b_proj, b_fc) are added by the pass that
comes next, which makes their gradients too; GELU's output is made again and never kept; the
gradients of matrices leave the matrix product in fp32; all vectors of a block are summed at once.
Counted on a stand-in for a GPU, a step of GPT-2 124M is 358 launches and copies so, and 622 with
the block that torch.compile makes.

Forward, on the stream x and the branch u that is yet to be added to it (all (B, T, C) but where it
is said otherwise; W and b are nn.Linear's, LN is LayerNorm):

    s1 = x + u
    y1 = LN1(s1)
    qkv = y1 W_attn^T + b_attn             (B, T, 3C)
    o = attention(qkv)
    a = o W_proj^T
    s2 = s1 + a + b_proj
    y2 = LN2(s2)
    f = y2 W_fc^T                          (B, T, 4C)
    g = gelu(f + b_fc)                     (B, T, 4C)
    m = g W_out^T + b_out                  and the block returns s2, m

Backward, with d for the derivative of the loss by what follows, and sums over all B T rows:

    dg = dm W_out                          dW_out = dm^T g,    db_out = sum dm
    df = dg gelu'(f + b_fc)                                    db_fc = sum df
    dy2 = df W_fc                          dW_fc = df^T y2
    ds2 += LN2's part of dy2                                   db_proj = sum ds2
    do = ds2 W_proj                        dW_proj = ds2^T o
    dqkv = attention's part of do                              db_attn = sum dqkv
    dy1 = dqkv W_attn                      dW_attn = dqkv^T y1
    ds1 = ds2 + LN1's part of dy1          and dx = du = ds1
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import operators
from kernels.constants import FUSED_WIDTH
from kernels.direct import refuse_second_derivative
from kernels.operators import Operators
from kernels.passes import Passes
from kernels.reference import at_least_fp32, product_dtype
from kernels.selfcheck import worse
from model.gpt2 import Block, GPTConfig

# Relative errors (Frobenius) of a block's outputs and gradients against autograd's in fp64. The
# interpreter shows up to 9e-3 in bf16, as autograd's own block does, and 6e-7 in fp32; a GPU's own
# exponentials and order of summation may double that, a wrong tile gives 0.1 and more.
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 2e-2 / 8, torch.float32: 1e-5}


class _Block(torch.autograd.Function):
    """The lines above. low: weights and biases of the products in the products' dtype; given: all
    parameters, where autograd is to have their gradients, else the block takes them itself."""

    @staticmethod
    def forward(ctx, x, branch, block, low, *given):
        parameters, passes, eps = given or block.parameters(), block.passes, block.eps
        ln_1, b_1, _, _, _, b_proj, ln_2, b_2, _, b_fc, _, _ = parameters
        W_attn, b_attn, W_proj, W_fc, W_out, b_out = low
        B, T, C = x.shape
        dtype = W_attn.dtype
        s1, y1, mean_1, rstd_1 = passes.layer_norm_forward(x, branch, None, ln_1, b_1, eps, dtype)
        if branch is None:
            s1 = x
        qkv = F.linear(y1, W_attn, b_attn)  # (B, T, 3C)
        o, lse = passes.attention_forward(qkv, block.n_head)
        a = F.linear(o, W_proj)
        s2, y2, mean_2, rstd_2 = passes.layer_norm_forward(s1, a, b_proj, ln_2, b_2, eps, dtype)
        f = F.linear(y2.view(-1, C), W_fc)  # (B T, 4C)
        g = passes.gelu_forward(f, b_fc)
        m = F.linear(g, W_out, b_out).view(B, T, C)
        ctx.save_for_backward(s1, y1, mean_1, rstd_1, qkv, o, lse, s2, y2, mean_2, rstd_2, f,
                              ln_1, ln_2, b_fc, W_attn, W_proj, W_fc, W_out)
        ctx.block, ctx.given, ctx.dtypes = block, bool(given), [p.dtype for p in parameters]
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)  # a stream that nobody read further has no gradient
        return s2, m

    @staticmethod
    def backward(ctx, ds2, dm):
        refuse_second_derivative("a block by hand")
        (s1, y1, mean_1, rstd_1, qkv, o, lse, s2, y2, mean_2, rstd_2, f,
         ln_1, ln_2, b_fc, W_attn, W_proj, W_fc, W_out) = ctx.saved_tensors
        passes, dtypes = ctx.block.passes, ctx.dtypes
        B, T, C = s1.shape
        stream, low = s1.dtype, W_attn.dtype
        # Sums of shares of the rows, a block's vectors side by side: LN1, LN2 and b_proj, b_fc,
        # b_attn and b_out.
        P = min(B * T, passes.programs(s1.device))
        partial = s1.new_empty((P, 13 * C), dtype=at_least_fp32(stream))
        of_ln_1, of_ln_2, of_fc, of_rest = partial.split_with_sizes(
            [2 * C, 3 * C, 4 * C, 4 * C], 1)

        if dm is None:  # nor one for a branch that nobody added
            dm = s2.new_zeros(s2.shape, dtype=low)
        dm = dm.reshape(-1, C).contiguous()
        dg = torch.mm(dm, W_out)  # (B T, 4C)
        df, g = passes.gelu_backward(f, b_fc, dg, of_fc)  # df takes dg's place
        dW_out = _weight_gradient(dm, g, dtypes[10])
        del dg, g
        dy2 = torch.mm(df, W_fc)
        dW_fc = _weight_gradient(df, y2.view(-1, C), dtypes[8])
        del df
        ds2, da = passes.layer_norm_backward(
            dy2, ds2, s2, ln_2, mean_2, rstd_2, of_ln_2, stream, low, True)
        del dy2
        da = (da if low != stream else ds2).view(-1, C)
        do = torch.mm(da, W_proj).view(B, T, C)
        dW_proj = _weight_gradient(da, o.view(-1, C), dtypes[4])
        del da
        dqkv = passes.attention_backward(do, qkv, o, lse, ctx.block.n_head).view(-1, 3 * C)
        del do
        passes.column_sums(dqkv, dm, of_rest)
        dy1 = torch.mm(dqkv, W_attn)
        dW_attn = _weight_gradient(dqkv, y1.view(-1, C), dtypes[2])
        del dqkv
        branch_dtype = ctx.branch_dtype or stream
        dx, du = passes.layer_norm_backward(
            dy1, ds2, s1, ln_1, mean_1, rstd_1, of_ln_1, stream, branch_dtype, False)
        if ctx.branch_dtype is None:
            du = None
        elif branch_dtype == stream:
            du = dx

        vectors = partial.sum(0).split_with_sizes([C, C, C, C, C, 4 * C, 3 * C, C])
        dln_1, db_1, dln_2, db_2, db_proj, db_fc, db_attn, db_out = vectors
        in_order = (dln_1, db_1, dW_attn, db_attn, dW_proj, db_proj, dln_2, db_2, dW_fc, db_fc,
                    dW_out, db_out)
        gradients = [d if d.dtype == dtype else d.to(dtype)
                     for d, dtype in zip(in_order, dtypes, strict=True)]
        if not ctx.given:
            ctx.block.take(gradients)
            return dx, du, None, None
        return dx, du, None, None, *gradients


def _weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T x. (N, O), (N, I) -> (O, I); for fp32 weights never rounded to bf16 on the way."""
    if dy.dtype == dtype:
        return torch.mm(dy.t(), x)
    if dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=dtype)
    return torch.mm(dy.t().to(dtype), x.to(dtype))  # CPUs have no product with an output so wide


class FusedBlock:
    """What a Block of model/gpt2.py asks instead of its own lines, where it has been given one.

    alone: its backward pass adds to its parameters' .grad by itself. Autograd would take a tenth of
    a block's time on the host to hand twelve gradients to twelve parameters, and add each to what
    is there by a launch of its own. Not under DDP and FSDP, which have to be told of each; nor for
    torch.autograd.grad() or parameters that are frozen: every .grad is written.
    """

    def __init__(self, block: Any, passes: Passes, alone: bool = False) -> None:
        self.passes, self.alone = passes, alone
        self.n_head, self.eps = block.attn.n_head, block.ln_1.eps
        self.low: list[Tensor] | None = None  # see copy_weights()
        attn, mlp = block.attn, block.mlp
        modules = (block.ln_1, attn.c_attn, attn.c_proj, block.ln_2, mlp.c_fc, mlp.c_proj)
        # Where each module has its parameters, which fsdp exchanges: block.parameters() would
        # search all modules at every call, and module.weight asks three dicts in turn.
        self.owners = [module._parameters for module in modules]

    def parameters(self) -> list[nn.Parameter]:
        """In the order of block.parameters()."""
        return [owner[name] for owner in self.owners for name in ("weight", "bias")]

    def product_weights(self) -> list[nn.Parameter]:
        """What matrix products read, in the order of _Block's low."""
        _, c_attn, c_proj, _, c_fc, mlp_c_proj = self.owners
        return [c_attn["weight"], c_attn["bias"], c_proj["weight"], c_fc["weight"],
                mlp_c_proj["weight"], mlp_c_proj["bias"]]

    def __call__(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """As Block.forward: (stream, branch) each (B, T, C)."""
        low, dtype = self.low, product_dtype(x.dtype, x.device)
        # Under fsdp they come in that dtype, and fp32 needs no copy; a block that is computed again
        # may have copies of a later forward pass, outside autocast or inside.
        if low is None or low[0].dtype != dtype:
            low = [weight.to(dtype) for weight in self.product_weights()]
        kind = x.device.type
        # Of an input without gradient (frozen embeddings, say) autograd would record nothing.
        given = () if self.alone and x.requires_grad else self.parameters()
        autocast = torch.is_autocast_enabled(kind)
        torch.set_autocast_enabled(kind, False)  # every dtype is chosen here
        try:
            return _Block.apply(x, branch, self, low, *given)
        finally:
            torch.set_autocast_enabled(kind, autocast)

    def take(self, gradients: list[Tensor]) -> None:
        """Adds to .grad what a backward pass has found, in the order of parameters()."""
        parameters = self.parameters()
        sums: list[Any] = [parameter.grad for parameter in parameters]
        if any(had is None for had in sums):
            for parameter, had, new in zip(parameters, sums, gradients, strict=True):
                parameter.grad = new if had is None else had + new
        else:
            torch._foreach_add_(sums, gradients)


def fuse_blocks(model: Any, passes: Passes, copies: bool, alone: bool = False) -> None:
    """Lets every block of a GPT compute itself by the lines of this file.

    copies: of weights that are fp32 here; under fsdp they are put together in the products' dtype.
    alone: as FusedBlock has it, on one rank.
    """
    for block in model.h:
        block.fused = FusedBlock(block, passes, alone)
    if copies:
        model.before_blocks = functools.partial(copy_weights, [block.fused for block in model.h])


@torch.no_grad()
def copy_weights(blocks: list[FusedBlock]) -> None:
    """Rounds all blocks' matrices to the products' dtype in a few launches, at the beginning of a
    forward pass: always of the weights as they are, so nobody has to say when those change.

    Read and written: 6 bytes a parameter, 0.2 ms of an H100's bandwidth at 124M (computed).
    """
    weights = [block.product_weights() for block in blocks]
    first = weights[0][0]
    dtype = product_dtype(first.dtype, first.device)
    if dtype == first.dtype:
        for block in blocks:
            block.low = None  # of an earlier pass, in autocast or before model.to(): no longer true
        return
    # A tensor for each of the six, (n_layer, ...): cut into blocks by one call.
    stacks = [w.new_empty((len(blocks), *w.shape), dtype=dtype).unbind() for w in weights[0]]
    copies = [list(low) for low in zip(*stacks, strict=True)]
    torch._foreach_copy_([w for low in copies for w in low], [w for low in weights for w in low])
    for block, low in zip(blocks, copies, strict=True):
        block.low = low


def fits(config: GPTConfig) -> bool:
    """Whether these lines are this network's, and its rows short enough."""
    return (config.arch == "gpt2" and config.gelu == "tanh" and not config.dropout
            and config.n_embd <= FUSED_WIDTH)


def check(passes: Passes, device: torch.device, n_embd: int, n_head: int) -> tuple[str, str]:
    """Holds a block on this very device against autograd's in fp64: (errors, faults), to print.

    As wide as it will train, for kernels differ by width; T = 77 leaves every tile a ragged end.
    """
    config = GPTConfig(n_layer=1, n_head=n_head, n_embd=n_embd, n_ctx=77, n_vocab=1)
    block = random_block(config, operators.TORCH).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        inputs = torch.randn(4, 1, 77, config.n_embd)  # x, branch, and the outputs' gradients
    inputs[1] = inputs[1].bfloat16()  # so that fp64 is given the same branch
    exact = outputs_and_gradients(block.double(), inputs.to(device).double(), None)
    block.float().fused = FusedBlock(block, passes)
    worst, faults = {}, []
    for dtype in (torch.bfloat16, torch.float32):
        limit, name = LIMITS[dtype], str(dtype).removeprefix("torch.")
        try:
            got = outputs_and_gradients(block, inputs.to(device), dtype)
        except Exception as error:  # a kernel that does not compile or launch is a fault too
            faults.append(f"in {name}: {type(error).__name__}: {error}")
            continue
        errors = {what: (got[what].cpu().double() - right.cpu()).norm() / right.cpu().norm()
                  for what, right in exact.items()}
        worst[name] = functools.reduce(worse, map(float, errors.values()))
        faults += [f"{what} in {name} is off by {off:.1e}"
                   for what, off in errors.items() if not off <= limit]  # NaN too
    shown = ", ".join(f"{name} {value:.0e}" for name, value in worst.items())
    return shown, "; ".join(faults)


def random_block(config: GPTConfig, ops: Operators) -> Block:
    """The same numbers each time."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        block = Block(config, ops, 0)
        for parameter in block.parameters():  # so that no LayerNorm has weight 1 and bias 0
            scale = 0.02 if parameter.dim() == 2 else 0.1
            parameter.add_(torch.randn(parameter.shape), alpha=scale)
    return block


def outputs_and_gradients(
    block: Block, inputs: Tensor, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """By name. inputs: x, branch and the gradients of both outputs, (4, B, T, C).

    The branch, and so its gradient, is of the products' dtype, as the block before this leaves it.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    x = inputs[0].clone().requires_grad_()
    branch = inputs[1].to(dtype if half else x.dtype, copy=True).requires_grad_()
    block.zero_grad(set_to_none=True)
    with torch.autocast(inputs.device.type, dtype if half else torch.bfloat16, enabled=half):
        stream, m = block(x, branch)
    torch.autograd.backward((stream, m), (inputs[2], inputs[3].to(m.dtype)))
    wanted = dict(block.named_parameters()) | {"dx": x, "dbranch": branch}
    gradients = {name: t.grad for name, t in wanted.items() if t.grad is not None}
    assert gradients.keys() == wanted.keys()
    return gradients | {"stream": stream.detach(), "branch": m.detach()}
