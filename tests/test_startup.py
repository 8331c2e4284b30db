"""What answers at once imports nothing that takes seconds.

    pytest tests/test_startup.py
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import GPTConfig
from model.network import NoFirstWeights, new_network

# By CPU seconds of their import here: torch 1.9, requests and the Hub 0.3, matplotlib 0.3, numpy
# 0.1. tyro, which reads the command line, is 0.1 itself.
HEAVY = {"torch", "triton", "matplotlib", "requests", "huggingface_hub", "numpy", "tiktoken",
         "regex", "safetensors", "pyarrow", "datasets"}
DATA = HEAVY - {"numpy", "tiktoken"}  # what a tokenizer or a shard is read with may be there
ROOT = Path(__file__).parent.parent
TELL = """
import atexit, runpy, sys
program, sys.argv = sys.argv[1], sys.argv[1:]
atexit.register(lambda: print("modules:", *sys.modules, file=sys.stderr))
if program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


def heavy_modules(words: list[str], exit_code: int, folder: Path) -> set[str]:
    """Those of HEAVY that a command has imported when it ends."""
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[0] = {str(ROOT)!r}{TELL}",
                           *words], capture_output=True, text=True, cwd=folder)
    assert done.returncode == exit_code, done.stdout + done.stderr
    line = done.stderr.rpartition("modules: ")[2]
    assert "launch.errors" in line.split()
    return HEAVY.intersection(line.split())


@pytest.mark.parametrize(("words", "exit_code"), [
    (["--help"], 0),
    (["gpt2-124m", "--plan", "8xh100"], 0),
    (["speedrun", "--plan", "8xh100"], 0),
    (["shakespeare-char", "--plan", "1xa100"], 0),
    (["gpt2-124m", "--plan", "8xh10"], 2),
    (["demmo"], 2),
    (["demo", "--stepz", "3"], 2),
    (["demo", "--steps", "none"], 2),
    (["demo", "--steps", "0"], 2),
    (["demo", "--model.n_head", "3"], 2),
    (["demo", "--optim.lr", "-1"], 2),
    (["demo", "--batch_tokens", "1000"], 2),
    (["demo", "--name", "a/b"], 2),
    (["no/such/config.json"], 2),
])
def test_the_program_answers_without_pytorch(words, exit_code, tmp_path):
    assert not heavy_modules([str(ROOT / "train_gpt2.py"), *words], exit_code, tmp_path)


@pytest.mark.parametrize("words", [
    ["gpt2-124m"],
    ["demo", "--data.dir", "nowhere"],
    ["demo", "--data.text", "nowhere.txt"],
    ["demo", "--data.val_text", "nowhere.txt"],
])
def test_data_that_is_not_there_is_seen_without_pytorch(words, tmp_path):
    found = heavy_modules([str(ROOT / "train_gpt2.py"), *words], 2, tmp_path)
    assert not found & DATA


def test_sampling_imports_no_compiler_and_no_fsdp(run):
    """Both bring SymPy: two seconds before the first token."""
    found = set(subprocess.run(
        [sys.executable, "-c", "import sys; from eval import sample; from model import checkpoint; "
         f"checkpoint.load_model({str(run)!r}); print(*sys.modules)"],
        capture_output=True, text=True, cwd=ROOT, check=True).stdout.split())
    assert "torch" in found
    assert not found & {"torch._dynamo", "torch.distributed.fsdp", "sympy"}


@pytest.mark.parametrize("arch", ["gpt2", "speedrun"])
def test_a_network_that_will_be_loaded_is_not_drawn_and_its_padding_is_zero(arch):
    config = GPTConfig(arch=arch, n_layer=2, n_head=2, n_embd=8, n_ctx=8, n_vocab=130)
    drawn = new_network(config)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with NoFirstWeights():
        loaded = new_network(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.wte.weight[130:].any()
    loaded.load_state_dict(drawn.state_dict())
    idx = torch.arange(8)[None]
    assert torch.equal(loaded(idx), drawn(idx))
