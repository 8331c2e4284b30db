"""make cuda-check finds what it is there to find: a graph break, a spill, a launch, a wait more."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import cards
from launch.errors import BadInput
from tests.nullgpu import __main__ as command
from tests.nullgpu import build, counts, host, largest, rows, running, table, venv

# A step of a run, as the stand-in writes it down.
STEP = """\
mark update
aten _ZN2at6native52fused_adamw grid 4 1 1
mark update
gemm 768 65536 3072
gemm 768 768 65536
triton attention_forward grid 512 1 1
triton triton_poi_fused__to_copy_0 grid 8 1 1
triton triton_per_fused_add_native_layer_norm_3 grid 8 1 1
aten _ZN2at6nativeEZNS0_25bfloat16_copy_kernel_cudaERNS_18 grid 8 1 1
aten _ZN2at6native13reduce_kernelILi128ELi4E grid 24 1 1
call cublasSetStream_v2
call cublasDtrsm_v2
memset 8
copy h2d 524800
captured aten _ZN2at6native13reduce_kernelILi128ELi4E grid 24 1 1
graph
mark collective all_reduce 4096
mark collective all_reduce 8
copy d2h 4
wait stream
wait event
mark update
gemm 1 1 1
"""
COUNTED = {
    "launches": {"all": 11, "ATen": 2, "GEMM": 2, "Inductor": 2, "copies": 3, "graphs": 1,
                 "ours": 1},
    "casts": 2,
    "waits": {"event": 1, "stream": 1},
    "collectives": {"all_reduce": 2, "all_reduce bytes": 4104},
    "unknown calls": {"cublasDtrsm_v2": 1},
}


def second_step(log: str) -> dict:
    second = rows.Part("mark update", "mark update", 2, 3)
    return counts.count_part(counts.cut(log.splitlines(), second))


# ---- counting and comparing ----

def test_a_step_is_counted_by_kind():
    assert second_step(STEP) == COUNTED


def test_spans_lie_between_two_marks_or_from_one_to_its_next():
    clock = [("a", 1.0), ("b", 3.0), ("c", 3.5), ("a", 4.0), ("b", 8.0)]
    assert host.spans(clock, "a", "b") == [2.0, 4.0]
    assert host.spans(clock, "a", "a") == [3.0]
    assert host.spans(clock, "b", "nothing") == []


@pytest.mark.parametrize("line, difference", [
    ("aten _ZN2at6native29vectorized_elementwise_kernel grid 1 1 1",
     ["launches: all: 11 in the table, 12 now", "launches: ATen: 2 in the table, 3 now"]),
    ("wait stream", ["waits: stream: 1 in the table, 2 now"]),
    ("wait device", ["waits: device: none in the table, 1 now"]),
    ("mark collective all_reduce 16",
     ["collectives: all_reduce: 2 in the table, 3 now",
      "collectives: all_reduce bytes: 4,104 in the table, 4,120 now"]),
    ("call cublasLtMatmulFoo",
     ["unknown calls: cublasLtMatmulFoo: none in the table, 1 now"]),
])
def test_one_line_more_is_a_difference(line, difference):
    more = STEP.replace("memset 8\n", f"memset 8\n{line}\n")
    assert table.differences(COUNTED, second_step(more)) == difference


def test_one_line_less_is_a_difference():
    less = STEP.replace("wait event\n", "")
    assert table.differences(COUNTED, second_step(less)) == [
        "waits: event: 1 in the table, none now"]


def test_a_log_that_ends_too_early_is_no_count():
    with pytest.raises(counts.Missing, match="2 times 'mark update', expected 3"):
        second_step(STEP.rpartition("mark update")[0])


def test_memory_may_differ_by_a_hundredth():
    def row(mib):
        return {"step": {"peak MiB": mib}}

    assert table.differences(row(19_000), row(19_190)) == []
    assert table.differences(row(19_000), row(19_191)) == [
        "step: peak MiB: 19,000 in the table, 19,191 now"]
    assert table.differences(row(19_000), row(18_809)) != []


@pytest.mark.parametrize("name, before, now", [
    ("graph breaks", 0, 1), ("recompiles", 3, 4), ("spills", {}, {"attention_dq": 64})])
def test_what_is_said_of_a_whole_run_is_compared(name, before, now):
    (line,) = table.differences({name: before}, {name: now})
    assert line.startswith(name)


def test_a_kernel_that_spills_is_found_in_what_cuobjdump_says(tmp_path):
    said = (" Function good:\\n  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:608\\n"
            " Function bad:\\n  REG:255 STACK:96 SHARED:0 LOCAL:0 CONSTANT[0]:608\\n")
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!{sys.executable}\nprint('''{said}''')\n")
    tool.chmod(0o755)
    assert counts.spills([Path("a.cubin")], tool) == {"bad": 96}


def test_a_run_is_counted_from_what_it_leaves(tmp_path):
    (tmp_path / "log").write_text("mark update\n" * 10 + STEP)
    (tmp_path / "cubins").mkdir()
    (tmp_path / "found.json").write_text(json.dumps(
        {"graph_breaks": 1, "recompiles": 3, "peak": 9.0, "peaks": {"step": 123.4}}))
    counted = counts.count(tmp_path, ("step",), Path("cuobjdump"))
    assert counted["graph breaks"] == 1
    assert counted["recompiles"] == 3
    assert counted["step"]["peak MiB"] == 123
    assert counted["step"]["launches"]["all"] == 11  # of the twelfth update


def test_a_graph_is_counted_where_it_was_captured_and_once_where_it_is_replayed(tmp_path):
    replayed = ["graph", "copy d2h 8", "wait event"]
    (tmp_path / "log").write_text("\n".join([
        "capture begins", "captured gemm 1 1 1", "captured triton draw grid 1 1 1", "capture ends",
        *replayed * 4]))
    (tmp_path / "found.json").write_text(json.dumps(
        {"graph_breaks": 0, "recompiles": 0, "peak": 277.6, "peaks": {}}))
    counted = counts.count(tmp_path, ("token", "graph"), Path("cuobjdump"))
    assert counted["token"]["launches"] == {"all": 2, "copies": 1, "graphs": 1}
    assert counted["graph"]["launches"] == {"all": 2, "GEMM": 1, "ours": 1}
    assert counted["token"]["peak MiB"] == 278


@pytest.fixture
def small_table(tmp_path, monkeypatch):
    """A table of two rows in place of the committed one."""
    monkeypatch.setattr(table, "TABLE", tmp_path / "counted.json")
    first, second = (row.name for row in rows.ROWS[:2])
    table.write({first: COUNTED, second: COUNTED})
    return first, second


def test_equal_counts_are_0_and_others_are_1_and_named(small_table, capsys):
    first, second = small_table
    assert command.report({first: COUNTED, second: COUNTED}, table.read()) == 0
    assert "all 2 rows" in capsys.readouterr().out
    assert command.report({first: COUNTED, second: COUNTED | {"casts": 3}}, table.read()) == 1
    said = capsys.readouterr().out
    assert f"{second}\n    casts: 2 in the table, 3 now" in said
    assert f"\n{first}\n" not in said


def test_a_row_that_did_not_run_is_1_and_leaves_the_table_as_it_was(small_table):
    first, second = small_table
    assert command.report({first: "exit code 1"}, table.read()) == 1
    assert command.update({first: "exit code 1", second: {"casts": 0}}, table.read()) == 1
    assert table.read() == {first: COUNTED, second: {"casts": 0}}


def test_the_table_has_the_rows_that_are_run_and_no_fault():
    counted = table.read()
    assert list(counted) == [row.name for row in rows.ROWS]
    for row in rows.ROWS:
        if isinstance(row, rows.Largest):
            assert list(counted[row.name]) == ["sequences"]
            continue
        # Up to 40 bytes, by Triton 3.8: one program a text. A new name here needs a reason.
        assert set(counted[row.name]["spills"]) <= {"draw_tokens"}
        assert counted[row.name]["graph breaks"] == 0
        assert set(row.parts) < set(counted[row.name])


@pytest.mark.parametrize("border", [0, 1, 59, 60, 61, 200])
@pytest.mark.parametrize("guess", [1, 60, 61])
def test_the_largest_that_fits_is_found_from_any_guess(border, guess):
    asked = []

    def fits(n):
        asked.append(n)
        return n <= border

    assert largest.largest(fits, guess) == border
    assert min(asked) > 0
    if guess == border:
        assert asked == [guess, guess + 1]


# ---- the stand-in ----

def test_the_cards_are_those_of_the_kernels():
    line = re.compile(r'\{"([\w-]+)", +"NVIDIA ([^"]+)", +(\d+), (\d+), +(\d+), +(\d+), +'
                      r"(\d+) \* KIB, +(\d+) \* KIB, +\d+, +(\d+) \* MIB, +(\d+)")
    source = (build.HERE / "cards.c").read_text()
    found = line.findall(source)
    assert [key for key, *_ in found] == ["a100-40", "a100", "h100", "h200", "b200", "4090"]
    for _, name, major, minor, sms, memory, per_sm, per_cta, l2, clock in found:
        known = cards.by_name(f"NVIDIA {name}")
        assert known.arch == f"sm_{major}{minor}"
        assert known.sms == int(sms)
        assert known.shared_per_sm == int(per_sm) * 1024
        assert known.shared_per_cta == int(per_cta) * 1024
        assert known.l2_bytes == int(l2) * 2**20
        assert known.clock_hz == pytest.approx(int(clock) * 1e3, rel=0.1)
        assert known.memory_bytes == pytest.approx(int(memory), rel=0.08)


def test_ranks_that_are_not_there_say_what_this_one_says():
    from tests.nullgpu.collectives import CountedGroup

    noted = []
    group = CountedGroup(0, 8, noted.append)
    given, places = torch.arange(4.0), [torch.zeros(4) for _ in range(8)]
    group.allgather([places], [given])
    group.allreduce([given])
    group.reduce_scatter_single(torch.zeros(1), torch.zeros(8))
    assert all(torch.equal(place, given) for place in places)
    assert noted == ["collective all_gather 128", "collective all_reduce 16",
                     "collective reduce_scatter 32"]


@pytest.mark.parametrize("name, is_ours", [
    ("cudaMalloc", True), ("__cudaRegisterVar", True), ("cublasGemmEx", True),
    ("cuModuleLoadData", True), ("cuFileRead", False), ("cufftExecC2C", False),
    ("cudnnCreate", False), ("current_device", False)])
def test_which_functions_are_replaced(name, is_ours):
    assert bool(build.OURS.fullmatch(name)) == is_ours


# ---- where it can't run ----

def test_an_unknown_row_is_bad_input():
    with pytest.raises(BadInput, match="no row 'gpt5': the rows are .*gpt2-124m, h100"):
        command.main(["gpt5"])


def test_no_gcc_is_bad_input(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(BadInput, match="no gcc here"):
        build.build(sys.executable, tmp_path)


def test_what_gcc_complains_of_is_said(tmp_path):
    wrong = tmp_path / "wrong.c"
    wrong.write_text("int f(void) { return x; }\n")
    with pytest.raises(BadInput, match="gcc failed: .*error: .*x.*undeclared"):
        build.compile_c(wrong, tmp_path, tmp_path)


@pytest.fixture
def no_cuda(monkeypatch):
    """No interpreter has a CUDA build of torch."""
    monkeypatch.delenv("CUDA_PYTHON", raising=False)
    monkeypatch.setattr(venv, "cuda_build", lambda python: "")


def test_too_little_disk_is_bad_input(no_cuda, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 97, 3))
    with pytest.raises(BadInput, match="12 GiB of disk .*CUDA_PYTHON"):
        venv.cuda_python(tmp_path)


def test_an_interpreter_without_cuda_is_bad_input(no_cuda, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_PYTHON", sys.executable)
    with pytest.raises(BadInput, match="has no CUDA build of torch"):
        venv.cuda_python(tmp_path)
    monkeypatch.setenv("CUDA_PYTHON", str(tmp_path / "python"))
    with pytest.raises(BadInput, match="no such interpreter"):
        venv.cuda_python(tmp_path)


def test_a_cpu_build_that_pip_brought_is_bad_input(no_cuda, tmp_path, monkeypatch):
    monkeypatch.setattr(venv, "set_up", lambda python: None)
    with pytest.raises(BadInput, match="PIP_EXTRA_INDEX_URL"):
        venv.cuda_python(tmp_path)


def test_where_possible_says_why_not(no_cuda, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 97, 3))
    with pytest.raises(BadInput):
        command.main([])
    assert command.main(["--where-possible"]) == 0
    assert capsys.readouterr().out.startswith("cuda-check is left out: a CUDA build of torch wants")


def test_the_environment_is_set_up_with_the_projects_pins():
    pins = venv.constraints().splitlines()
    assert not [pin for pin in pins if pin.startswith(("torch==", "triton=="))]
    assert [pin for pin in pins if pin.startswith("tyro==")]
    wanted = venv.requirements()
    assert any(name.startswith("tiktoken") for name in wanted)
    assert not any(name.startswith("torch") for name in wanted)


# ---- faults, planted in a run on the stand-in ----

@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """What make cuda-check has set up; folders of its own, for two processes may test at once."""
    try:
        monkey = pytest.MonkeyPatch()
        with monkey.context() as patched:
            patched.setattr(venv, "set_up", lambda python: None)  # nothing is downloaded here
            python, shared = venv.cuda_python(command.FOLDER), command.FOLDER / "cache"
            own = tmp_path_factory.mktemp("nullgpu")
            shared.mkdir(parents=True, exist_ok=True)
            (own / "cache").symlink_to(shared)
            patched.setattr(command, "FOLDER", own)
            patched.setattr(command, "cuda_python", lambda folder: python)
            return command.prepared()
    except BadInput as reason:
        pytest.skip(f"after make cuda-check: {reason}")


def count(place: running.Workplace, fault: str = "") -> table.Counts:
    out, problem = running.start(rows.SMALL, place, fault)
    assert problem == "", (out / "output").read_text()
    packages = build.site_packages(place.python)
    return counts.count(out, rows.SMALL.parts, packages / "triton/backends/nvidia/bin/cuobjdump")


@pytest.fixture(scope="module")
def sound(workplace) -> table.Counts:
    return count(workplace)


@pytest.mark.parametrize("fault, named", [
    ("item", {"step: waits: stream", "step: launches: copies", "step: launches: all"}),
    ("launch", {"step: launches: ATen", "step: launches: all"}),
    ("spill", {"spills: too_much", "step: launches: ours", "step: launches: all"}),
])
def test_a_planted_fault_is_found_and_nothing_else(workplace, sound, fault, named):
    lines = table.differences(sound, count(workplace, fault))
    assert {line.rpartition(": ")[0] for line in lines} == named


def test_a_planted_graph_break_is_found(workplace, sound):
    lines = table.differences(sound, count(workplace, "graph_break"))
    assert any(line.startswith("graph breaks: 0 in the table") for line in lines)


def test_our_launcher_starts_what_triton_would(workplace):
    out = workplace.out("specialized")
    out.mkdir(parents=True)
    surroundings = running.environment(rows.SMALL, workplace, out)
    done = subprocess.run([workplace.python, "-m", "tests.nullgpu.specialized", str(out)],
                          cwd=running.ROOT, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "found.json").read_text())
    assert found["wrong"] == []
    assert 0 < found["asked"] < found["cases"] / 2  # of pointers that are not aligned
    assert found["different"] > 20  # so what was remembered could have been another's
