"""AdamW by PyTorch's fused update alone is torch.optim.AdamW to the bit."""

import pytest
import torch

from model.adamw import AdamW

SHAPES = [(5, 3), (7,), (300, 40), (1,)]
STEPS = 4


def weights(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
            for shape in SHAPES]


def groups_of(params: list[torch.nn.Parameter]) -> list[dict]:
    return [{"params": [p for p in params if p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0}]


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left_out", [(), (1, 3)])  # steps that found_inf keeps away
def test_it_is_torchs_to_the_bit(dtype, left_out):
    """Weights, moments and the number of updates, by a rate that changes."""
    ours, theirs = weights(dtype), weights(dtype)
    one = AdamW(groups_of(ours), 1e-2, (0.9, 0.95), 1e-8)
    two = torch.optim.AdamW(groups_of(theirs), 1e-2, (0.9, 0.95), 1e-8, fused=True)
    for step in range(STEPS):
        for optimizer, params in ((one, ours), (two, theirs)):
            give_gradients(params, step)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            if left_out:
                optimizer.grad_scale = torch.tensor(2.0)
                optimizer.found_inf = torch.tensor(float(step in left_out))
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert one.state[p].keys() == two.state[q].keys()
        assert all(torch.equal(one.state[p][key], two.state[q][key]) for key in one.state[p])
    assert one.updates == STEPS - len(left_out)
