"""make gpu-check: what it makes of measurements, traces and failures, without a GPU."""

import json
import os
import re
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.cards import CARDS
from launch.errors import BadInput, Failed
from launch.plan import report as plan_report
from launch.plan import step_time
from launch.plan.own_card import read_card
from tests.gpucheck import __main__ as command
from tests.gpucheck import parts, report, runs, trace
from tests.gpucheck.machine import Machine
from tests.gpucheck.parts import Part, measure, measure_all
from tests.gpucheck.predict import TOKENS_A_QUESTION, predict
from tests.gpucheck.settings import BATCH, Settings, batch_that_fits
from tests.nullgpu import table
from tests.running import ROOT

FULL = Settings(BATCH, 1)
QUICK = Settings(2, 1, quick=True)
MACHINE = Machine("NVIDIA H100 80GB HBM3", 1, 85_520_809_984, 132, "2.14.1+cu130", "3.8.0", "13.0",
                  "3.12.3", 16)
H100 = CARDS["h100"]


# ---- a trace, built by hand ----

def event(name: str, start: float, seconds: float, cat: str = "kernel") -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": seconds, "args": {}}


def test_the_gpu_idles_where_no_stream_has_work():
    """0 to 20 by two streams that overlap, one of them inside; 30 to 40; a copy from 40 to 50."""
    events = [event("a", 0, 10), event("c", 30, 10), event("b", 5, 15), event("inside", 6, 2),
              event("Memcpy DtoH", 40, 10, "gpu_memcpy")]
    assert trace.idle_share(events) == pytest.approx(10 / 50)
    assert trace.idle_share(events[:1]) == 0


def test_only_what_the_gpu_did_is_read_of_a_trace(tmp_path):
    path = tmp_path / "trace.json"
    on_gpu = [event("k", 0, 1), event("Memset", 2, 1, "gpu_memset")]
    others = [event("aten::mm", 0, 5, "cpu_op"), event("cudaLaunchKernel", 0, 5, "cuda_runtime"),
              event("ProfilerStep#3", 0, 9, "gpu_user_annotation"), {"ph": "M", "name": "process"},
              {"ph": "s", "cat": "kernel", "name": "arrow", "ts": 0}]
    path.write_text(json.dumps({"traceEvents": others + on_gpu}))
    assert trace.read(path) == on_gpu
    path.write_text(json.dumps({"traceEvents": others}))
    with pytest.raises(ValueError, match="saw no kernel: it needs CUPTI"):
        trace.read(path)


@pytest.mark.parametrize(("name", "kind"), [
    ("attention_dkdv", "ours"), ("judge", "ours"), ("draw_tokens", "ours"),
    ("triton_poi_fused_add_3", "Inductor"),
    ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "GEMM"),
    ("ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_nt", "GEMM"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>(Params)", "GEMM"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasSplitKParams)", ""),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor>", "ATen"),
    ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "ATen"),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096>)", "NCCL"),
])
def test_a_kernels_name_says_whose_it_is(name, kind):
    assert trace.kind_of(event(name, 0, 1)) == kind


def test_launches_are_those_of_one_step_and_nccls_are_counted_apart():
    names = ["attention_dq", "sm90_xmma_gemm_x", "splitKreduce", "ncclDevKernel_AllReduce"]
    step = [event("Memcpy HtoD", 0, 1, "gpu_memcpy"), *(event(name, 0, 1) for name in names)]
    assert trace.launches(step * 4, steps=4) == {
        "all": 3, "GEMM": 1, "copies": 1, "ours": 1, "NCCL": 1}
    fills = [event("Memset (Device)", 0, 1, "gpu_memset")] * 4  # cuBLAS's
    assert trace.launches(step * 4 + fills, steps=4) == {
        "all": 3, "GEMM": 1, "copies": 1, "ours": 1, "NCCL": 1, "fills": 1}


def test_a_steps_time_is_by_kind_and_by_kernel_of_ours():
    step = [event("sm90_xmma_gemm_x", 0, 2000), event("splitKreduce", 0, 500),
            event("attention_dq", 0, 1000), event("attention_dkdv", 0, 1500),
            event("Memset (Device)", 0, 250, "gpu_memset")]
    assert list(trace.milliseconds(step * 3, steps=3).items()) == [
        ("GEMM", 2.5), ("attention_dkdv", 1.5), ("attention_dq", 1.0), ("fills", 0.25)]


def test_all_kernels_are_known_by_name():
    """Of the functions that Triton compiles; those with _ and the two of columns.py are called by
    others."""
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        found |= set(re.findall(r"^@triton\.jit\b.*\ndef ([a-z]\w+)", path.read_text(), re.M))
    assert found - {"load", "store"} <= trace.OURS
    assert len(found) > 15


