"""Readies a model that is only read: to sample from, to serve or to judge.

    model = ready_to_read(model, "auto", device)    # in place
"""

import torch

from launch.config import ReadDtype
from launch.world import DTYPES, choose_dtype
from model.generate import store_in
from model.gpt2 import GPT
from model.int8_weights import store_in_int8
from model.packed_weights import pack


def ready_to_read(
    model: GPT, dtype: ReadDtype, device: torch.device, several: bool = True
) -> GPT:
    """Puts it on the device, with weights that won't change, its matrices in the number format that
    autocast will compute in, or in int8; on a CPU as it reads them fastest.

    dtype: as choose_dtype() takes it. several: texts at once. For one in bf16 nothing is gained by
    a second copy of the matrices. Raises BadInput where dtype can't be had.
    """
    chosen = choose_dtype(dtype, device)
    model.eval().requires_grad_(False)
    model.to(torch.float64 if chosen == "fp64" else torch.float32)
    if dtype == "int8":
        return store_in_int8(model, DTYPES[chosen])
    if chosen in ("bf16", "fp16"):
        store_in(model, DTYPES[chosen])  # cast once, and not in every pass
    model.to(device)
    return pack(model) if device.type == "cpu" and (several or chosen == "fp32") else model
