"""The kernels as PyTorch operators: chosen, traced, compiled, counted, and in a whole model.

pytest tests/test_kernels_operators.py
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import operators
from kernels import attention, reference, tiles
from model.gpt2 import GPTConfig
from model.network import new_network

CPU = torch.device("cpu")
OPS = operators.choose("triton", CPU)


@pytest.fixture(autouse=True)
def one_tile(monkeypatch):
    monkeypatch.setattr(tiles, "pick", lambda *_: tiles.Tile(64, 64, 4))


def attention_inputs():
    return torch.randn(1, 33, 3 * 64, requires_grad=True), 1


def layer_norm_inputs(branch: bool):
    x, r = torch.randn(2, 9, 64, requires_grad=True), torch.randn(2, 9, 64, requires_grad=True)
    weight, bias = torch.randn(64, requires_grad=True), torch.randn(64, requires_grad=True)
    return x, weight, bias, (r if branch else None), 1e-5, torch.float32


def loss_inputs(gradient: bool):
    h, weight = torch.randn(9, 64, requires_grad=True), torch.randn(128, 64, requires_grad=True)
    return h, weight, torch.randint(0, 65, (9,)), 65, torch.float32, gradient, 0.0


def rotary(T: int, D: int = 64):
    """cos and sin, each (T, D/2)."""
    angle = torch.arange(T)[:, None] * torch.linspace(1, 0, D // 2)
    return angle.cos(), angle.sin()


def qk_norm_rotary_inputs():
    return torch.randn(2, 33, 3 * 64, requires_grad=True), 1, *rotary(33), 1.36, 1e-6


CASES = {
    "attention": ("attention_forward", attention_inputs()),
    "layer_norm": ("layer_norm_forward", layer_norm_inputs(False)),
    "layer_norm of a sum": ("layer_norm_forward", layer_norm_inputs(True)),
    "loss": ("linear_cross_entropy", loss_inputs(True)),
    "loss with softcap": ("linear_cross_entropy", (*loss_inputs(True)[:-1], 15.0)),
    "qk_norm_rotary": ("qk_norm_rotary_forward", qk_norm_rotary_inputs()),
    "relu_squared": ("relu_squared_forward", (torch.randn(3, 50, requires_grad=True),)),
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    """Schema, fake tensors, autograd registration and AOT dispatch, as PyTorch checks them."""
    name, inputs = CASES[case]
    torch.library.opcheck(getattr(torch.ops.gpt2, name).default, inputs)


def test_opcheck_of_the_backward_operators():
    out, dout, lse = torch.randn(1, 33, 64), torch.randn(1, 33, 64), torch.randn(1, 1, 33)
    qkv = torch.randn(1, 33, 192)
    torch.library.opcheck(torch.ops.gpt2.attention_backward.default, (dout, qkv, out, lse, 1))
    x, dy, weight, stat = torch.randn(9, 64), torch.randn(9, 64), torch.randn(64), torch.ones(9)
    for ds, narrow in ((None, torch.float32), (dy, torch.bfloat16)):
        inputs = (dy, ds, x, weight, stat, stat, torch.float32, narrow)
        torch.library.opcheck(torch.ops.gpt2.layer_norm_backward.default, inputs)
    inputs = (qkv, qkv, *rotary(33), torch.ones(2, 33), 1, 1.36)
    torch.library.opcheck(torch.ops.gpt2.qk_norm_rotary_backward.default, inputs)
    torch.library.opcheck(torch.ops.gpt2.relu_squared_backward.default, (dy, x))


class Block(torch.nn.Module):
    """A transformer's block and its loss, with each operator in the place it has in GPT-2."""

    def __init__(self, ops: operators.Operators, C: int = 128, vocab: int = 65):
        super().__init__()
        self.ops, self.vocab = ops, vocab
        self.wte = torch.nn.Embedding(128, C)
        self.ln_1, self.ln_2, self.ln_f = (torch.nn.LayerNorm(C) for _ in range(3))
        self.c_attn, self.c_proj = torch.nn.Linear(C, 3 * C), torch.nn.Linear(C, C)
        self.c_fc, self.c_out = torch.nn.Linear(C, 4 * C), torch.nn.Linear(4 * C, C)

    def forward(self, tokens, targets):
        norm = self.ops.layer_norm
        x, y = norm(self.wte(tokens), self.ln_1.weight, self.ln_1.bias)
        branch = self.c_proj(self.ops.attention(self.c_attn(y), 2))
        x, y = norm(x, self.ln_2.weight, self.ln_2.bias, branch)
        branch = self.c_out(F.gelu(self.c_fc(y), approximate="tanh"))
        _, y = norm(x, self.ln_f.weight, self.ln_f.bias, branch)
        return self.ops.linear_cross_entropy(
            y.flatten(0, 1), self.wte.weight, targets.flatten(), self.vocab
        )


