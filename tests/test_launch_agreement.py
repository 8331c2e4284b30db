"""Ranks that choose for themselves (by their own card, disk or node) agree, or say who is odd."""

import json
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict

import pytest
import torch

from data.config import DataConfig
from eval import loss
from eval.config import EvalConfig
from kernels import operators, selfcheck
from launch import folder
from launch.errors import BadInput, Failed
from launch.world import World
from model import parallel, training
from model.gpt2 import GPTConfig
from model.optim import MAX_OVERFLOWS, LossScaler
from presets import TrainConfig
from tests.running import ROOT, environment, flags, run
from train_gpt2 import train


class Peers(World):
    """Rank 0 of several, whose peers answer as they are told to."""

    answers: list

    def all_gather(self, value):
        return [value, *self.answers]

    def raise_on_all_ranks(self, error):
        """No peer has found an error."""
        if error:
            raise error


BF16 = {"--dtype": "bf16"}


def peers(*answers) -> Peers:
    world = Peers(0, 1 + len(answers), torch.device("cpu"))
    object.__setattr__(world, "answers", list(answers))
    return world


def run_ranks(script: str, ranks: int) -> subprocess.CompletedProcess:
    """A script under torchrun."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={ranks}", "--no-python", sys.executable, "-c",
         textwrap.dedent(script)],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
    )


def test_ranks_of_different_dtypes_are_named():
    with pytest.raises(BadInput) as found:
        peers(BF16, {"--dtype": "fp16"}, BF16).require_same(BF16)
    assert str(found.value) == (
        "the ranks don't agree on --dtype: rank 2 has fp16, and the others have bf16"
    )
    peers(BF16, BF16).require_same(BF16)


def test_ranks_that_were_started_with_other_flags_end_before_they_wait_for_each_other(tiny):
    done = run_ranks(f"""
        import json, os, train_gpt2
        from launch import cli
        from launch.errors import exit_process, one_line_errors
        with one_line_errors():
            flags = json.loads({json.dumps(json.dumps(flags(tiny(steps=2))))})
            flags += ["--eval_every", str(1 + int(os.environ["RANK"]))]
            exit_process(train_gpt2.train(cli.parse(
                train_gpt2.TrainConfig, train_gpt2.PRESETS, flags)))
        """, ranks=2)
    assert done.returncode != 0
    assert "the ranks don't agree on --eval_every: rank 1 has 2, and" in done.stderr
    assert "step " not in done.stdout


def test_places_may_be_called_otherwise_on_another_rank():
    here, there = (folder.same_on_all_ranks(asdict(TrainConfig(
        out_dir=place, data=DataConfig(dir=place), resume=place, init=place,
        evaluation=EvalConfig(hellaswag=place)))) for place in ("/a", "/b"))
    peers(there).require_same(here)
    assert here["--model.n_layer"] == 12 and here["--parallel"] == "ddp"


def test_a_run_whose_ranks_choose_another_dtype_ends_before_it_trains(tiny):
    done = run_ranks(f"""
        import json, os, train_gpt2
        from launch import cli
        from launch.errors import exit_process, one_line_errors
        if os.environ["RANK"] == "1":
            train_gpt2.choose_dtype = lambda asked, device: "bf16"
        with one_line_errors():
            flags = json.loads({json.dumps(json.dumps(flags(tiny(steps=2))))})
            exit_process(train_gpt2.train(cli.parse(
                train_gpt2.TrainConfig, train_gpt2.PRESETS, flags)))
        """, ranks=2)
    assert done.returncode != 0
    assert "the ranks don't agree on --dtype: rank 1 has bf16" in done.stderr
    assert "step " not in done.stdout


def test_one_rank_without_kernels_and_all_go_without(monkeypatch, capsys):
    """Kernels that fail the self-check on one card: its peers would train another model."""
    triton = operators.Operators(*"abc")
    monkeypatch.setattr(selfcheck, "checked", lambda *_, **__: (triton, "kernels: triton, checked"))
    able = [], "kernels: triton, checked"
    unable = list(operators.Operators._fields), "kernels: torch (dq is off by 0.3)"
    chosen = training.choose_operators(GPTConfig(), "auto", torch.float32, peers(able, unable))
    assert chosen == operators.TORCH
    assert capsys.readouterr().out == (
        "kernels: torch (dq is off by 0.3) on rank 2, and so on all\n"
    )
    everywhere = peers(able, able)
    assert training.choose_operators(GPTConfig(), "auto", torch.float32, everywhere) is triton


def test_one_rank_without_an_operator_and_all_go_without_that_one(monkeypatch, capsys):
    triton = operators.Operators(*operators.Operators._fields)
    monkeypatch.setattr(selfcheck, "checked", lambda *_, **__: (triton, "kernels: triton, checked"))
    one_wrong = ["layer_norm"], "kernels: triton, layer_norm by torch (dx is off by 0.3)"
    chosen = training.choose_operators(GPTConfig(), "auto", torch.float32, peers(one_wrong))
    assert chosen == triton._replace(layer_norm=operators.TORCH.layer_norm)
    assert capsys.readouterr().out == (
        "kernels: triton, layer_norm by torch (dx is off by 0.3) on rank 1, and so on all\n"
    )


@pytest.mark.parametrize(("sizes", "shape"), [((4, 4, 4, 4, 2, 2), (6,)), ((2, 2, 2, 2), (2, 2))])
def test_nodes_of_different_sizes_are_one_flat_group(monkeypatch, capsys, sizes, shape):
    """4 ranks on one node and 2 on another: a mesh of nodes would hang for ever."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(sizes[0]))
    made = []
    monkeypatch.setattr(parallel, "init_device_mesh",
                        lambda kind, shape, **names: made.append(shape))
    parallel._mesh(peers(*sizes[1:]))
    assert made == [shape]
    assert ("nodes of 2 and 4 ranks" in capsys.readouterr().out) == (shape == (6,))


