"""Which implementations a run takes, with made-up ones and a made-up clock.

pytest tests/test_model_contest.py
"""

import tests.interpreter  # noqa: F401, I001  first: it decides how the kernels are defined

import json
from dataclasses import replace

import pytest
import torch

from kernels import candidates, operators, reference
from kernels import passes as kernel_passes
from kernels import selfcheck, tiles
from launch import folder
from launch.world import World
from model import contest, training
from model.contest import EAGER, Contest
from model.contest_cases import BY_HAND, COMPILED, BlockCase, require_room
from model.gpt2 import GPTConfig
from tests.running import ALONE
from tests.test_launch_agreement import peers, run_ranks
from train_gpt2 import train

CPU = torch.device("cpu")
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=128, n_ctx=20, n_vocab=1)
OURS = operators.TORCH._replace(attention=lambda qkv, n_head: reference.attention(qkv, n_head))


def parts_of(qkv, n_head):
    """Scores (B, H, T, T), and q, k, v, each (B, H, T, D), in fp32."""
    q, k, v = qkv.float().unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf), q, k, v


class Clock:
    """Which pass was run by whom, and the milliseconds that this took so far."""

    def __init__(self):
        self.now, self.timed, self.ran = 0.0, 0, []

    def judge(self, run):
        self.timed += 1
        start = self.now
        run()
        return self.now - start

    def forward(self, name, milliseconds):
        def run(qkv, n_head):
            self.now += milliseconds
            self.ran.append(name)
            scores, _, _, v = parts_of(qkv, n_head)
            out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            return out.to(qkv.dtype), scores.logsumexp(-1) * candidates.LOG2E

        return run

    def backward(self, name, milliseconds, noise=0.0):
        def run(dout, qkv, out, lse, n_head):
            self.now += milliseconds
            self.ran.append(name)
            scores, q, k, v = parts_of(qkv, n_head)
            p = (scores - lse.unsqueeze(-1) / candidates.LOG2E).exp()
            do = dout.float().unflatten(-1, (n_head, -1)).transpose(1, 2)  # (B, H, T, D)
            dp = do @ v.mT
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
            dqkv = torch.stack((ds @ k, ds.mT @ q, p.mT @ do), 2)  # (B, H, 3, T, D)
            dqkv = dqkv.permute(0, 3, 2, 1, 4).flatten(2)  # (B, T, 3C)
            return (dqkv * (1 + noise * (len(self.ran) % 2))).to(qkv.dtype)

        return run


@pytest.fixture
def clock(monkeypatch):
    """cuDNN's backward pass is the fastest that repeats itself, and flash's faster."""
    clock = Clock()
    for kernel in candidates.TILED:  # with one tile each
        monkeypatch.setitem(tiles.TABLE, (kernel, "sm_80", 64), (tiles.Tile(64, 64, 4),))
    monkeypatch.setattr(candidates, "FORWARD", candidates.FORWARD | {
        "triton": clock.forward("triton", 0.31), "flash": clock.forward("flash", 0.40),
        "cudnn": clock.forward("cudnn", 0.33)})
    monkeypatch.setattr(candidates, "BACKWARD", candidates.BACKWARD | {
        "triton": clock.backward("triton", 0.95), "cudnn": clock.backward("cudnn", 0.72),
        "flash": clock.backward("flash", 0.60, noise=2**-8)})
    monkeypatch.setattr(contest, "milliseconds", clock.judge)
    # Nothing is compiled, which would take its time.
    monkeypatch.setattr(contest, "compiled_loss", lambda: reference.linear_cross_entropy)
    return clock


def of(clock, world=ALONE, repeatable=True, **kept):
    return Contest(SHAPE, 3, torch.bfloat16, repeatable, kept, world, clock.judge)


def names(chosen):
    return chosen["attention_forward"], chosen["attention_backward"]