def step(ops: operators.Operators, autocast: bool = False):
    """Loss and gradients of one step, from the same weights and tokens every time."""
    torch.manual_seed(0)
    model = Block(ops)
    tokens, targets = torch.randint(0, 65, (2, 2, 33))  # 33: a ragged tile
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(tokens, targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_a_training_step_equals_the_references():
    """fp32. The limits are the project's: loss 1e-5, every gradient 1e-4, relative."""
    loss, grads = step(OPS)
    right, exact = step(operators.TORCH)
    assert abs(loss - right) <= 1e-5 * right
    for name, grad in grads.items():
        assert (grad - exact[name]).norm() <= 1e-4 * exact[name].norm(), name


@pytest.mark.parametrize("arch", ["gpt2", "speedrun"])
def test_the_whole_model_compiles_into_one_graph(arch):
    """No graph breaks, and the eager reference's loss and gradients, with the same limits."""

    def once(ops, backend=None):
        torch.manual_seed(0)
        shape = dict(n_layer=2, n_head=2, n_embd=128, n_ctx=40, n_vocab=65)
        model = new_network(GPTConfig(arch=arch, **shape), ops)
        for parameter in model.parameters():
            if not parameter.any():  # the speedrun's zeros would let no gradient through
                torch.nn.init.normal_(parameter, 0.0, 0.1)
        tokens, targets = torch.randint(0, 65, (2, 2, 33))
        function = torch.compile(model, backend=backend, fullgraph=True) if backend else model
        loss = function(tokens, targets)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    (loss, grads), (right, exact) = once(OPS, "aot_eager"), once(operators.TORCH)
    assert abs(loss - right) <= 1e-5 * right
    for name, grad in grads.items():
        assert (grad - exact[name]).norm() <= 1e-4 * exact[name].norm(), name


def test_a_training_step_under_autocast():
    """bf16: both round about the same numbers, 2^-8 each, some ten times in a row."""
    loss, grads = step(OPS, autocast=True)
    right, exact = step(operators.TORCH, autocast=True)
    assert abs(loss - right) <= 2**-8 * right
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - exact[name]).norm() <= 10 * 2**-8 * exact[name].norm(), name


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    with FakeTensorMode():
        qkv = torch.empty(2, 40, 384, dtype=torch.bfloat16)
        assert OPS.attention(qkv, 2).shape == (2, 40, 128)
        x, weight = torch.empty(2, 40, 128), torch.empty(128)
        total, y = OPS.layer_norm(x, weight, weight, x.bfloat16())
        assert (total.dtype, y.shape) == (torch.float32, x.shape)
        targets = torch.empty(80, dtype=torch.long)
        loss = OPS.linear_cross_entropy(x.view(80, 128), torch.empty(256, 128), targets, 200)
        assert loss.shape == () and loss.dtype == torch.float32
        turned = OPS.qk_norm_rotary(qkv, 2, torch.empty(40, 32), torch.empty(40, 32))
        assert turned.shape == qkv.shape and turned.dtype == torch.bfloat16
        assert OPS.relu_squared(x).shape == x.shape


class Launches:
    """In a kernel's place: keeps the grid, and launches nothing."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **options: None


def test_more_heads_than_a_second_axis_holds(monkeypatch):
    """CUDA's grids end at 65,535 on all axes but the first."""
    launches = Launches()
    for name in ("attention_forward", "attention_dq", "attention_dkdv"):
        monkeypatch.setattr(attention, name, launches)
    qkv, n = torch.empty(1, dtype=torch.bfloat16).expand(70_000, 3 * 64), 70_000
    out, lse = torch.ops.gpt2.attention_forward(qkv.view(n, 1, 192), 1)
    torch.ops.gpt2.attention_backward(out, qkv.view(n, 1, 192), out, lse, 1)
    assert launches.grids == [(70_000,)] * 3


def test_an_empty_batch():
    """No token: outputs and gradients of the right shapes, a loss of 0, no gradient for weights."""
    for ops in (OPS, operators.TORCH):
        qkv = torch.empty(0, 8, 192, requires_grad=True)
        ops.attention(qkv, 1).sum().backward()
        assert qkv.grad.shape == qkv.shape
        qkv.grad = None
        ops.qk_norm_rotary(qkv, 1, *rotary(8)).sum().backward()
        assert qkv.grad.shape == qkv.shape
        z = torch.empty(0, 64, requires_grad=True)
        ops.relu_squared(z).sum().backward()
        assert z.grad.shape == z.shape
        x, weight = torch.empty(0, 64, requires_grad=True), torch.ones(64, requires_grad=True)
        total, y = ops.layer_norm(x, weight, weight, x)
        y.sum().backward()
        assert x.grad.shape == total.shape == x.shape and weight.grad.eq(0).all()
        h, head = torch.empty(0, 64, requires_grad=True), torch.ones(128, 64, requires_grad=True)
        loss = ops.linear_cross_entropy(h, head, torch.empty(0, dtype=torch.long), 65)
        loss.backward()
        assert loss == 0 and h.grad.shape == h.shape and head.grad.eq(0).all()


