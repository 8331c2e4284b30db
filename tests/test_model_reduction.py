"""--reduce_dtype bf16: gradients travel in half the bytes, as far off the mean as is said."""

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.folder import how_gradients_travel
from tests.running import ROOT, environment, losses, run_several, wait_for_ranks
from train_gpt2 import train

MODES = ("ddp", "zero1", "fsdp")


@functools.cache
def reduced(text: Path, ranks: int, **more: str) -> dict[str, dict]:
    """What tests/reduced.py finds, by mode."""
    code, printed = wait_for_ranks(subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={ranks}", "-m", "tests.reduced", str(text)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=environment(**more),
    ), timeout=200)
    assert code == 0, printed
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return {one["mode"]: one for one in found}


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_of_three_ranks_is_within_the_bound(mode, corpus_file):
    """Of model/reduction.py, element by element. Three is no power of two, so dividing rounds. With
    micro-steps that were added up in bf16, three of them, it was 11 to 300 times the bound."""
    found = reduced(corpus_file, 3)[mode]
    assert found["of_bound"] <= 1
    assert found["error"] > 2**-12  # bf16's: fp32's would be 2^-24
    assert found["rounded"]
    assert found["same_bits"]


@pytest.mark.parametrize("mode", MODES)
def test_half_the_bytes_are_sent(mode, corpus_file):
    half, whole = reduced(corpus_file, 3)[mode]["bytes"]
    assert 2 * half == whole > 0


def test_between_nodes_gradients_travel_in_bf16_too(corpus_file):
    """fsdp on 2 nodes of 2: scattered inside each, then averaged between them."""
    found = reduced(corpus_file, 4, PRETEND_LOCAL_WORLD_SIZE="2")["fsdp"]
    half, whole = found["bytes"]
    assert 2 * half == whole > reduced(corpus_file, 3)["fsdp"]["bytes"][1]
    assert found["of_bound"] <= 1
    assert found["same_bits"]


def test_a_run_learns_the_same_and_may_change_to_it(tiny, tmp_path):
    """A mean that is off by 0.2 % moves AdamW's step by about as much of itself, where a gradient's
    elements of different ranks cancel by more: losses near 10 by less than 0.01 in six steps."""
    exact = tiny(name="fp32", micro_batch=2)
    rough = [tiny(name=mode, micro_batch=2, reduce_dtype="bf16", parallel=mode) for mode in MODES]
    rough += [tiny(name=f"fsdp-{dtype}", micro_batch=2, reduce_dtype="bf16", parallel="fsdp",
                   dtype=dtype) for dtype in ("bf16", "fp64")]
    done = run_several([exact, *rough], tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("gradients sent in bf16") == len(rough)
    expected = losses(tmp_path / exact.name)
    for config in rough:
        found = losses(tmp_path / config.name)
        assert found != expected
        assert [loss for _, loss in found] == pytest.approx(
            [loss for _, loss in expected], abs=0.01), config.name
    alone = replace(rough[0], compute=replace(rough[0].compute, reduce_dtype="fp32"))
    with pytest.raises(SystemExit) as leaving:
        train(alone)
    assert leaving.value.code == 0  # for the run is finished, and this is no other


def test_a_run_says_how_gradients_travel():
    assert how_gradients_travel("fp32", 8) == ""
    assert how_gradients_travel("bf16", 8) == ", gradients sent in bf16"
    assert "without effect" in how_gradients_travel("bf16", 1)
