"""make gpu-check where it cannot run, the environment it makes, and all of it on the stand-in."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from kernels.cards import CARDS
from launch.errors import BadInput
from tests.gpucheck import __main__ as command
from tests.gpucheck import machine, parts, venv
from tests.gpucheck.machine import Machine, machine_of
from tests.gpucheck.settings import BATCH, Settings
from tests.nullgpu import __main__ as nullgpu
from tests.nullgpu import rows as counted_rows
from tests.nullgpu import running
from tests.running import ROOT

FULL = Settings(BATCH, 1)
QUICK = Settings(2, 1, quick=True)
MACHINE = Machine("NVIDIA H100 80GB HBM3", 1, 85_520_809_984, 132, "2.14.1+cu130", "3.8.0", "13.0",
                  "3.12.3", 16)
H100 = CARDS["h100"]


# ---- where it can't run ----

def test_no_gpu_is_one_line_and_exit_code_2():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run([sys.executable, "-m", "tests.gpucheck.venv", "nowhere"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: gpu-check needs a GPU, and .*: make cuda-check\n", done.stderr)


def test_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(command, "measure_all", None)
    monkeypatch.setattr(machine.subprocess, "run", lambda *args, **kwargs:
                        subprocess.CompletedProcess(args, 0, '{"build": true, "gpus": 0}\n', ""))
    with pytest.raises(BadInput, match="torch sees none here"):
        command.main(command.Arguments())


def test_an_interpreter_without_torch_is_bad_input(monkeypatch):
    monkeypatch.setattr(machine, "ASK", "import no_such_torch")
    with pytest.raises(BadInput, match="CUDA build of torch: ModuleNotFoundError: .*no_such_to"):
        machine.find_machine(sys.executable)


def test_what_torch_finds_is_told_apart():
    found = asdict(MACHINE) | {"build": True}
    assert machine_of(dict(found), "python") == MACHINE
    with pytest.raises(BadInput, match="has a torch for CPUs"):
        machine_of({"build": False, "gpus": 0}, "python")
    with pytest.raises(BadInput, match="torch sees none here"):
        machine_of({"build": True, "gpus": 0}, "python")


def test_an_unknown_part_is_bad_input():
    with pytest.raises(BadInput, match="no part 'speed': there are errors, steps, all GPUs"):
        command.Arguments(("speed",))


def test_a_file_that_could_not_be_written_is_bad_input_at_once(tmp_path):
    with pytest.raises(BadInput, match="there is no folder .*/none"):
        command.Arguments(out=tmp_path / "none" / "gpu_report.json")


def test_one_gpu_has_no_part_for_all():
    names = [part.name for part in command.chosen((), MACHINE)]
    assert "all GPUs" not in names and len(names) == len(parts.PARTS) - 1
    assert len(command.chosen((), replace(MACHINE, gpus=8))) == len(parts.PARTS)
    assert [part.name for part in command.chosen(("rates", "steps"), MACHINE)] == ["steps", "rates"]


# ---- the environment ----

def test_the_environment_takes_its_parents_packages_and_needs_no_network(tmp_path, monkeypatch):
    """All that runs need is here, so pip has nothing to do."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    venv.set_up(tmp_path / "venv")
    asked = "import torch, tyro, sys; print(torch.__file__, tyro.__file__, sys.prefix)"
    done = subprocess.run([tmp_path / "venv" / "bin" / "python", "-c", asked], text=True,
                          capture_output=True, check=True)
    import tyro

    assert done.stdout.split() == [torch.__file__, tyro.__file__, str(tmp_path / "venv")]


def test_only_what_is_missing_is_pinned(monkeypatch):
    monkeypatch.setattr(venv, "is_here", lambda package: package != "tyro")
    (pin,) = venv.missing_pins().splitlines()
    assert pin.startswith("tyro==")


def test_an_interpreter_without_pip_is_bad_input(tmp_path, monkeypatch):
    monkeypatch.setattr(venv, "package_folders", lambda: [])
    with pytest.raises(BadInput, match="venv/bin/python can't be set up: .*No module named pip"):
        venv.set_up(tmp_path / "venv")


# ---- on the stand-in for a GPU ----

SITE = """
import os
if "NULLGPU_LOG" in os.environ:
    import torch
    from tests.nullgpu import inside

    torch.backends.cuda.enable_cudnn_sdp(False)
    inside.pass_the_self_checks()
    inside.find_as_many_as_there_can_be()
"""


@pytest.fixture(scope="module")
def on_stand_in(tmp_path_factory) -> dict:
    """gpu_report.json of a check there, whose processes are spared what inside.py spares a run."""
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("tests.nullgpu.venv.set_up", lambda *words: None)
            place = nullgpu.prepared()
    except BadInput as reason:
        pytest.skip(f"after make cuda-check: {reason}")
    folder = tmp_path_factory.mktemp("gpu-check")
    (folder / "cubins").mkdir()
    (folder / "sitecustomize.py").write_text(SITE)
    environment = running.environment(counted_rows.SMALL, place, folder)
    done = subprocess.run(
        [place.python, "-m", "tests.gpucheck", "steps", "rates", "sampling", "HellaSwag", "saving",
         "largest", "kernels", "--quick", "True", "--out", str(folder / "gpu_report.json")],
        cwd=ROOT, env=environment | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}, text=True,
        capture_output=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr  # there is no trace of its kernels
    return json.loads((folder / "gpu_report.json").read_text())


def test_on_the_stand_in_all_parts_come_to_their_end(on_stand_in):
    assert on_stand_in["machine"]["gpu"] == MACHINE.gpu
    failed = {part: found for part, found in on_stand_in["measured"].items() if "fault" in found}
    assert list(failed) == ["steps"], failed
    assert failed["steps"]["fault"].startswith("no trace: the profiler saw no kernel")
    measured = on_stand_in["measured"]
    assert any(line.startswith("blocks: backward pass by hand")
               for line in measured["steps"]["said"])
    assert measured["largest"]["sequences"] == 8  # four times the batch is where it stops trying
    assert measured["saving"]["bytes"] > 12 * 6e6
    assert {row["by"] for row in measured["kernels"]["rows"]} >= {"triton", "torch"}
    for part, figure in [("steps", "tokens_per_second"), ("steps", "peak_mib"),
                         ("rates", "matmul_flops"), ("rates", "attention_flops"),
                         ("sampling", "tokens_per_second"),
                         ("HellaSwag", "questions_per_second"), ("saving", "stall")]:
        assert measured[part][figure] > 0
