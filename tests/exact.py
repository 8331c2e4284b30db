"""Holds a kernel, forward and backward, against the reference in fp64 and against PyTorch's own.

An error is relative, in the Frobenius norm, against kernels/reference.py in fp64 on the very same
inputs. Limits: fp32 1e-6, which is 8 unit roundoffs of 2^-23 for chains of up to some thousand
fp32 additions, whose errors average out; bf16 and fp16 1.2 x what PyTorch's own operator makes of
the same inputs, for both round the same intermediates. Every output is NaN before it is written.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

LIMIT = 1e-6


@pytest.fixture(autouse=True)
def poison():
    """Fills what torch.empty and new_empty return with NaN, for the kernels' outputs too."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def error(got: Tensor, exact: Tensor) -> float:
    """Relative; per element of size 1 where exact is 0, as dq and dk of a single key are."""
    assert got.isfinite().all()
    scale = exact.norm().item() or exact.numel() ** 0.5
    return (got.double() - exact).norm().item() / scale


def gradients(function, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """The outputs of a function, and its gradients for given gradients of the outputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(
        outputs, [g.to(y.dtype) for y, g in zip(outputs, upstream, strict=True)]
    )
    return [y.detach() for y in outputs] + [x.grad for x in inputs]


def compare(names: str, ours, torchs, inputs: list[Tensor], upstream: list[Tensor], exact=None):
    """Asserts each error, against LIMIT in fp32 and against PyTorch's own otherwise."""
    exact = gradients(exact or torchs, [x.double() for x in inputs], [g.double() for g in upstream])
    got = gradients(ours, inputs, upstream)
    own = gradients(torchs, inputs, upstream)
    for name, a, b, c in zip(names.split(), got, own, exact, strict=True):
        single = all(x.dtype == torch.float32 for x in inputs)
        limit = LIMIT if single else max(LIMIT, 1.2 * error(b, c))
        size = "x".join(map(str, inputs[0].shape))
        dtype = str(inputs[0].dtype).removeprefix("torch.")
        print(f"error {name:4} {dtype:8} {size:10} ours {error(a, c):.1e} torch {error(b, c):.1e}")
        assert error(a, c) <= limit, f"{name}: {error(a, c):.2e} > {limit:.2e}"


def loss_inputs(N: int, C: int, vocab: int, padded: int, dtype):
    h, weight = torch.randn(N, C).to(dtype), (torch.randn(padded, C) * C**-0.5).to(dtype)
    targets = torch.randint(0, vocab, (N,))
    targets[1::7] = -100
    targets[0], targets[2] = 0, vocab - 1  # first and last
    return h, weight, targets


def unfused(
    h: Tensor, weight: Tensor, targets: Tensor, vocab: int, softcap: float = 0.0
) -> Tensor:
    logits = (h @ weight.T)[:, :vocab]
    logits = logits.to(torch.promote_types(h.dtype, torch.float32))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets)
