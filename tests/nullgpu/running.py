"""Starts rows: each a process of its own, in front of the stand-in for a GPU."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.nullgpu.rows import QUESTIONS, Row

ROOT = Path(__file__).parent.parent.parent
SECONDS = 600  # after which a row has failed

# Has no meaning to a run on this card, or another than here.
DROPPED = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF",
           "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Workplace:
    """Where things are: an interpreter with a CUDA build of torch, and the folder for what is
    built, compiled and written."""

    python: str
    folder: Path

    @property
    def inputs(self) -> Path:
        return self.folder / "inputs"

    def out(self, name: str) -> Path:
        """A run's log, results and compiled kernels."""
        return self.folder / "runs" / name.replace(" ", "_").replace(",", "")


def environment(row: Row, place: Workplace, out: Path) -> dict[str, str]:
    """Of a row's process."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    library = place.folder / "lib"
    kept |= {
        "LD_PRELOAD": str(library / "libcuda.so.1"),
        "LD_LIBRARY_PATH": str(library),
        "TRITON_LIBCUDA_PATH": str(library),
        "NULLGPU_CARD": row.card,
        "NULLGPU_COUNT": str(row.ranks),
        "NULLGPU_LOG": str(out / "log"),
        "NULLGPU_CUBINS": str(out / "cubins"),
        "TRITON_CACHE_DIR": str(place.folder / "cache" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(place.folder / "cache" / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # rows run side by side
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if row.ranks > 1:
        ranks = str(row.ranks)
        kept |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                 "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    return kept


def start(row: Row, place: Workplace, fault: str = "", batch: int = 0) -> tuple[Path, str]:
    """Runs a row: the folder of its log, and what went wrong ("" if nothing did).

    fault: of faults.py, to be planted. batch: in place of the row's.
    """
    out = place.out(f"{row.name} {fault or batch or ''}".strip())
    shutil.rmtree(out, ignore_errors=True)
    (out / "cubins").mkdir(parents=True)
    command = [place.python, "-m", "tests.nullgpu.inside", row.name, str(place.inputs), str(out),
               "--fault", fault, "--batch", str(batch or row.batch)]
    with (out / "output").open("w") as output:
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment(row, place, out),
                                  stdout=output, stderr=subprocess.STDOUT, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return out, f"not done after {SECONDS} s"
    if done.returncode or not (out / "found.json").exists():
        last = (out / "output").read_text(errors="replace").strip().splitlines()[-1:]
        return out, f"exit code {done.returncode}: {''.join(last)} ({out / 'output'})"
    return out, ""


def write_inputs(place: Workplace) -> None:
    """A text of a token a word, HellaSwag's kind of questions, and a GPT-2 with its first
    weights."""
    place.inputs.mkdir(parents=True, exist_ok=True)
    (place.inputs / "text.txt").write_text("\n".join([" the" * 1000] * 1200))
    question = {"ctx": "The first thing", "label": 0,
                "endings": ["is that", "is what it is", "was there before", "comes last of all"]}
    lines = [json.dumps(question | {"ind": i}) for i in range(QUESTIONS)]
    (place.inputs / "questions.jsonl").write_text("\n".join(lines))
    if (place.inputs / "model" / "manifest.json").exists():
        return
    write = ("import sys; from pathlib import Path; from model.convert import write_ours;"
             "from model.gpt2 import GPT, GPTConfig; from kernels import operators;"
             "write_ours(GPT(GPTConfig(), operators.TORCH), Path(sys.argv[1]))")
    subprocess.run([place.python, "-c", write, str(place.inputs / "model")], cwd=ROOT, check=True)