def test_export():
    class Attention(torch.nn.Module):
        def forward(self, qkv):
            return OPS.attention(qkv, 1)

    program = torch.export.export(Attention(), (torch.randn(1, 33, 192),))
    assert any("gpt2.attention_forward" in str(node.target) for node in program.graph.nodes)


def test_flops_are_counted_as_pytorch_counts_its_own():
    B, T, H, D = 2, 33, 2, 64
    C, N, padded = H * D, 20, 128
    qkv = torch.randn(B, T, 3 * C, requires_grad=True)
    q, k, v = torch.randn(3, B, H, T, D, requires_grad=True)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with FlopCounterMode(display=False) as ours:
        OPS.attention(qkv, H)
    with FlopCounterMode(display=False) as math, sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, k, v)
    assert ours.get_total_flops() == math.get_total_flops() == 4 * B * T * T * C
    with FlopCounterMode(display=False) as both:
        OPS.attention(qkv, H).sum().backward()
    assert both.get_total_flops() == (4 + 10) * B * T * T * C  # one product is made twice

    h, weight = torch.randn(N, C, requires_grad=True), torch.randn(padded, C, requires_grad=True)
    targets = torch.randint(0, 100, (N,))
    with FlopCounterMode(display=False) as loss:
        OPS.linear_cross_entropy(h, weight, targets, 100).backward()
    with FlopCounterMode(display=False) as plain:
        F.cross_entropy(h @ weight.T, targets).backward()
    assert loss.get_total_flops() == plain.get_total_flops() == 6 * N * C * padded


def test_what_the_kernels_cannot_do_is_said():
    with pytest.raises(ValueError, match="head width 64 or 128, not 32"):
        OPS.attention(torch.randn(1, 8, 96), 1)
    with pytest.raises(ValueError, match="not torch.float64"):
        OPS.attention(torch.randn(1, 8, 192, dtype=torch.float64), 1)
    with pytest.raises(ValueError, match="at most 8192, not 8193"):
        OPS.layer_norm(torch.randn(1, 8193), torch.randn(8193), torch.randn(8193))
    with pytest.raises(ValueError, match="head width 64 or 128, not 32"):
        OPS.qk_norm_rotary(torch.randn(1, 8, 96), 1, *rotary(8, 32))
    with pytest.raises(ValueError, match=r"shape \(8, 32\) or \(2, 8, 32\), not \(9, 32\)"):
        OPS.qk_norm_rotary(torch.randn(2, 8, 192), 1, *rotary(9))
    with pytest.raises(ValueError, match="gain of 0"):
        OPS.qk_norm_rotary(torch.randn(2, 8, 192), 1, *rotary(8), 0.0)


def test_choices_on_a_cpu(monkeypatch):
    assert operators.choose("torch", CPU) is operators.TORCH
    assert operators.choose("auto", CPU) is operators.TORCH  # the interpreter only where asked for
    assert OPS.attention is not reference.attention
    with pytest.raises(ValueError, match="64 or 128 wide, not 32"):
        operators.choose("triton", CPU, head_width=32)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="no GPU .*TRITON_INTERPRET=1"):
        operators.choose("triton", CPU)


def test_choices_on_a_gpu(monkeypatch):
    """Without one: what would be chosen on an H100, on a T4, and where heads are 32 wide."""
    gpu = torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert operators.choose("auto", gpu) == OPS == operators.choose("triton", gpu, 64)
    assert operators.choose("auto", gpu, head_width=32) is operators.TORCH
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert operators.choose("auto", gpu) is operators.TORCH
    with pytest.raises(ValueError, match="older than sm_80"):
        operators.choose("triton", gpu)


def test_rows_of_logits_go_through_the_softmax_as_a_cache_holds_them(monkeypatch):
    for vocab, rows in ((128, 6288), (50304, 16), (1_000_000, 1)):
        assert reference.rows_at_once(torch.empty(20, vocab, device="cpu")) == rows
    torch.manual_seed(0)
    logits, index = torch.randn(20, 128), torch.randint(100, (20, 1))

    def loss_and_gradient() -> torch.Tensor:
        changed = logits.clone()
        return torch.cat([reference.loss_of_chunk(changed, index, 100, 0.0, True), changed], 1)

    at_once = loss_and_gradient()
    monkeypatch.setattr(reference, "CACHED_ELEMENTS", 3 * 128)
    assert torch.equal(loss_and_gradient(), at_once)  # a row knows nothing of the others


def test_without_triton_the_reference_remains():
    """In a fresh process in which `import triton` fails."""
    code = """
import sys; sys.modules["triton"] = None
import torch, kernels.cards, kernels.audit, kernels.tiles, kernels.selfcheck
from kernels import operators
assert operators.choose("auto", torch.device("cpu")) is operators.TORCH
try: operators.choose("triton", torch.device("cpu"))
except ValueError as error: assert "not installed" in str(error), error
else: raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
