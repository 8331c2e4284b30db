"""The record of a run, its command line, and the ranks' agreement."""

import json
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from contextlib import closing
from dataclasses import asdict, replace

import pytest
import torch
from torch.distributed.run import get_args_parser

from launch import tracker
from launch.cli import as_flags, parse
from launch.errors import BadInput
from launch.folder import require_same_run
from launch.tracker import clock, cut_after, read_rows
from launch.world import World, choose_dtype
from tests.running import ALONE, ROOT, environment, flags, run_program
from train_gpt2 import PRESETS, TrainConfig, train


def test_metrics_are_cut_after_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "tokens": step, "x": 0.1 + step} for step in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "to')
    cut_after(path, 3)
    assert read_rows(path) == rows[:4]
    cut_after(path, -1)
    assert read_rows(path) == []


def test_times_are_readable():
    assert [clock(s) for s in (0, 75, 3599.6, 4210)] == ["0m00s", "1m15s", "1h00m", "1h10m"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_survives_its_file(tmp_path, preset):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": asdict(PRESETS[preset])}))
    assert parse(TrainConfig, PRESETS, [str(path)]) == PRESETS[preset]
    path.write_text(json.dumps(asdict(PRESETS[preset])))
    assert parse(TrainConfig, PRESETS, [str(path), "--steps", "7"]) == replace(
        PRESETS[preset], steps=7
    )


def test_flags_win_over_the_preset():
    config = parse(TrainConfig, PRESETS, ["demo", "--optim.lr", "1", "--compile", "True"])
    assert config.optim.lr == 1
    assert config.compute.compile is True
    assert config.model == PRESETS["demo"].model


def test_no_flag_is_swallowed_by_torchrun():
    """torchrun's parser takes an abbreviation of its own options even after the script's name, and
    dies where it's ambiguous (pytorch#120601)."""
    parser: ArgumentParser = get_args_parser()
    own = {option for action in parser._actions for option in action.option_strings}
    for flag in as_flags(asdict(PRESETS["demo"]))[::2]:
        assert not [option for option in own if option.startswith(flag)], flag


def test_an_error_of_one_rank_stops_all_and_rank_0_speaks(tmp_path):
    script = tmp_path / "one_fails.py"
    script.write_text(
        "from launch.errors import BadInput, one_line_errors\n"
        "from launch.world import init_distributed\n"
        "def step():\n"
        "    if world.rank == 1: raise BadInput('no data here')\n"
        "with one_line_errors():\n"
        "    world = init_distributed()\n"
        "    assert world.all_reduce_sum(world.rank, 1) == [1, 2]\n"
        "    assert world.all_reduce_max(-world.rank) == 0\n"
        "    assert world.broadcast_from_rank0(lambda: world.rank) == 0\n"
        "    with world.fail_together(): step()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(script)],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    assert done.stderr.count("error: rank 1: no data here") == 1
    assert "one_fails.py\", line" not in done.stderr  # torchrun's own traceback is not ours
    assert "exitcode  : 2" in done.stderr


def test_what_differs_is_listed(tmp_path):
    config = {"config": {"init": "hf:gpt2"}}
    saved = config | {"must_match": {"model": {"n_layer": 2, "n_head": 2}, "seed": 1}}
    asked = config | {"must_match": {"model": {"n_layer": 3, "n_head": 2}, "seed": 2}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(saved))
    with pytest.raises(BadInput, match="model.n_layer 2 there, 3 asked; seed 1 there, 2 asked"):
        require_same_run(tmp_path, asked)
    with pytest.raises(BadInput, match="init hf:gpt2 there, hf:other asked"):
        require_same_run(tmp_path, saved | {"config": {"init": "hf:other"}})
    require_same_run(tmp_path, saved)
    require_same_run(tmp_path, saved | {"config": {"init": ""}})
    path.write_text("[]")
    with pytest.raises(BadInput, match="is no run's"):
        require_same_run(tmp_path, saved)


def test_a_run_saved_before_the_gelu_was_a_setting_goes_on(tmp_path):
    """It computed GPT-2's, the tanh."""
    config = {"config": {"init": ""}}
    saved = config | {"must_match": {"model": {"n_layer": 2}}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    tanh, exact = ({"must_match": {"model": {"n_layer": 2, "gelu": gelu}}}
                   for gelu in ("tanh", "exact"))
    require_same_run(tmp_path, config | tanh)
    with pytest.raises(BadInput, match="model.gelu tanh there, exact asked"):
        require_same_run(tmp_path, config | exact)


def test_dtype_follows_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_dtype("fp64", cpu) == "fp64"
    for features, expected in [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"),
                               ({"avx2": True}, "fp32")]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=features: f)
        assert choose_dtype("auto", cpu) == expected
    cuda = torch.device("cuda")
    for capability, expected in [((8, 0), "bf16"), ((9, 0), "bf16"), ((7, 0), "fp16")]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert choose_dtype("auto", cuda) == expected
    with pytest.raises(BadInput, match="MPS has no fp64"):
        choose_dtype("fp64", torch.device("mps"))


def test_fp16_and_bf16_runs_train(tiny, tmp_path):
    for dtype in ("bf16", "fp16"):
        train(tiny(name=dtype, dtype=dtype, steps=4, eval_every=4))
        rows = read_rows(tmp_path / dtype / "metrics.jsonl")
        assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    state = json.loads((tmp_path / "fp16/checkpoints/step_00000004/state.json").read_text())
    assert state["loss_scale"]["value"] > 1


def test_wandb_offline_goes_on_in_the_same_run(tiny, tmp_path):
    """wandb keeps threads of its own, so it runs in its own process."""
    config = tiny(steps=2, save_every=1, eval_every=2, wandb="offline")
    assert run_program(flags(config)).returncode == 0
    first = (tmp_path / "tiny" / "wandb_id").read_text()
    from model import checkpoint

    checkpoint.remove(tmp_path / "tiny" / "checkpoints" / "step_00000002")
    again = run_program(flags(config))
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "tiny" / "wandb_id").read_text() == first
    folders = {p.name.split("-", 3)[-1] for p in (tmp_path / "tiny" / "wandb").glob("offline-run*")}
    assert folders == {first}


class FakeWandb:
    """In the place of wandb: it only writes down what it is asked to do."""

    class errors:  # noqa: N801 - wandb's own name
        Error = AuthenticationError = RuntimeError

    def __init__(self) -> None:
        self.settings: dict = {}
        self.metrics: list = []
        self.rows: list = []

    def init(self, **settings):
        self.settings = settings
        return self

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, row, **more):
        self.rows.append((row["step"], more))

    def finish(self):
        pass


