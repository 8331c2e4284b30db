"""What answers at once imports nothing that takes seconds.

    pytest tests/test_startup.py
"""

import json
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from eval import evaluator
from kernels import operators
from model.config import ComputeConfig, GPTConfig
from model.network import NoFirstWeights, compile_blocks, new_network, without_compiling
from model.training import new_model
from tests.running import ALONE, environment
from train_gpt2 import train

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


def test_a_run_is_imported_without_looking_for_garbage_and_trains_with_it():
    """At each of Python's looks, whether PyTorch's import had begun; then how the run begins."""
    done = subprocess.run([sys.executable, "-c", """
import gc, json, runpy, sys
import launch.errors

looks = []
gc.callbacks.append(lambda phase, info: looks.append("torch" in sys.modules))
launch.errors.run_command = lambda *_, **__: print(json.dumps(
    [sum(looks), gc.isenabled(), gc.get_freeze_count()]))
sys.argv = ["train_gpt2.py", "demo"]
runpy.run_path("train_gpt2.py", run_name="__main__")
"""], capture_output=True, text=True, cwd=ROOT, check=True)
    looks, enabled, frozen = json.loads(done.stdout)
    assert looks == 0
    assert enabled
    assert frozen > 100_000  # objects: 256,502 of PyTorch 2.13 and ours


def test_a_run_that_compiles_nothing_does_not_import_the_compiler(tmp_path):
    """Its evaluations, samples and checkpoints neither; it takes a second (docs/decisions.md)."""
    small = ["--model.n_layer", "1", "--model.n_embd", "32", "--model.n_ctx", "16", "--steps", "1",
             "--batch_tokens", "64", "--val_tokens", "64", "--out_dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[0] = {str(ROOT)!r}{TELL}",
                           str(ROOT / "train_gpt2.py"), "demo", *small],
                          capture_output=True, text=True, cwd=tmp_path,
                          env=environment(CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 0, done.stdout + done.stderr
    modules = done.stderr.rpartition("modules: ")[2].split()
    assert "torch" in modules
    assert "torch._dynamo" not in modules


def test_a_compiled_model_is_sampled_as_it_is_written(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)  # compile_blocks() changes it
    asked = []
    monkeypatch.setattr(torch.compiler, "set_stance",
                        lambda to: (asked.append(to), nullcontext())[1])
    model = new_network(GPTConfig(n_layer=1, n_head=2, n_embd=8, n_ctx=8, n_vocab=130))
    with without_compiling(model):
        assert asked == []
    compile_blocks(model)
    with without_compiling(model):
        assert asked == ["force_eager"]


def test_an_evaluation_samples_so(tiny, monkeypatch):
    inside, sampled = [False], []

    @contextmanager
    def noted(model):
        inside[0] = True
        yield
        inside[0] = False

    monkeypatch.setattr(evaluator, "without_compiling", noted)
    monkeypatch.setattr(evaluator, "sample_text", lambda *_: sampled.append(inside[0]) or "so")
    assert train(tiny(steps=1)) == 0
    assert sampled and all(sampled)


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


def test_constants_are_filled_in_where_nothing_is_drawn():
    tensor = torch.full((3,), 7.0)
    with NoFirstWeights():
        for fill, value in ((torch.nn.init.ones_, 1), (torch.nn.init.zeros_, 0),
                            (lambda given: torch.nn.init.constant_(given, 0.5), 0.5)):
            assert fill(tensor).eq(value).all()
        assert torch.nn.init.normal_(tensor).eq(0.5).all()


@pytest.mark.parametrize("arch", ["gpt2", "speedrun"])
def test_first_weights_are_drawn_once_and_are_those_of_the_network(arch, monkeypatch):
    """nn.Linear's and nn.Embedding's own are not drawn before; what they leave is overwritten."""
    config = GPTConfig(arch=arch, n_layer=2, n_head=2, n_embd=8, n_ctx=8, n_vocab=130)
    torch.manual_seed(3)
    network = new_network(config)
    torch.manual_seed(3)
    network.init_weights()
    drawn = []
    for name in ("normal_", "uniform_"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, *words, plain=plain, **named: (
            drawn.append(tensor.numel()), plain(tensor, *words, **named))[1])
    model = new_model(config, ComputeConfig(), operators.TORCH, torch.float32, 3, ALONE)
    expected = network.state_dict()
    assert all(value.equal(expected[name]) for name, value in model.state_dict().items())
    once = [parameter.numel() for parameter in network.parameters() if parameter.std() > 0]
    if arch == "speedrun":  # constant, and not the same in both columns; padding is not drawn
        once.remove(network.x0_mix.numel())
        once.remove(network.wte.weight.numel())
        once.append(130 * 8)
    assert sorted(drawn) == sorted(once)
