"""ddp, zero1 and fsdp train the same model on any number of ranks, and read each other's runs."""

import functools
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from launch.tracker import read_rows
from launch.world import init_distributed
from model import parallel
from model.gpt2 import GPTConfig
from model.network import compile_blocks, new_network, without_weights
from model.parallel import ParallelModel, buckets, rows_of
from model.training import ComputeConfig
from tests.running import ALONE, ROOT, environment, losses, run_several, wait_for_ranks, weights
from train_gpt2 import PRESETS, train

# fp64: another order of summation moves a sum by some 1e-16 of itself, Adam's division and five
# steps by a few hundred times that; a fault in scaling, or a row left out, moves it by 1e-3.
EQUAL = 1e-12
START = dict(dtype="fp64", steps=5, eval_every=5, save_every=5)
MODES = ("ddp", "zero1", "fsdp")


def difference(one: dict, two: dict) -> float:
    assert one.keys() == two.keys()
    return max((one[key] - two[key]).abs().max().item() for key in one)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_mode_trains_the_model_of_one_rank(tiny, tmp_path, ranks):
    """Accumulating over 1 and 6 micro-steps on 2 ranks, over 1 and 3 on 4; those also shared out
    as on 2 nodes of 2. Of three blocks fsdp takes two together and one alone."""
    start = START | dict(model=GPTConfig(n_layer=3, n_head=2, n_embd=32, n_ctx=16))
    train(tiny(name="one", **start))
    runs = {f"{mode} {micro}": tiny(name=f"{mode}-{micro}", parallel=mode, micro_batch=micro,
                                    **start)
            for mode in MODES for micro in (12, 1)}
    done = run_several(list(runs.values()), tmp_path, ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    if ranks == 4:
        hybrid = tiny(name="hybrid", parallel="fsdp", activation_checkpointing=True, **start)
        runs["hybrid"] = hybrid
        done = run_several([hybrid], tmp_path, ranks, PRETEND_LOCAL_WORLD_SIZE="2")
        assert done.returncode == 0, done.stderr[-3000:]
    one = weights(tmp_path / "one", 5)
    val = read_rows(tmp_path / "one" / "metrics.jsonl")[-1]["val_loss"]
    for name, config in runs.items():
        assert difference(one, weights(tmp_path / config.name, 5)) < EQUAL, name
        row = read_rows(tmp_path / config.name / "metrics.jsonl")[-1]
        assert row["val_loss"] == pytest.approx(val, abs=EQUAL), name


def test_blocks_by_hand_train_the_same_model_in_every_mode(tiny, tmp_path):
    """model/fused_block.py's lines under DDP, ZeRO-1 and FSDP2, accumulated and computed again.

    In bf16 they read copies, which have to be of the weights that the step before has made: with
    the first step's the losses would stay near where they began. Their blocks round in other places
    than autograd's, by 2^-9 of a number each, which moves a loss by less than 2^-11 of itself.
    """
    bf16 = dict(dtype="bf16", steps=6, eval_every=6, save_every=6)
    exact, rough = tiny(name="autograd", **START), tiny(name="autograd-bf16", **bf16)
    train(exact), train(rough)
    runs = [tiny(name=mode, parallel=mode, micro_batch=2, **START) for mode in MODES]
    runs.append(tiny(name="again", parallel="fsdp", activation_checkpointing=True, **START))
    rounded = [tiny(name=f"{mode}-bf16", parallel=mode, **bf16) for mode in ("ddp", "zero1")]
    done = run_several(runs + rounded, tmp_path, 2, BY_HAND="1")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = weights(tmp_path / exact.name, 5)
    for config in runs:
        assert difference(expected, weights(tmp_path / config.name, 5)) < EQUAL, config.name
    first, *_, last = [loss for _, loss in losses(tmp_path / rough.name)]
    assert last < first * (1 - 2**-7)  # it learns more than the tolerance
    for config in rounded:
        own_first, *_, own_last = [loss for _, loss in losses(tmp_path / config.name)]
        assert (own_first, own_last) == pytest.approx((first, last), rel=2**-11), config.name


def test_a_run_changes_ranks_and_mode_and_stays_the_same(tiny, tmp_path):
    """4 ranks in ddp, then 2 in fsdp, 3 in zero1, and 1: as if nothing had happened."""
    whole = tiny(name="whole", dtype="fp64", steps=8, eval_every=8, save_every=2)
    train(whole)
    moving = replace(whole, name="moving")
    for ranks, mode, stop in ((4, "ddp", 2), (2, "fsdp", 4), (3, "zero1", 6)):
        config = replace(moving, compute=ComputeConfig(dtype="fp64", parallel=mode))
        done = run_several([config], tmp_path, ranks, STOP_AT=str(stop))
        assert done.returncode == 0, done.stderr[-3000:]
        assert (tmp_path / "moving" / "STOPPED").exists()
    assert train(moving) == 0
    assert difference(weights(tmp_path / "whole", 8), weights(tmp_path / "moving", 8)) < EQUAL
    for (step, one), (other, two) in zip(
        losses(tmp_path / "whole"), losses(tmp_path / "moving"), strict=True
    ):
        assert step == other
        assert one == pytest.approx(two, abs=EQUAL)
    events = [r["event"] for r in read_rows(tmp_path / "moving" / "metrics.jsonl") if "event" in r]
    assert [e.split(" from ")[0] for e in events if e.startswith("resumed")] == [
        "resumed on 2 ranks", "resumed on 3 ranks", "resumed on 1 ranks",
    ]


def test_on_a_gpu_the_backward_pass_stays_in_this_thread(monkeypatch):
    monkeypatch.setattr("launch.world.choose_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with torch.autograd.set_multithreading_enabled(True):  # as it is by default, and after this
        assert init_distributed().device.type == "cuda"
        assert not torch._C._is_multithreading_enabled()


def test_the_gradients_norm_is_pytorchs_to_the_bit():
    torch.manual_seed(0)
    model = ParallelModel(new_network(GPTConfig(n_layer=2, n_head=2, n_embd=64, n_ctx=16)), "ddp",
                          ALONE, "fp32")
    for i, p in enumerate(model.module.parameters()):
        p.grad = torch.randn_like(p) * 10.0 ** (i % 7 - 3)
    gradients = [p.grad for p in model.module.parameters()]
    assert torch.equal(model.gradient_norm(), torch.nn.utils.get_total_norm(gradients))
    gradients[3][0] = math.nan
    assert model.gradient_norm().isnan()


def test_zero1_exchanges_its_rows_in_three_operations(tmp_path):
    """Packed, sent, unpacked; one after the other it was four for each of 148 parameters. What two
    ranks can't share out evenly takes a copy more; what is too much for one buffer, one more turn.
    """
    code, printed = wait_for_ranks(subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "-m", "tests.exchange"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment(),
    ), timeout=100)
    assert code == 0, printed
    [line] = [line for line in printed.splitlines() if line.startswith("{")]
    found = json.loads(line)
    send = "c10d._allgather_base_"
    exchange = ["aten._foreach_copy_", send, "aten.split_with_sizes_copy"]
    assert found["even"]["operators"] == exchange
    assert found["uneven"]["operators"][:3] == exchange
    assert set(found["uneven"]["operators"][3:]) == {"aten.copy_"}
    assert found["small buckets"]["operators"].count(send) > 5
    for name, run in found.items():
        assert run["equal"], name
        assert run["moved"], name


def test_buckets_hold_every_parameter_once_and_are_bounded():
    """124M's fit in one; 1558m's, 6 GB in fp32, in 12."""
    counts = {}
    for name in ("gpt2-124m", "gpt2-1558m"):
        model = ParallelModel(without_weights(PRESETS[name].model), "ddp", ALONE, "fp32")
        found = list(buckets(model.shards))
        assert [shard for bucket in found for shard in bucket] == model.shards
        sizes = [sum(shard.param.numel() for shard in bucket) for bucket in found]
        assert max(sizes) <= parallel.BUCKET
        counts[name] = len(found)
    assert counts == {"gpt2-124m": 1, "gpt2-1558m": 12}


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it meets
def test_compiled_blocks_stay_whole_under_ddp(monkeypatch, request):
    """A block of 1.7 MB is larger than DDP's first bucket, where Dynamo would cut its graph."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    # Not by monkeypatch, which would delete it afterwards: this module keeps its values elsewhere.
    request.addfinalizer(functools.partial(
        setattr, torch._dynamo.config, "optimize_ddp", torch._dynamo.config.optimize_ddp))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        counts = {}
        for whole in (True, False):
            torch._dynamo.reset()
            graphs.clear()
            module = new_network(GPTConfig(n_layer=1, n_head=2, n_embd=192, n_ctx=16))
            compile_blocks(module)
            if not whole:
                torch._dynamo.config.optimize_ddp = True  # as PyTorch has it
            idx = torch.zeros(1, 16, dtype=torch.long)
            DistributedDataParallel(module)(idx, idx).backward()
            counts[whole] = len(graphs)
    finally:
        dist.destroy_process_group()
    assert counts[True] == 1
    assert counts[False] > 1


def test_fsdp_in_bf16_is_near_to_ddp_in_bf16(tiny, tmp_path):
    """Under fsdp a block's biases and LayerNorms are bf16 too: another rounding of 2^-9 at most in
    each, which moves a loss near 10 by less than 0.01 in three steps."""
    runs = [tiny(name=mode, parallel=mode, dtype="bf16", steps=3) for mode in ("ddp", "fsdp")]
    done = run_several(runs, tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    for (_, one), (_, two) in zip(losses(tmp_path / "ddp"), losses(tmp_path / "fsdp"), strict=True):
        assert one == pytest.approx(two, abs=0.01)
    state = tmp_path / "fsdp" / "checkpoints" / "step_00000003" / "state.json"
    assert json.loads(state.read_text())["step"] == 3
    assert weights(tmp_path / "fsdp", 3)["h.0.ln_1.weight"].dtype == torch.float32


def test_activation_checkpointing_changes_nothing(tiny, tmp_path):
    train(tiny(name="plain", steps=3))
    train(tiny(name="twice", steps=3, activation_checkpointing=True))
    assert losses(tmp_path / "plain") == losses(tmp_path / "twice")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_rows_are_cut_as_torch_cuts_them(ranks):
    for count in (1, 2, 7, 16, 50304):
        chunks = torch.arange(count).chunk(ranks)
        for rank in range(ranks):
            expected = chunks[rank].tolist() if rank < len(chunks) else []
            assert list(rows_of(count, rank, ranks)) == expected


def test_fp16s_scale_leaves_the_gradient_as_it_is():
    """In fp32 a power of two goes into a sum and out of it without a rounding."""
    from model.gpt2 import GPT
    from model.optim import LossScaler
    from tests.saved import CONFIG

    idx = torch.randint(50257, (2, 17), generator=torch.Generator().manual_seed(0))
    found = []
    for value in (1.0, 65536.0):
        torch.manual_seed(0)
        model = ParallelModel(GPT(CONFIG), "ddp", ALONE, "fp32")
        (model(idx[:, :-1], idx[:, 1:]) * value).backward()
        model.unscale_gradients(value)
        found.append([model.gradient_norm(), *(shard.param.grad for shard in model.shards)])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))

    scaler = LossScaler.of("fp16")
    loss, norm = torch.tensor(3.0), torch.tensor(1.0)
    assert not any(scaler.update(loss, norm) for _ in range(1999))
    assert scaler.scale == 65536.0
    assert not scaler.update(loss, norm)
    assert scaler.scale == 131072.0
    assert scaler.update(loss, norm * math.inf)
    assert scaler.scale == 65536.0
    scaler.state[0] = 1.0
    assert not scaler.update(loss, norm * math.nan)  # no fault of the scale: the guard's affair


def test_a_run_of_three_ranks_that_goes_on_adds_up_in_the_same_order(tiny, tmp_path):
    """Two ranks have one order to add in. DDP used to lay out its buckets anew after a process's
    first step, and three ranks and more then added in another."""
    runs = []
    for mode, dtype in (("ddp", "fp32"), ("zero1", "fp32"), ("fsdp", "fp32"), ("ddp", "bf16")):
        name = f"{mode}-{dtype}"
        whole = tiny(name=name, parallel=mode, reduce_dtype=dtype, dtype="fp32", steps=4,
                     save_every=2, eval_every=4, batch_tokens=3 * 16 * 4, micro_batch=1)
        saved = tmp_path / name / "checkpoints" / "step_00000002"
        runs += [whole, replace(whole, name=f"{name}-again", resume=str(saved))]
    done = run_several(runs, tmp_path, 3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("resumed on 3 ranks") == 4
    for whole, again in zip(runs[::2], runs[1::2], strict=True):
        of_whole, of_again = (weights(tmp_path / run.name, 4) for run in (whole, again))
        assert difference(of_whole, of_again) == 0, whole.name