def test_wandb_counts_our_steps_so_that_a_rollback_is_seen(tmp_path, monkeypatch):
    """Its own step only ever grows: "step 8 less than 10, ignored". And a name may hold anything
    that a folder's may, an id of wandb's not."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = {"steps": 12, "batch_tokens": 1, "evaluation": {"eval_every": 4},
              "tracker": {"wandb": "online", "tensorboard": False, "profile": 0}}
    resolved = {"dtype": "fp32", "flops_per_token": 1, "val_set": "x"}
    run = tmp_path / "a:b#c?"
    run.mkdir()
    kept = tracker.Tracker(run, ALONE, {"config": config, "resolved": resolved})
    kept.log(10, train_loss=1.0)
    kept.drop_after(8)
    kept.log(8, event="rolled back")
    kept.close()
    assert fake.metrics == [("step", None), ("*", "step")]
    assert fake.rows == [(10, {}), (8, {})]
    assert not set("/\\#?%:") & set(fake.settings["id"])


def test_wandb_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match="pip install wandb"):
        tracker._start_wandb(tmp_path, "offline", {})


def shown_by_tensorboard(run) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value), as TensorBoard draws them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)]
            for name in events.Tags()["scalars"]}


def on_record(run, name: str) -> list[tuple[int, float]]:
    """The same out of metrics.jsonl. Event files hold fp32: half a unit in its 24th bit off."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if name in row]
    return [(row["step"], pytest.approx(row[name], rel=2**-24)) for row in rows]


def test_tensorboard_shows_the_rows_of_a_resumed_run_once(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "tiny"
    for _ in range(2):
        assert train(tiny(steps=4, save_every=2, eval_every=2, tensorboard=True)) == 0
        shown = shown_by_tensorboard(run)
        assert set(shown) > {"train_loss", "val_loss", "lr", "grad_norm", "tokens"}
        for name in ("train_loss", "val_loss", "lr"):
            assert shown[name] == on_record(run, name)
        shutil.rmtree(run / "checkpoints" / "step_00000004")


def test_tensorboard_forgets_what_a_run_rolled_back_from(tmp_path):
    pytest.importorskip("tensorboard")
    world = World(0, 1, torch.device("cpu"))
    settings = {"wandb": "disabled", "tensorboard": True, "profile": 0}
    description = {"config": {"steps": 9, "batch_tokens": 32, "tracker": settings,
                              "evaluation": {"eval_every": 3}},
                   "resolved": {"dtype": "fp32", "flops_per_token": 1, "val_set": "x"}}
    with closing(tracker.Tracker(tmp_path, world, description)) as tracked:
        for step in range(1, 6):
            tracked.log(step, train_loss=float(step))
        tracked.drop_after(3)
        tracked.log_event(3, "rolled back to step 3")
        tracked.log(4, train_loss=40.0)
    assert shown_by_tensorboard(tmp_path)["train_loss"] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_tensorboard_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(BadInput, match=r"--tensorboard needs .*\[tensorboard\]"):
        tracker._start_tensorboard(tmp_path, -1)


def test_a_gpu_is_waited_for_where_a_profile_begins_and_where_it_ends(tmp_path, monkeypatch):
    """It is behind the host: what it still had to do of the step before was in the trace, too."""
    waits, action = [], torch.profiler.ProfilerAction
    profiler = tracker._start_profiler(tmp_path, 2)
    monkeypatch.setattr(torch.cuda, "synchronize",
                        lambda device: waits.append(profiler.current_action))
    for _ in range(6):
        tracker._next_step(profiler, 2, torch.device("cuda"))
    profiler.stop()
    assert waits == [action.WARMUP, action.RECORD_AND_SAVE]


def test_a_lonely_world_talks_to_nobody():
    world = World(0, 1, torch.device("cpu"))
    assert world.all_reduce_sum(1.5, 2) == [1.5, 2]
    assert world.all_reduce_max(3) == 3
    assert world.broadcast_from_rank0(lambda: "x") == "x"
    world.destroy()