def test_the_fastest_of_each_pass_is_taken_and_the_line_says_why(clock, capsys):
    chosen, ops = contest.choose_attention(of(clock), OURS)
    assert names(chosen) == ("triton", "cudnn")
    assert capsys.readouterr().out == (
        "attention: forward triton 0.31 ms, cudnn 0.33, flash 0.40; "
        "backward cudnn 0.72, triton 0.95, flash not repeatable: triton + cudnn\n")
    clock.ran.clear()
    qkv = torch.randn(1, 20, 384, dtype=torch.bfloat16, requires_grad=True)
    ops.attention(qkv, 2).sum().backward()
    assert clock.ran == ["triton", "cudnn"]


def test_fastest_takes_what_does_not_repeat_itself(clock, capsys):
    chosen, _ = contest.choose_attention(of(clock, repeatable=False), OURS)
    assert names(chosen) == ("triton", "flash")
    assert "backward flash 0.60 (not repeatable), cudnn 0.72" in capsys.readouterr().out


def test_a_kernel_of_ours_that_the_self_check_found_wrong_takes_no_part(clock, capsys):
    without = operators.without(OURS, ["attention"])
    chosen, _ = contest.choose_attention(of(clock), without)
    assert names(chosen) == ("cudnn", "cudnn") and "triton" not in clock.ran
    assert "triton" not in capsys.readouterr().out


@pytest.mark.parametrize("table, said", [
    ("FORWARD", "attention: forward triton ZeroDivisionError: division by zero, flash "),
    ("BACKWARD", "flash 0.40; backward triton ZeroDivisionError: division by zero, flash ")])
def test_where_none_is_left_it_is_the_reference(clock, monkeypatch, capsys, table, said):
    monkeypatch.setattr(candidates, table, dict.fromkeys(candidates.NAMES, lambda *_: 1 / 0))
    chosen, ops = contest.choose_attention(of(clock), OURS)
    assert names(chosen) == ("torch", "torch") and ops.attention is reference.attention
    printed = capsys.readouterr().out
    assert said in printed and printed.endswith("division by zero: torch\n")


def test_what_another_rank_finds_counts_and_rank_0_decides(clock, capsys):
    found = {"triton": "", "flash": "", "cudnn": "out is off by 3.0e-01"}
    chosen, _ = contest.choose_attention(of(clock, _asked_alone(peers(found))), OURS)
    assert names(chosen) == ("triton", "triton")
    assert "cudnn out is off by 3.0e-01; backward triton 0.95" in capsys.readouterr().out


def _asked_alone(world: World) -> World:
    """Whose broadcasts go nowhere."""
    object.__setattr__(world, "broadcast_from_rank0", lambda function, *args: function(*args))
    return world


def test_two_ranks_that_measure_otherwise_take_the_same():
    """Rank 1 would take b; what it alone finds wrong is wrong for both."""
    done = run_ranks("""
        import torch
        from launch.world import init_distributed
        from model.contest import Contest
        world = init_distributed()
        runs = {name: lambda name=name: (torch.tensor([ord(name)]),) for name in "abc"}
        times = {"a": 2.0 + world.rank, "b": 3.0 - world.rank, "c": 1.0}
        clock = {run: times[name] for name, run in runs.items()}
        contest = Contest(None, 1, torch.bfloat16, True, {}, world, clock.__getitem__)
        result = contest.decide(
            runs, lambda got: "c is off" if world.rank == 1 and got[0] == ord("c") else "")
        world.print0(world.all_gather(result.winner), result.said)
        world.destroy()
        """, ranks=2)
    assert "['a', 'a'] a 2.00 ms, b 3.00, c c is off" in done.stdout, done.stderr[-2000:]


def test_a_choice_that_was_kept_is_checked_and_not_raced(clock, capsys):
    kept = {"attention_forward": "flash", "attention_backward": "triton"}
    chosen, _ = contest.choose_attention(of(clock, **kept), OURS)
    assert chosen == kept and set(clock.ran) == {"flash", "triton"}
    assert capsys.readouterr().out == (
        "attention: forward flash 0.40 ms; backward triton 0.95: flash + triton as before\n")