# ---- what is made of a run ----

def test_losses_are_held_against_the_cpus():
    on_cpu = [11.0 - step / 10 for step in range(runs.LOSSES)]
    near = [loss + 0.9 * runs.TOLERANCE for loss in on_cpu]
    assert runs.compare_losses(near, on_cpu)["difference"] == pytest.approx(0.9 * runs.TOLERANCE)
    assert "fault" not in runs.compare_losses(near, on_cpu)
    off = [*on_cpu[:-1], on_cpu[-1] + 1.1 * runs.TOLERANCE]
    assert f"{runs.TOLERANCE} at most" in runs.compare_losses(off, on_cpu)["fault"]
    assert "fault" in runs.compare_losses([*on_cpu[:-1], float("nan")], on_cpu)
    with pytest.raises(Failed, match="19 losses on the GPU and 20"):
        runs.compare_losses(on_cpu[:-1], on_cpu)


def test_speed_is_of_the_last_steps_alone():
    slow = [{"step_ms": 9e9, "mfu": 0.0, "memory_mib": 5.0}] * runs.WARM
    timed = [{"step_ms": 100.0, "mfu": 0.5, "memory_mib": 7.0}] * (runs.TIMED // 2)
    timed += [{"step_ms": 300.0, "mfu": 0.1, "memory_mib": 7.0}] * (runs.TIMED // 2)
    assert runs.speed(slow + timed, 1000) == {
        "step_ms": pytest.approx(200), "tokens_per_second": pytest.approx(5000),
        "mfu": pytest.approx(0.2), "peak_mib": 7.0}
    with pytest.raises(Failed, match="59 steps are on record, expected 60"):
        runs.speed(timed[1:], 1000)


def test_the_program_is_run_on_many_ranks_and_read(tmp_path, monkeypatch):
    """On a CPU: it has no GPU to trace."""
    monkeypatch.setattr(runs, "WARM", 4)
    monkeypatch.setattr(runs, "TIMED", 3)
    monkeypatch.setattr(runs, "RECORDED", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = runs.steps_on_all(replace(QUICK, gpus=2), tmp_path)
    assert found["tokens_per_second"] == pytest.approx(2 * 2 * 128 / found["step_ms"] * 1e3)
    assert found["fault"].startswith("no trace: the profiler saw no kernel")
    assert found["said"] == ["kernels: torch"]
    assert "2 ranks" in (tmp_path / "run.log").read_text()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.subprocess, "run", lambda *args, **kwargs: (
        kwargs["stdout"].write("step 1\nerror: the GPU of rank 0 is full\n"),
        subprocess.CompletedProcess(args, 1))[1])
    with pytest.raises(Failed, match="train_gpt2.py, gpu: error: the GPU of rank 0 is full"):
        runs.program(QUICK, tmp_path, name="gpu")


# ---- parts ----

FAKES = """
import subprocess, sys, signal

def works(settings, folder):
    return {"batch": settings.batch}

def fails(settings, folder):
    print("almost")
    raise RuntimeError("the card is on fire")

def hangs(settings, folder):
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"],
                             stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    signal.pause()
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> Path:
    (tmp_path / "fake_parts.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_part_that_fails_is_a_row_and_the_others_go_on(fakes, capsys):
    listed = [Part("first", "fake_parts", "fails", 60), Part("second", "fake_parts", "works", 60)]
    measured = measure_all(listed, QUICK, fakes / "out", minutes=2)
    assert measured["second"] == {"batch": 2}
    assert measured["first"]["fault"] == "exit code 1: RuntimeError: the card is on fire"
    assert measured["first"]["output"].startswith("almost\nTraceback")
    assert list((fakes / "out").iterdir()) == []
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("first ... exit code 1: RuntimeError: the card is on fire (")
    assert said[1].startswith("second ... done (")


def test_a_part_that_takes_too_long_is_a_row(fakes):
    part = Part("a", "fake_parts", "hangs", 60)
    assert measure(part, QUICK, fakes / "a", 0.01)["fault"] == "not done after 0 s"


def test_what_a_part_has_started_ends_with_it(fakes):
    QUICK.write(fakes / "settings.json")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gpucheck.parts", "fake_parts", "hangs", str(fakes)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with process:
        child = os.pidfd_open(int(process.stdout.readline()))
        parts.end(process)
        assert select.select([child], [], [], 60)[0] == [child]  # it is gone
        os.close(child)


def test_after_its_minutes_no_part_begins():
    measured = measure_all(parts.PARTS, QUICK, Path("nowhere"), minutes=0)
    assert [found["fault"] for found in measured.values()] == (
        ["left out: 0 minutes are over"] * len(parts.PARTS))


# ---- predictions ----

def test_a_step_is_predicted_by_the_plan_and_the_table():
    step = predict(H100, FULL)["steps"]
    job = FULL.job()
    seconds = plan_report.TYPICAL * sum(step_time.step(job, H100, 1, BATCH).values())
    counted = table.read()["gpt2-124m, h100"]["step"]
    assert step["step_ms"] == pytest.approx(1e3 * seconds)
    assert step["tokens_per_second"] == pytest.approx(BATCH * 1024 / seconds)
    assert step["mfu"] == pytest.approx(
        job.flops_per_token * BATCH * 1024 / seconds / H100.bf16_flops)
    assert step["idle"] == 0
    assert step["peak_mib"] == counted["peak MiB"]
    assert {name: count for name, count in step.items() if name.startswith("launches")} == {
        f"launches: {kind}": count for kind, count in counted["launches"].items()}


def test_of_all_gpus_the_step_is_that_under_ddp():
    predicted = predict(H100, replace(FULL, gpus=8))
    counted = table.read()["gpt2-124m, ddp, 8 h100"]["step"]
    assert predicted["all GPUs"]["launches: all"] == counted["launches"]["all"]
    assert 7 < (predicted["all GPUs"]["tokens_per_second"]
                / predicted["steps"]["tokens_per_second"]) < 8
    assert "all GPUs" not in predict(H100, FULL)


def test_a_smaller_batch_is_predicted_without_the_table():
    step = predict(CARDS["4090"], replace(FULL, batch=32))["steps"]
    assert "launches: all" not in step
    counted = table.read()["gpt2-124m, h100"]["step"]["peak MiB"]
    assert 0.5 * counted < step["peak_mib"] < 0.7 * counted


def test_the_largest_batch_is_the_counted_one_or_the_plans():
    assert predict(H100, FULL)["largest"]["sequences"] == (
        table.read()["largest micro-batch of gpt2-124m, h100"]["sequences"])
    a6000 = predict(CARDS["a6000"], FULL)["largest"]["sequences"]
    assert 128 < a6000 < 286


def test_of_an_unknown_card_and_a_tiny_model_the_limits_alone_are_known():
    assert predict(None, FULL).keys() == predict(H100, QUICK).keys() == {"errors", "losses"}


def test_questions_are_as_long_as_predicted():
    from tests.bench.hellaswag import questions

    asked = questions(FULL.model, 2000)
    read = [len(context) + sum(len(ending) - 1 for ending in endings) for context, endings in asked]
    assert sum(read) / len(read) == pytest.approx(TOKENS_A_QUESTION, rel=0.02)


@pytest.mark.parametrize(("gb", "batch"), [(80, 64), (24, 64), (16, 32), (6, 8), (1, 1)])
def test_the_batch_is_what_the_card_holds(gb, batch):
    assert batch_that_fits(gb * 10**9) == batch


# ---- the table and the file ----

MEASURED = {
    "errors": {"bf16": 0.003, "fp32": 4e-7, "block by hand": "bfloat16 3e-03"},
    "steps": {"step_ms": 150.0, "tokens_per_second": 436_906.7, "mfu": 0.3773, "idle": 0.031,
              "peak_mib": 19_040.5, "said": ["kernels: triton"],
              "launches": {"all": 390.0, "ATen": 64.0, "GEMM": 183.0, "copies": 7.0,
                           "ours": 136.0},
              "times": {"GEMM": 70.5, "attention_dkdv": 9.25}},
    "rates": {"matmul_flops": 700e12, "attention_flops": 200e12, "memory_bandwidth": 2900e9},
    "sampling": {"fault": "exit code 1: RuntimeError: no", "output": "no"},
    "kernels": {"rows": [
        {"operator": "attention", "by": "triton", "milliseconds": 2.0, "limit": 0.25},
        {"operator": "attention", "by": "torch flash", "milliseconds": 3.0, "limit": 0.2},
        {"operator": "layer_norm", "by": "triton", "milliseconds": None}]},
}


def test_the_table_has_predicted_measured_and_their_ratio():
    lines = report.table(report.rows(predict(H100, FULL), MEASURED)).splitlines()
    cells = {re.split(r"  +", line.strip())[0]: re.split(r"  +", line.strip())[1:]
             for line in lines[1:]}
    assert lines[0].split() == ["predicted", "measured", "ratio"]
    assert cells["kernels' largest error in bf16 (limit)"] == ["0.01", "0.003", "0.30"]
    assert cells["peak memory of tensors, MiB"] == ["19,030", "19,040", "1.00"]
    counted = table.read()["gpt2-124m, h100"]["step"]["launches"]
    launches, by_pytorch = counted["all"], counted["ATen"]
    assert cells["launches and copies a step"] == [
        str(launches), "390", f"{390 / launches:.2f}"]
    assert cells["ATen"] == [str(by_pytorch), "64", f"{64 / by_pytorch:.2f}"]
    assert cells["attention_dkdv, ms of a step"] == ["9.25"]
    assert cells["the GPU idles, %"] == ["0", "3.1"]
    assert cells["copy, GB/s"] == ["2,906", "2,900", "1.00"]
    assert cells["attention, ms (at least)"] == ["0.5", "2", "4.00"]
    assert "sampling one text, tokens/s (at most)" not in cells
    assert not any("layer_norm" in line for line in lines)


def test_of_an_unknown_card_only_the_measured_stands_there():
    row = next(row for row in report.rows(predict(None, FULL), MEASURED) if row.name == "tokens/s")
    assert (row.predicted, row.ratio) == (None, None)
    assert report.table([row]).splitlines()[1].split() == ["tokens/s", "436,907"]


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """gpu-check with these measurements: (its exit code, what it wrote)."""
    def check(measured: dict, found: Machine = MACHINE, *words: str) -> tuple[int, Path]:
        monkeypatch.setattr(command, "find_machine", lambda python: found)
        monkeypatch.setattr(command, "measure_all", lambda *args: measured)
        monkeypatch.setattr(command, "FOLDER", tmp_path / "work")
        out = tmp_path / "gpu_report.json"
        quick = "--quick" in words
        return command.main(command.Arguments(out=out, quick=quick)), out

    return check


def test_a_part_that_failed_is_named_and_the_exit_code_is_1(checked, capsys):
    code, out = checked(MEASURED)
    said = capsys.readouterr().out
    assert code == 1
    assert "\nkernels: triton\nsampling: exit code 1: RuntimeError: no\nwritten to " in said
    content = json.loads(out.read_text())
    assert content["faults"] == ["sampling: exit code 1: RuntimeError: no"]
    assert content["machine"]["torch"] == "2.14.1+cu130" and content["card"] == "h100"
    assert content["measured"] == MEASURED
    assert {"part": "steps", "name": "tokens/s", "measured": 436_906.7}.items() <= next(
        row for row in content["table"] if row["name"] == "tokens/s").items()


def test_where_all_went_well_the_exit_code_is_0(checked):
    good = {part: found for part, found in MEASURED.items() if "fault" not in found}
    assert checked(good)[0] == 0


def test_another_torch_is_said_to_launch_otherwise(checked, capsys):
    checked(MEASURED, replace(MACHINE, torch="2.11.0+cu128"))
    assert "launches were counted with torch 2.14.1; with 2.11.0+cu128" in capsys.readouterr().out


# ---- the report as rates of --plan ----

def test_the_plan_of_the_measured_step_is_the_measured_step(checked):
    _, out = checked(MEASURED)
    card = read_card(out)
    job = FULL.job()
    assert (card.key, card.memory_bytes) == ("h100", H100.memory_bytes)
    assert card.matmul_rate == pytest.approx(700e12 / H100.bf16_flops)
    text = plan_report.report(job, "1x", own=card)
    assert "step       150 to 150 ms; about 150 as measured on one GPU" in text
    assert "measured   matrix products at 71% of the peak, attention at 20%, memory at 87%" in text
    assert "published" not in text
    seconds = sum(step_time.step(job, card, 1, BATCH).values())
    assert seconds * card.over_roofline == pytest.approx(0.150)


def test_faster_products_make_the_planned_step_shorter(checked):
    before, after = (sum(step_time.step(FULL.job(), read_card(checked(measured)[1]), 1,
                                        BATCH).values())
                     for measured in (MEASURED, MEASURED | {"rates": MEASURED["rates"] | {
                         "matmul_flops": 800e12}}))
    assert after < before


@pytest.mark.parametrize(("change", "line"), [
    (lambda content: content | {"rates": None}, "holds no rates: they come of the parts steps"),
    (lambda content: content | {"card": ""}, "a GPU that kernels/cards.py doesn't know"),
    (lambda content: content | {"rates": content["rates"] | {"step": "fast"}},
     "its rate step is 'fast', expected a number above 0"),
    (lambda content: content | {"rates": content["rates"] | {"memory": -1}},
     "its rate memory is -1"),
])
def test_a_report_without_rates_is_refused_in_one_line(checked, change, line):
    _, out = checked(MEASURED)
    out.write_text(json.dumps(change(json.loads(out.read_text()))))
    with pytest.raises(BadInput) as caught:
        read_card(out)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_tiny_models_report_has_no_rates(checked):
    _, out = checked(MEASURED, MACHINE, "--quick")
    with pytest.raises(BadInput, match="holds no rates"):
        read_card(out)