def test_copies_of_a_shard_are_clipped_by_one_norm():
    """2 nodes of 2 ranks; the second node's sum is off by rounding, as another order makes it."""
    done = run_ranks("""
        import os
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        import torch
        from launch.world import init_distributed
        from model.gpt2 import GPT, GPTConfig
        from model.parallel import ParallelModel
        world = init_distributed()
        torch.manual_seed(0)
        config = GPTConfig(n_layer=1, n_head=2, n_embd=32, n_ctx=16)
        model = ParallelModel(GPT(config), "fsdp", world, "fp32")
        idx = torch.zeros(2, 16, dtype=torch.long)
        model(idx, idx).backward()
        if world.rank >= 2:
            for shard in model.shards:
                shard.param.grad.to_local().mul_(1 + 2**-20)
        norms = world.all_gather(model.gradient_norm().item())
        world.print0("norms differ" if len(set(norms)) > 1 else "one norm")
        world.destroy()
        """, ranks=4)
    assert "one norm" in done.stdout, done.stdout + done.stderr[-2000:]


def test_rank_0_alone_looks_whether_a_run_was_stopped(tiny, tmp_path, monkeypatch):
    """Rank 1 comes late and finds that rank 0 has deleted STOPPED: it must not leave by itself."""
    original, calls = loss.validation_batch, []

    def signalled(*rest):
        calls.append(1)
        if len(calls) == 3:  # the first batch of the last evaluation; one has two
            signal.raise_signal(signal.SIGTERM)
        return original(*rest)

    config = tiny(steps=2, eval_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(loss, "validation_batch", signalled)
        assert train(config) == 0
    assert (tmp_path / "tiny" / "STOPPED").exists()
    code, printed = run(config, ranks=2, FAULT='{"kind": "late", "rank": 1}')
    assert code == 0, printed[-3000:]
    rows = (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, rows) if "val_loss" in row] == [0, 2]
    assert "is finished" not in printed


# ---- fp16's loss scale ----


def test_a_loss_scale_comes_back_in_fp16_alone():
    fp16, fp32 = LossScaler.of("fp16"), LossScaler.of("fp32")
    fp16.state[0] = 1024.0
    saved, plain = fp16.state_dict(), fp32.state_dict()
    fp32.load_state_dict(saved)  # an fp16 run that goes on in fp32
    assert (fp32.enabled, fp32.scale) == (False, 1.0)
    fresh = LossScaler.of("fp16")
    fresh.load_state_dict(plain)  # an fp32 run that goes on in fp16
    assert (fresh.enabled, fresh.scale) == (True, 65536.0)
    fresh.load_state_dict(saved)
    assert fresh.scale == 1024.0


def test_every_overflow_is_an_event_and_too_many_in_a_row_end_the_run(tiny, tmp_path, monkeypatch):
    """Infinite gradients at a loss that is right: what a scale that is too large looks like."""
    monkeypatch.setattr("model.parallel.ParallelModel.gradient_norm",
                        lambda self: torch.tensor(float("inf")))
    with pytest.raises(Failed, match=f"{MAX_OVERFLOWS + 1} in a row"):
        train(tiny(dtype="fp16", steps=20, eval_every=20, save_every=20))
    rows = (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()
    events = [row["event"] for row in map(json.loads, rows) if "event" in row]
    assert len(events) == MAX_OVERFLOWS
    assert events[0] == "step 1: fp16 overflow, the loss scale falls to 32768"