def test_a_choice_that_was_kept_and_fails_is_raced_anew(clock, monkeypatch, capsys):
    monkeypatch.setitem(candidates.FORWARD, "flash", lambda *_: 1 / 0)
    kept = {"attention_forward": "flash", "attention_backward": "triton"}
    chosen, _ = contest.choose_attention(of(clock, **kept), OURS)
    assert names(chosen) == ("triton", "cudnn")
    assert "forward flash ZeroDivisionError" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("kept", [{"attention_forward": "flash"}, {"attention_forward": 3},
                                  {"attention_forward": "x", "attention_backward": "flash"}])
def test_names_that_nobody_knows_are_no_choice(clock, kept):
    assert names(contest.choose_attention(of(clock, **kept), OURS)[0]) == ("triton", "cudnn")


# ---- blocks ----


class BlocksClock(Clock):
    def judge(self, run):
        self.timed += 1
        run()
        return (6.10, 7.02)[self.timed - 1]


def block_case(B=3, passes=kernel_passes.REFERENCE):
    return BlockCase(SHAPE, operators.TORCH, passes, B, torch.bfloat16, CPU)


@pytest.fixture
def eager(monkeypatch):
    """Nothing is compiled, which would take its time."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)


@pytest.mark.parametrize("B", [1, 2, 5])
def test_both_ways_to_compute_a_block_are_right(eager, B):
    case = block_case(B)
    for run in case.runs([BY_HAND, COMPILED]).values():
        assert case.fault(run()) == ""


def test_a_wrong_gradient_of_a_weight_is_a_fault():
    def double(dy, x, bias, sums):
        dx, y = kernel_passes.REFERENCE.gelu_backward(dy, x, bias, sums)
        return 2 * dx, y

    case = block_case(passes=kernel_passes.REFERENCE._replace(gelu_backward=double))
    assert " is off by " in case.fault(case.runs([BY_HAND])[BY_HAND]())


def test_the_faster_block_is_taken(eager, capsys):
    chosen = contest.choose_blocks(of(BlocksClock()), operators.TORCH, kernel_passes.REFERENCE)
    assert chosen == BY_HAND
    assert capsys.readouterr().out == "blocks: by hand 6.10 ms, compiled 7.02: by hand\n"


def test_a_kept_block_is_not_raced(eager, capsys):
    clock = BlocksClock()
    chosen = contest.choose_blocks(
        of(clock, blocks=COMPILED), operators.TORCH, kernel_passes.REFERENCE)
    assert (chosen, clock.timed) == (COMPILED, 1)
    assert capsys.readouterr().out == "blocks: compiled 6.10 ms: compiled as before\n"


def test_where_no_block_is_left_it_is_computed_as_it_is_defined(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: 1 / 0)
    broken = kernel_passes.REFERENCE._replace(gelu_forward=lambda *_: 1 / 0)
    assert contest.choose_blocks(of(Clock()), operators.TORCH, broken) == EAGER


def test_blocks_that_would_keep_too_much_are_left_out():
    require_room(40 * 2**30, 80 * 2**30)
    with pytest.raises(RuntimeError, match="would keep 41 GiB of the card's 80"):
        require_room(41 * 2**30, 80 * 2**30)


def test_blocks_by_hand_launch_the_attention_that_was_chosen(clock):
    def ran(ops, chosen):
        clock.ran.clear()
        passes = training.passes_of(ops, chosen)
        qkv = torch.randn(1, 20, 384)
        out, lse = passes.attention_forward(qkv.bfloat16(), 2)
        passes.attention_backward(out, qkv.bfloat16(), out, lse, 2)
        return clock.ran

    chosen = {"attention_forward": "cudnn", "attention_backward": "flash"}
    assert ran(OURS, chosen) == ["cudnn", "flash"]
    assert training.passes_of(OURS, {}) == kernel_passes.triton_passes()
    # Ours is wrong here, and there is no other: in fp32, say.
    passes = training.passes_of(operators.without(OURS, ["attention"]), {})
    qkv = torch.randn(1, 20, 384)
    assert torch.equal(passes.attention_forward(qkv, 2)[0], reference.attention(qkv, 2))


# ---- runs ----


@pytest.mark.parametrize("changes", [
    dict(choice="triton"), dict(choice="torch", ops=operators.TORCH), dict(ops=operators.TORCH),
    dict(dtype="fp32"), dict(dtype="fp64"), dict(shape=replace(SHAPE, dropout=0.1)),
    dict(shape=GPTConfig(arch="speedrun", document_mask=True))],
    ids=["triton", "torch", "fallen back", "fp32", "fp64", "dropout", "speedrun"])
def test_nothing_is_compared_where_there_is_no_choice(changes):
    settings = dict(shape=SHAPE, choice="auto", ops=OURS, dtype="bf16", B=1, source=None,
                    world=ALONE)
    assert contest.open_contest(**settings)
    assert contest.open_contest(**settings | changes) is None


def test_right_is_enough_for_fastest_alone_unless_all_is_deterministic(monkeypatch):
    def repeatable(choice):
        return contest.open_contest(SHAPE, choice, OURS, "bf16", 1, None, ALONE).repeatable

    assert repeatable("auto") and not repeatable("fastest")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert repeatable("fastest")


@pytest.fixture
def as_on_a_gpu(clock, monkeypatch):
    """A run on this CPU is told that our kernels can be had."""
    monkeypatch.setattr(selfcheck, "checked", lambda *_, **__: (OURS, "kernels: triton, checked"))
    monkeypatch.setattr(training, "open_contest", lambda *args: _judged_by(
        clock, contest.open_contest(*args)))
    return clock


def _judged_by(clock, opened):
    return opened and replace(opened, judge=clock.judge)


CHOSEN = {"attention_forward": "triton", "attention_backward": "cudnn", "loss": "compiled"}


def kept_by(path):
    return json.loads((path / "config.json").read_text())["resolved"]["kernels"]


def test_a_runs_choice_is_kept_and_holds_when_it_goes_on(tiny, tmp_path, as_on_a_gpu, capsys):
    config = tiny(steps=2, save_every=1, dtype="bf16")
    assert train(replace(config, saving=replace(config.saving, keep=9))) == 0
    run = tmp_path / "tiny"
    assert kept_by(run) == CHOSEN
    newest = run / "checkpoints" / "step_00000002"
    assert kept_by(newest) == kept_by(run)
    capsys.readouterr()

    candidates.BACKWARD["cudnn"] = as_on_a_gpu.backward("cudnn", 9.99)  # slow, today
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert train(config) == 0
    printed = capsys.readouterr().out
    assert "backward cudnn 9.99: triton + cudnn as before" in printed
    assert "loss: compiled 0.00 ms: compiled as before" in printed
    assert kept_by(run) == CHOSEN


def test_a_choice_is_kept_for_the_same_question_on_the_same_card_alone(tmp_path):
    chosen = {"attention_forward": "flash"}
    (tmp_path / "config.json").write_text(json.dumps({
        "config": {"compute": {"kernels": "auto"}}, "hardware": {"device": "NVIDIA H100"},
        "resolved": {"kernels": chosen}}))
    assert folder.kernels_kept(tmp_path, "auto", "NVIDIA H100") == chosen
    assert folder.kernels_kept(tmp_path, "fastest", "NVIDIA H100") == {}
    assert folder.kernels_kept(tmp_path, "auto", "NVIDIA A100") == {}


@pytest.mark.parametrize("text", [
    "{", "[]", '{"config": {"compute": {"kernels": "auto"}}, "hardware": {"device": "x"}}',
    '{"config": {"compute": {"kernels": "auto"}}, "hardware": {"device": "x"}, '
    '"resolved": {"kernels": [1]}}'])
def test_a_checkpoint_that_says_nothing_of_it_has_kept_nothing(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert folder.kernels_kept(tmp_path, "auto", "x") == {}
