"""An operator outside of torch.compile: its function itself, without the operator around it.

    layer_norm = direct("layer_norm", launch_forward, remember, gradients)  # as register_autograd

torch.library takes the host 100 us for LayerNorm's forward and backward and 55 for the loss's (one
core of an EPYC), in which a GPU could have been given ten launches. But the compiler, dispatch
modes (a counter of FLOPs) and tensors without numbers are to have the operator: operator_wanted().
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def operator_wanted(x: Tensor) -> bool:
    """Whether who calls with this tensor is to have an operator: someone looks at what is called,
    or the tensor (a fake or meta one, a wrapper's) holds no numbers for a kernel."""
    return (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
            or type(x) not in (Tensor, Parameter) or x.is_meta)


def refuse_second_derivative(what: str) -> None:
    """For the beginning of a backward pass by kernels. Raises RuntimeError where autograd records
    it (create_graph). PyTorch's once_differentiable takes the host 20 us to find out."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} has no second derivative (create_graph=True): its kernels "
                           "would be missing from it")


def direct(what: str, launch: Callable, remember: Callable, gradients: Callable) -> Callable:
    """launch, with its derivative.

    what: its name, for an error. remember: (ctx, inputs, outputs); gradients: (ctx, *the outputs'
    gradients) -> the inputs'.
    """

    class Direct(torch.autograd.Function):
        # Not with a setup_context: for that PyTorch looks at the signature each time, 60 us.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = launch(*inputs)
            remember(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *of_outputs: Any) -> Any:
            refuse_second_derivative(what)
            return gradients(ctx, *of_outputs)

    return Direct.apply
