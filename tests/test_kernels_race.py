"""The race between implementations, with made-up ones and a made-up clock; and attention's passes,
as they are on a CPU.

pytest tests/test_kernels_race.py
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import types

import pytest
import torch

from kernels import candidates, operators
from kernels import race, reference, tiles

CPU = torch.device("cpu")
RIGHT = (torch.tensor([1.0, 2.0]),)
MILLISECONDS = {"triton": 0.95, "flash": 0.60, "cudnn": 0.72, "slow": 2.0}


def right():
    return RIGHT


def wrong():
    return (torch.tensor([1.0, 3.0]),)


def crashing():
    raise RuntimeError("no kernel image\nis available")


def unsteady():
    """The second time another last bit."""
    last, bits = iter((2.0, 2.0000002)), []

    def run():
        bits.append(next(last))
        return (torch.tensor([1.0, bits[-1]]),)

    return run


def fault_of(got):
    off = (got[0] - RIGHT[0]).norm().item()
    return f"y is off by {off:.1e}" if off > 1e-5 else ""


def raced(runs, repeatable=True):
    """The race among these, by MILLISECONDS."""
    clock = {run: MILLISECONDS[name] for name, run in runs.items()}
    findings = race.check(runs, fault_of)
    return race.decide(runs, findings, clock.__getitem__, repeatable)


def test_the_fastest_wins():
    result = raced({"triton": lambda: RIGHT, "cudnn": lambda: RIGHT, "slow": lambda: RIGHT})
    assert result == ("cudnn", "cudnn 0.72 ms, triton 0.95, slow 2.00")


def test_of_equally_fast_ones_the_first_wins():
    runs = {"triton": right, "cudnn": lambda: RIGHT}
    result = race.decide(runs, race.check(runs, fault_of), lambda run: 1.0, True)
    assert result.winner == "triton"


def test_the_fastest_is_wrong_and_left_out():
    result = raced({"triton": right, "flash": wrong})
    assert result == ("triton", "triton 0.95 ms, flash y is off by 1.0e+00")


def test_what_does_not_repeat_itself_is_left_out():
    result = raced({"triton": right, "cudnn": lambda: RIGHT, "flash": unsteady()})
    assert result == ("cudnn", "cudnn 0.72 ms, triton 0.95, flash not repeatable")


def test_what_does_not_repeat_itself_is_taken_where_right_is_enough():
    result = raced({"triton": right, "flash": unsteady()}, repeatable=False)
    assert result == ("flash", "flash 0.60 ms (not repeatable), triton 0.95")


def test_what_raises_is_named_in_a_line():
    result = raced({"triton": right, "cudnn": crashing})
    assert result == ("triton", "triton 0.95 ms, cudnn RuntimeError: no kernel image")


def test_what_raises_while_it_is_timed_is_named():
    def judge(run):
        return 1.0 if run is right else 1 / 0

    runs = {"flash": lambda: RIGHT, "triton": right}
    result = race.decide(runs, race.check(runs, fault_of), judge, True)
    assert result == ("triton", "triton 1.00 ms, flash ZeroDivisionError: division by zero")


def test_none_is_left():
    result = raced({"triton": wrong, "cudnn": crashing, "flash": unsteady()})
    assert result == (None, "triton y is off by 1.0e+00, cudnn RuntimeError: no kernel image, "
                            "flash not repeatable")


def test_bits_are_compared_and_not_numbers():
    """-0 equals 0, and NaN nothing: as bits it's the other way round."""
    zeros, nans = iter((0.0, -0.0)), torch.tensor([torch.nan])
    findings = race.check({"zeros": lambda: (torch.tensor([next(zeros)]),),
                           "nans": lambda: (nans,)}, lambda got: "")
    assert findings == {"zeros": "not repeatable", "nans": ""}


def test_what_one_rank_finds_holds_for_all():
    of_ranks = [{"a": "", "b": "not repeatable", "c": ""}, {"a": "", "b": "dq is off", "c": ""},
                {"a": "not repeatable", "b": "", "c": ""}]
    assert race.merge(of_ranks) == {"a": "not repeatable", "b": "dq is off", "c": ""}


# ---- attention ----


class AtenOfCPUs:
    """PyTorch's flash attention of CPUs, called as that of GPUs is. It, too, keeps natural
    logarithms."""

    @staticmethod
    def _scaled_dot_product_flash_attention(q, k, v, is_causal):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)

    @staticmethod
    def _scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, is_causal, seed, offset
    ):
        assert (cum_q, cum_k, max_q, max_k) == (None, None, q.shape[2], k.shape[2])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, dropout, is_causal)

    @staticmethod
    def _scaled_dot_product_cudnn_attention(q, k, v, bias, keep_lse, is_causal):
        """cuDNN's log-sum-exps have a fourth dimension, and must have it backward."""
        assert bias is None and keep_lse
        out, lse = AtenOfCPUs._scaled_dot_product_flash_attention(q, k, v, is_causal)
        return out, lse.unsqueeze(-1), "no sums"

    @staticmethod
    def _scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, is_causal
    ):
        assert lse.shape == (*q.shape[:3], 1), "The dim for input_names::Stats is invalid"
        lse = lse.squeeze(-1)
        return AtenOfCPUs._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, is_causal, seed, offset)


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(candidates, "aten", AtenOfCPUs)
    monkeypatch.setattr(tiles, "pick", lambda *_: tiles.Tile(64, 64, 4))
    return candidates.AttentionCase(3, 70, 2, 64, torch.bfloat16, CPU)


