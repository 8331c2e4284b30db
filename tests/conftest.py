"""What every test may use. Tests that want real texts skip where GPT2_TEST_DATA names none."""

import os
from dataclasses import fields
from functools import partial
from pathlib import Path
from shutil import copytree

os.environ["TRITON_INTERPRET"] = "1"  # Triton decides when a kernel is defined, so before torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a network
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch

from data import sources
from data.dataset import DataConfig
from eval.evaluator import EvalConfig
from launch.config import TrackerConfig
from launch.spikes import SpikeConfig
from launch.watchdog import WatchdogConfig
from model.config import SavingConfig
from model.gpt2 import GPT, GPTConfig
from model.optim import OptimConfig
from model.training import ComputeConfig
from tests.documents import texts, write_parquet
from tests.running import CONFIG
from tests.saved import make_run
from train_gpt2 import TrainConfig

ROOT = Path(__file__).parent.parent

PARTS = {"compute": ComputeConfig, "saving": SavingConfig, "evaluation": EvalConfig,
         "tracker": TrackerConfig, "spikes": SpikeConfig, "watchdog": WatchdogConfig}
# A GPT-2 that trains in seconds. 12 sequences a step divide by 1, 2, 3 and 4 ranks.
TINY = dict(
    name="tiny", steps=6, batch_tokens=12 * 16, micro_batch=12, eval_every=3, save_every=3,
    val_tokens=320, hellaswag="off", prompt="In the beginning", dtype="fp32",
    model=GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=16),
    optim=OptimConfig(lr=3e-3, warmup_steps=2),
)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Two test processes share two cores, and sums of one thread repeat bit for bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def programs_end_by_an_exception():
    """Run in this process, on a machine with a GPU, a program would end it at once, and the tests
    that come after it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("launch.errors.may_be_aborted", lambda: False)
        yield


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> Path:
    """About 30,000 characters of English-like text."""
    sentence = "the spirit of god was hovering over the face of the deep and it was good"
    words = sentence.split(" ")
    lines = [" ".join(words[(i * 7 + j * (i % 5 + 1)) % len(words)] for j in range(12))
             for i in range(500)]
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n".join(lines))
    return path


def make_config(folder: Path, text: Path, **changes) -> TrainConfig:
    """A tiny run in the folder on this text, with these changes, wherever their settings live."""
    settings = TINY | {"out_dir": str(folder), "data": DataConfig(text=str(text))} | changes
    for key, part in PARTS.items():
        names = settings.keys() & {f.name for f in fields(part)}
        settings[key] = part(**{name: settings.pop(name) for name in names})
    return TrainConfig(**settings)


@pytest.fixture
def tiny(tmp_path, corpus_file):
    """tiny(steps=3, ...) is a configuration of a run in this test's own folder."""
    return partial(make_config, tmp_path, corpus_file)


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory) -> Path:
    """What `run` copies."""
    folder = tmp_path_factory.mktemp("saved")
    make_run(folder)
    return folder


@pytest.fixture
def run(saved_once, tmp_path) -> Path:
    """This test's own run folder, with checkpoints of steps 1 and 2."""
    return copytree(saved_once, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def corpus(tmp_path) -> tuple[str, list[str]]:
    """(the pattern, the documents) of three parquet files."""
    documents = texts(300)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(3):
        write_parquet(folder / f"{i}.parquet", documents[i * 100 : i * 100 + 100])
    return str(folder / "*.parquet"), documents


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 4_000)


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random weights in fp64, for evaluations that must agree to the last digits."""
    torch.manual_seed(0)
    return GPT(CONFIG).double()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real texts, where there is one."""
    folder = os.environ.get("GPT2_TEST_DATA")
    if not folder:
        pytest.skip("GPT2_TEST_DATA names no folder with the real texts")
    return Path(folder)
