"""The check at the start of a GPU run, with an interpreter in the place of the GPU.

pytest tests/test_kernels_selfcheck.py
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import math
import subprocess
import sys

import pytest
import torch

from kernels import operators
from kernels import reference, selfcheck, tiles

CPU = torch.device("cpu")


def test_the_kernels_pass(monkeypatch):
    pick = tiles.pick

    def larger(kernel, arch, size):  # fp32 tiles are small, and take long to interpret
        return tiles.Tile(64, 64, 4) if kernel.startswith("attention") else pick(kernel, arch, size)

    monkeypatch.setattr(tiles, "pick", larger)
    ops, line = selfcheck.checked("triton", CPU)
    assert ops == operators.choose("triton", CPU)
    assert line.startswith("kernels: triton, checked in") and "bfloat16" in line


def crooked(qkv, n_head):
    return reference.attention(qkv, n_head) * 1.5


def crashing(*arguments):
    raise RuntimeError("ptxas died")


@pytest.mark.parametrize(
    "attention, said",
    [(crooked, "attention in bfloat16: o is off by 5.0e-01"), (crashing, "ptxas died")],
)
def test_a_wrong_kernel_is_named_and_not_used(attention, said, monkeypatch):
    def relu_squared(x):
        return reference.relu_squared(x)

    others = operators.TORCH._replace(relu_squared=relu_squared)
    monkeypatch.setattr(operators, "choose", lambda *_: others._replace(attention=attention))
    with pytest.warns(UserWarning, match=said):
        ops, line = selfcheck.checked("auto", CPU)
    assert ops == others and said in line
    assert line.startswith("kernels: triton, attention by torch (")
    with pytest.raises(RuntimeError, match=said):
        selfcheck.checked("triton", CPU)


def test_an_error_that_is_no_number_is_the_largest():
    nan = operators.TORCH._replace(attention=lambda qkv, H: reference.attention(qkv, H) * math.nan)
    worst, faults = selfcheck.compare(nan, CPU, 64, speedrun=False)
    assert all(map(math.isnan, worst.values()))
    assert "attention in bfloat16: o is off by nan" in faults


def test_a_wrong_draw_is_named():
    wrong = operators.TORCH._replace(draw=lambda *inputs: reference.draw(*inputs) + 1)
    _, faults = selfcheck.compare(wrong, CPU, 64, speedrun=False)
    assert len(faults) == 2 and faults[0].startswith("draw in bfloat16: token is off by")


def test_for_drawing_text_the_loss_and_gradients_are_left_alone():
    """A loss that crashes is no fault there, nor is an attention that has no gradient."""
    crippled = operators.TORCH._replace(
        linear_cross_entropy=crashing, attention=lambda *z: reference.attention(*z).detach())
    _, faults = selfcheck.compare(crippled, CPU, 64, speedrun=False, training=False)
    assert faults == []
    _, faults = selfcheck.compare(crippled, CPU, 64, speedrun=False)
    assert len(faults) == 4


def test_the_reference_is_not_checked_against_itself():
    assert selfcheck.checked("auto", CPU) == (operators.TORCH, "kernels: torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a GPU")
@pytest.mark.parametrize("command", ["selfcheck", "bench"])
def test_commands_that_need_a_gpu_say_so(command):
    done = subprocess.run(
        [sys.executable, "-m", f"kernels.{command}"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "needs a GPU" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
