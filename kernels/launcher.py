"""kernel[grid](...), without asking Triton at every launch which compiled kernel that is.

    launch(layer_norm_forward, (N,), x, y, N, eps, BLOCK=1024, num_warps=4)

Triton finds it by looking at every argument, in Python: of the 16 us that a launch of LayerNorm
takes the host, and the 28 of attention, it needs 3 and 8 to launch (one core of an EPYC, on a
stand-in for a GPU that does nothing). Here a dict remembers what Triton found. All of this runs at
every launch, so it is written for the interpreter of Python: one flat key, one look at each
argument.

Its key holds all that a compiled kernel is made for, by Triton 3.6 to 3.8: the device, the
constants and options, the dtypes of pointers and tiles, and of integers (which Triton tells apart
by being 1, by being multiples of 16, and by their width) the very value, an entry for each.
Pointers that are not all multiples of 16 bytes go Triton's own way, as does whatever else is
special: the interpreter, AMD (where a tensor's size counts too), a profiler's hooks. What Triton's
knobs say of debugging, and a kernel's globals, count when it is launched for the first time.
"""

from typing import Any

import torch
from torch import Tensor
from triton import JITFunction, knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

# What Triton found: the kernel and what it was compiled to (which must live), its launcher, and
# what that is given.
_found: dict[tuple, tuple] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
    """kernel[grid](*args, **named). args: all but the constants; named: those, and the options."""
    if not isinstance(kernel, JITFunction) or torch.version.hip is not None:
        kernel[grid](*args, **named)
        return
    active = driver.active
    device = active.get_current_device()
    key = _key(kernel, device, args, named)
    found = _found.get(key)
    if found is None or _watched():
        compiled = kernel[grid](*args, **named)
        if key and compiled is not None:  # None: a hook of Triton's has kept it from compiling
            constants = tuple(named[name] for name in kernel.arg_names[len(args) :])
            _found[key] = (
                kernel, compiled, compiled.run, compiled.function, compiled.packed_metadata,
                constants)
        return
    _, _, run, function, metadata, constants = found
    x, y, z = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    run(x, y, z, stream, function, metadata, None, None, None, *args, *constants)


def _watched() -> bool:
    """Whether someone wants to hear of every launch."""
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        if hook and getattr(hook, "calls", True):
            return True
    return False


def _key(kernel: Any, device: int, args: tuple, named: dict[str, Any]) -> tuple:
    """What the compiled kernel depends on, or () for pointers that Triton is to look at."""
    # The kernel by its id, since Triton hashes it by its text, behind a lock; _found keeps it.
    kinds: list[Any] = [id(kernel), device]
    addresses = 0
    for arg in args:
        if isinstance(arg, Tensor):
            kinds.append(arg.dtype)
            addresses |= arg.data_ptr()
        elif isinstance(arg, TensorDescriptor):
            kinds += (arg.base.dtype, *arg.block_shape)
        elif isinstance(arg, float):  # never specialized
            kinds.append(float)
        else:  # numbers, and None where there is nothing
            kinds += (type(arg), arg)
    return () if addresses % 16 else (*kinds, *named, *named.values())
