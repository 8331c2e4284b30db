"""The loop of a plain PyTorch script, on the stand-in: what host.py compares the program's with.

    python -m tests.nullgpu.plain_loop OUT      # started by host.py; OUT/found.json: its clock

nanoGPT's way: the model compiled as a whole, bf16 autocast, all logits at once, fused AdamW, a
batch of slices at random places of an array of tokens; under DDP where there are ranks.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model.config import GPTConfig
from tests.bench.plain import PlainGPT
from tests.nullgpu.collectives import use_counted_group

STEPS, B, T = 200, 8, 1024
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
# cuDNN looks for a real card. torch then takes its own flash attention.
torch.backends.cuda.enable_cudnn_sdp(False)


class PlainLoss(PlainGPT):
    """(B, T) inputs and targets -> the loss."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = super().forward(idx)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def new_model() -> Any:
    model = PlainLoss(GPTConfig(n_vocab=50304)).cuda()
    compiled: Any = torch.compile(model)
    return DistributedDataParallel(compiled, device_ids=[0]) if RANKS > 1 else compiled


def get_batch(tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    """(B, T) inputs and targets, on the device."""
    places = torch.randint(len(tokens) - T, (B,))
    rows = [torch.from_numpy(tokens[i : i + T + 1].astype(np.int64)) for i in places]
    batch = torch.stack(rows).pin_memory().to("cuda", non_blocking=True)  # (B, T + 1)
    return batch[:, :-1], batch[:, 1:]


def main(out: Path) -> None:
    if RANKS > 1:
        use_counted_group(lambda text: None)
        dist.init_process_group("counted")
        torch.nn.parallel.distributed._verify_param_shape_across_processes = lambda *args: True
    model = new_model()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=6e-4, betas=(0.9, 0.95), fused=True)
    tokens = np.random.default_rng(1).integers(0, 50257, 1_000_000).astype(np.uint16)
    inputs, targets = get_batch(tokens)
    clock = []
    for _ in range(STEPS):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(inputs, targets)
        inputs, targets = get_batch(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        clock.append(("update", time.process_time()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    (out / "found.json").write_text(json.dumps({"clock": clock}))
    os._exit(0)  # libraries that are taken down would ask the card once more


if __name__ == "__main__":
    main(Path(sys.argv[1]))