@pytest.mark.parametrize("forward", candidates.NAMES)
def test_every_forward_pass_is_right_and_keeps_the_same(case, forward):
    got = case.forward_runs([forward])[forward]()
    assert case.forward_fault(got) == ""
    assert [(x.shape, x.is_contiguous()) for x in got] == [((3, 70, 128), True), ((3, 2, 70), True)]


@pytest.mark.parametrize("forward", candidates.NAMES)
@pytest.mark.parametrize("backward", candidates.NAMES)
def test_every_backward_pass_goes_with_every_forward_pass(case, forward, backward):
    got = case.backward_runs([backward], forward)[backward]()
    assert case.backward_fault(got) == ""
    assert got[0].shape == (3, 70, 384) and got[0].is_contiguous()


def test_each_kernel_runs_with_each_tile_of_its_row_and_the_row_stays(monkeypatch):
    """Interpreted, with sm_80's rows."""
    seen, real = {}, tiles.pick

    def pick(kernel, arch, size):
        seen[kernel] = real(kernel, arch, size)
        return seen[kernel]

    monkeypatch.setattr(tiles, "pick", pick)
    case = candidates.AttentionCase(2, 70, 2, 64, torch.bfloat16, CPU)
    for kernel in candidates.TILED:
        row = tiles.TABLE[case.key(kernel)]
        faults = case.forward_fault if kernel == "attention_forward" else case.backward_fault
        runs = case.tile_runs(kernel, map(str, row))
        for tile, run in zip(row, runs.values(), strict=True):
            seen.clear()
            assert faults(run()) == ""
            assert seen[kernel] == tile
        assert tiles.TABLE[case.key(kernel)] == row


def test_what_is_exact_is_the_reference_in_fp64(case):
    qkv, dout = (x[[0, -1]].double() for x in case.inputs)
    out = reference.attention(qkv.requires_grad_(), 2)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    assert torch.allclose(case.exact[0], out, rtol=0, atol=1e-12)
    assert torch.allclose(case.exact[2], dqkv, rtol=0, atol=1e-12)


def test_a_log_sum_exp_in_another_unit_is_a_fault(case):
    out, lse = case.forward_runs(["triton"])["triton"]()
    assert case.forward_fault((out, lse / candidates.LOG2E)) == "lse is off by 3.1e-01"


def test_a_wrong_gradient_is_named(case):
    (dqkv,) = case.backward_runs(["triton"], "triton")["triton"]()
    dqkv[-1, :, 128:256] *= 1.1  # dk of the last sequence
    assert case.backward_fault((dqkv,)).startswith("dk is off by ")


def test_a_card_that_computes_nothing_is_a_fault(case):
    out, lse = case.forward_runs(["triton"])["triton"]()
    assert case.forward_fault((out * torch.nan, lse)) == "out is off by nan"


@pytest.mark.parametrize("passes", [("flash", "triton"), ("triton", "cudnn")])
def test_attention_by_two_is_one_operator(case, passes):
    """Traced, compiled, differentiated; in fp32, which PyTorch's don't know, by our kernel."""
    attention = candidates.attention_by(*passes)
    qkv, dout = case.inputs
    for dtype, limit in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
        x = qkv.to(dtype, copy=True).requires_grad_()
        compiled = torch.compile(lambda x: attention(x, 2), backend="aot_eager", fullgraph=True)
        out = compiled(x)
        (dqkv,) = torch.autograd.grad(out, x, dout.to(dtype))
        for got, exact in ((out, case.exact[0]), (dqkv, case.exact[2])):
            assert (got[[0, -1]] - exact).norm() < limit * exact.norm()
    empty = torch.empty(0, 8, 384, dtype=torch.bfloat16, requires_grad=True)
    attention(empty, 2).sum().backward()
    assert empty.grad.shape == empty.shape
    few = x[:1].detach().requires_grad_()
    torch.library.opcheck(torch.ops.gpt2.attention_by.default, (few, 2, *passes))


def test_ours_both_ways_is_the_operator_that_it_was():
    assert candidates.attention_by("triton", "triton") is operators.choose("triton", CPU).attention
    assert candidates.attention_by("torch", "torch") is reference.attention


def test_passes_by_torch_are_the_references(case):
    own = types.SimpleNamespace(_replace=lambda **passes: types.SimpleNamespace(**passes))
    passes = candidates.passes_by(own, "torch", "torch")
    qkv, dout = case.inputs
    out, kept = passes.attention_forward(qkv, 2)
    dqkv = passes.attention_backward(dout, qkv, out, kept, 2)
    assert torch.equal(out, reference.attention(qkv, 2))
    assert case.backward_fault((dqkv,)) == ""
