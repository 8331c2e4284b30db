"""What lesson 10 starts: itself once a rank, and a run of train_gpt2.py; and what it compares."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from data.dataset import DataConfig, open_data
from data.loader import Loader
from lessons import course
from model.gpt2 import GPTConfig

HERE = Path(__file__).parent


def torchrun(lesson: str, ranks: int) -> list:
    """Runs a lesson once a rank. What rank 0 has printed: lines of JSON."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={ranks}", str(HERE / lesson)]
    # The ranks need no network: either the text is here by now, or it can't be had.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines()]


def report(losses: list[float], weight: Tensor) -> None:
    """On each rank: rank 0 prints, as JSON, the losses' means over all ranks, and by how much a
    weight of one rank differs from another's at most."""
    means = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(means)
    means /= dist.get_world_size()
    ends = torch.stack([weight, -weight]).detach()
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)  # largest and, negative, smallest of all ranks
    if dist.get_rank() == 0:
        print(json.dumps([means.tolist(), ends.sum(0).max().item()]), flush=True)


def apart(mine: Tensor | list[float], theirs: Tensor | list[float]) -> float:
    """The largest difference between two tensors, or lists."""
    a = torch.as_tensor(mine, dtype=torch.float64)
    b = torch.as_tensor(theirs, dtype=torch.float64)
    return (a - b).abs().max().item()


def train_gpt2(size: GPTConfig, text: str, steps: int, warmup: int
               ) -> tuple[list[float], dict[str, Tensor], list[Tensor]]:
    """A run of train_gpt2.py in fp64 on a text: its losses, its first weights, and the batches it
    had, each (2 micro-steps, 4 sequences, T + 1). Prints the command; the run stays in
    runs/lessons/10/run."""
    T = size.n_ctx
    folder = course.OUT / "10"
    shutil.rmtree(folder / "run", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "text.txt"
    file.write_text(text)
    command = f"""train_gpt2.py gpt2-124m --out_dir {folder} --name run --data.text {file}
    --model.n_layer {size.n_layer} --model.n_head {size.n_head} --model.n_embd {size.n_embd}
    --model.n_ctx {T} --batch_tokens {8 * T} --micro_batch 4 --steps {steps} --dtype fp64
    --optim.warmup_steps {warmup} --kernels torch --val_tokens {10 * T} --hellaswag off
    --eval_every {steps} --save_every {steps}"""
    print("python", command)
    script, *flags = command.split()
    subprocess.run([sys.executable, HERE.parent / script, *flags],
                   stdout=subprocess.DEVNULL, check=True)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    weights = load_file(folder / "run/checkpoints/step_00000000/model.safetensors")
    data = open_data(DataConfig(text=str(file))).train
    loader = Loader(data, T=T, batch_tokens=8 * T, micro_batch=4, seed=1337)
    batches = [loader.get_batch(step) for step in range(steps)]
    loader.close()
    return losses, weights, batches
