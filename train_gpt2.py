"""Trains GPT-2. Read this file from top to bottom and you have read the whole run.

    python train_gpt2.py demo                                  # minutes on a laptop
    torchrun --standalone --nproc_per_node=8 train_gpt2.py gpt2-124m
    python train_gpt2.py runs/demo/config.json --name again    # the same run once more

It reads tokens (--data.dir, --data.text, or the embedded corpus), and writes runs/NAME/ with
config.json, metrics.jsonl, checkpoints/ and report/. Start the same command again and it goes on
from the newest checkpoint. gpt2-124m on FineWeb ends at a validation loss of about 3.28 (llm.c).
"""

import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from data.loader import DataConfig, Loader, fit_micro_batch, open_data
from data.tokenizer import VOCAB
from eval.exam import Exam, examine, set_exam
from eval.report import plot_losses
from eval.sample import prompt_tokens
from kernels import Choice, selfcheck
from launch import cli, folder
from launch.errors import BadInput, Failed, leave, one_line_errors
from launch.files import folder_lock
from launch.guard import Guard, refuse_nonsense, write_marker
from launch.tracker import Mode, Tracker, start_profiler
from launch.world import Dtype, World, autocast, choose_dtype, start_world
from model import checkpoint, parallel
from model.gpt2 import GPT, GPTConfig, flops_per_token, parameter_count
from model.optim import OptimConfig, learning_rate, make_optimizer


@dataclass(frozen=True)
class TrainConfig:
    """A run. The defaults are GPT-2 124M on 10 billion tokens of FineWeb."""

    name: str = "gpt2-124m"
    """The run's folder inside out_dir."""
    out_dir: str = "runs"
    """Where runs live."""
    steps: int = 18_865
    """Optimizer steps: one epoch of FineWeb-10B (llm.c, scripts/run_gpt2_124M.sh)."""
    batch_tokens: int = 524_288
    """Tokens a step, over all ranks: 2^19, GPT-3's half a million."""
    micro_batch: int = 64
    """Sequences a rank computes at once, at most; the rest of its share is accumulated."""
    seed: int = 1337
    """Of the first weights and of the order of the data."""
    dtype: Dtype = "auto"
    """Format of the matrix products. Weights and optimizer are fp32 (fp64 for fp64)."""
    compile: bool | None = None
    """torch.compile the blocks; None: on CUDA only."""
    kernels: Choice = "auto"
    """Who computes attention, LayerNorm and the loss."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint; never: refuse a used folder; or a checkpoint."""
    init: str = ""
    """Weights for a new run: a checkpoint, a run folder, or hf:DIR (hf:gpt2: from the Hub)."""
    eval_every: int = 250
    """Steps between evaluations: validation loss, HellaSwag, a sample."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """Newest checkpoints to keep."""
    val_tokens: int = 10_485_760
    """The fixed validation set: the first tokens of the validation shard (20 x 2^19)."""
    hellaswag: str = "auto"
    """A JSONL file of questions, off, or auto: downloaded for runs on GPUs."""
    prompt: str = "Hello, I'm a language model,"
    """What the samples continue."""
    wandb: Mode = "disabled"
    """Weights & Biases beside metrics.jsonl."""
    profile: int = 0
    """Steps to record with torch.profiler."""
    model: GPTConfig = field(default_factory=GPTConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def check(self) -> None:
        """Raises BadInput for numbers that make no run."""
        for key in ("steps", "batch_tokens", "eval_every", "save_every", "keep", "val_tokens"):
            if getattr(self, key) < 1:
                raise BadInput(f"--{key} {getattr(self, key)}: expected at least 1")
        if not 0 <= self.seed < 2**32:
            raise BadInput(f"--seed {self.seed}: expected 0 to 4294967295")
        if Path(self.name).name != self.name or self.name in ("", ".", ".."):
            raise BadInput(f"--name {self.name!r} is no folder name; --out_dir takes a path")
        if self.model.n_vocab != VOCAB or self.profile < 0:
            raise BadInput(f"--model.n_vocab is {VOCAB}, the tokenizer's; --profile at least 0")
        prompt_tokens(self.prompt, self.model.n_ctx)


GPT2_124M = TrainConfig()
# Hyper-parameters of llm.c's scripts/run_gpt2_{350M,774M,1558M}.sh and run_gpt3_125M.sh; shapes of
# GPT-2 (table 2) and GPT-3 (arXiv 2005.14165, table 2.1). micro_batch is what 80 GB hold.
PRESETS = {
    "demo": TrainConfig(
        name="demo", steps=960, batch_tokens=1024, micro_batch=8, eval_every=240, save_every=480,
        model=GPTConfig(n_layer=4, n_head=2, n_embd=128, n_ctx=128),
        optim=OptimConfig(lr=6e-3, warmup_steps=120, weight_decay=0.02, beta2=0.995),
        data=DataConfig(dir=""), prompt="In the beginning", hellaswag="off"),
    "gpt2-124m": GPT2_124M,
    "gpt2-350m": replace(GPT2_124M, name="gpt2-350m", steps=60_000, micro_batch=32,
        model=GPTConfig(n_layer=24, n_head=16, n_embd=1024), optim=OptimConfig(lr=3e-4)),
    "gpt2-774m": replace(GPT2_124M, name="gpt2-774m", steps=286_102, micro_batch=16,
        model=GPTConfig(n_layer=36, n_head=20, n_embd=1280), optim=OptimConfig(lr=2.5e-4)),
    "gpt2-1558m": replace(GPT2_124M, name="gpt2-1558m", steps=32_000, batch_tokens=1_048_576,
        model=GPTConfig(n_layer=48, n_head=25, n_embd=1600), optim=OptimConfig(final_lr=0.1),
        micro_batch=8),
    "gpt3-125m": replace(GPT2_124M, name="gpt3-125m", steps=572_204, micro_batch=32,
        model=GPTConfig(n_ctx=2048), optim=OptimConfig(final_lr=0.1)),
}


@dataclass
class Run:
    """Everything a step needs, put together by set_up."""

    config: TrainConfig
    world: World
    path: Path
    dtype: str
    loader: Loader
    exam: Exam
    training: checkpoint.Training
    tracker: Tracker
    guard: Guard
    start: int  # steps finished before this process began
    evaluated: set[int]  # steps whose validation loss is on record already


def train(config: TrainConfig) -> int:
    """Trains from the first step, or the newest checkpoint, to the last. Returns the exit code."""
    with ExitStack() as stack:
        run = set_up(config, stack)
        world, model, optimizer, scaler = run.world, *run.training
        parallel_model = parallel.wrap(model, world.device, world.size)
        profiler = stack.enter_context(start_profiler(run.path, config.profile, world.is_main))

        for step in range(run.start, config.steps + 1):
            last = step == config.steps
            stop = run.guard.asked_to_stop()
            if (step % config.eval_every == 0 and not stop or last) and step not in run.evaluated:
                evaluate(run, step)
            saved = step == run.start > 0  # the checkpoint that this process began from
            if (step % config.save_every == 0 or last or stop) and not saved:
                save(run, step, must_succeed=last or stop or step == 0)
            if last or stop:
                break

            # ---- one training step ----
            started = time.perf_counter()
            batch = next_batch(run, step)  # (micro-steps, B, T + 1)
            lr = learning_rate(step, config.steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros_like(model.wte.weight[0, 0])
            for i, tokens in enumerate(batch):  # (B, T + 1)
                sync = parallel.sync_gradients(parallel_model, now=i == len(batch) - 1)
                with sync, autocast(world.device, run.dtype):
                    part = parallel_model(tokens[:, :-1], tokens[:, 1:]) / len(batch)
                    scaler.scale(part).backward()
                loss += part.detach()
            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(model.parameters(), config.optim.clip or torch.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            # ---- everything that follows is diagnostics ----
            mean_loss = world.sum(loss.item())[0] / world.size
            seconds = time.perf_counter() - started
            run.tracker.step(step + 1, loss=mean_loss, lr=lr, norm=norm.item(), seconds=seconds)
            refuse_nonsense(step + 1, mean_loss, norm.item(), skipped=scaler.is_enabled())
            if profiler:
                profiler.step()
        return finish(run, step)


def set_up(config: TrainConfig, stack: ExitStack) -> Run:
    """Checks the configuration, opens data and run folder, builds the model, and resumes."""
    config.check()
    world = start_world()
    stack.callback(world.close)
    guard = Guard(world)
    stack.callback(guard.close)
    cuda = world.device.type == "cuda"
    T, path = config.model.n_ctx, Path(config.out_dir) / config.name
    dtype = choose_dtype(config.dtype, world.device)
    compiled = cuda if config.compile is None else config.compile
    micro_batch = fit_micro_batch(config.batch_tokens, world.size, T, config.micro_batch)
    data = world.together(lambda: open_data(config.data))
    exam = set_exam(data, T, config.val_tokens, micro_batch, config.hellaswag, config.prompt, world)
    loader = Loader(
        data.train, T=T, batch_tokens=config.batch_tokens, micro_batch=micro_batch,
        seed=config.seed, rank=world.rank, ranks=world.size, pin=cuda,
    )
    stack.callback(loader.close)
    description = folder.describe(
        asdict(config), world, data.fingerprint(), dtype=dtype, compile=compiled,
        micro_batch=micro_batch, accumulation=len(loader), epochs=loader.epoch(config.steps),
        val_set=exam.val_set,
    )

    world.on_main(lambda: stack.enter_context(folder_lock(path)))
    source = world.on_main(lambda: checkpoint.find_start(config.resume, path))
    if source:
        world.together(lambda: folder.require_same(source, description))
    model, start = world.together(lambda: build_model(config, world, dtype)), 0
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == "fp16")
    training = checkpoint.Training(model, make_optimizer(model, config.optim), scaler)
    if source:
        start = world.together(lambda: checkpoint.load_training(training, source))
    elif config.init:
        world.together(lambda: checkpoint.copy_weights(model, config.init))
    if start == config.steps:
        world.print(f"{path} is finished: {config.steps} steps. For another run: --name")
        sys.exit(0)
    if compiled:
        model.compile_blocks()
    evaluated = world.on_main(lambda: folder.open_run(path, description, start if source else -1))
    flops = flops_per_token(config.model)
    tracker = world.together(lambda: Tracker(path, world, description, flops))
    stack.callback(tracker.close)
    world.print(folder.introduction(description, parameter_count(config.model), T))
    if start:
        world.print(f"going on from {source}")
        tracker.log(start, event=f"resumed on {world.size} ranks")
    return Run(config, world, path, dtype, loader, exam, training, tracker, guard, start, evaluated)


def build_model(config: TrainConfig, world: World, dtype: str) -> GPT:
    """A new model, the same on every rank and device: it's drawn on the CPU from the seed."""
    weights = torch.float64 if dtype == "fp64" else torch.float32
    head_width = config.model.n_embd // config.model.n_head
    try:
        ops, line = selfcheck.checked(config.kernels, world.device, head_width, weights)
    except (ValueError, RuntimeError) as error:  # kernels knows nothing of this project's errors
        raise BadInput(str(error)) from None
    world.print(line)
    torch.manual_seed(config.seed)
    return GPT(config.model, ops).to(world.device, weights)


def next_batch(run: Run, step: int) -> torch.Tensor:
    """This rank's tokens. Data that can't be read on any rank stops them all, after a save."""
    batch, fault = run.loader.try_batch(step)
    if run.world.max(fault is not None):
        save(run, step, must_succeed=True)
        run.world.agree(fault)
    return batch.to(run.world.device, non_blocking=True)


def evaluate(run: Run, step: int) -> None:
    """Judges the model on all ranks and records the result."""
    with autocast(run.world.device, run.dtype):
        row = examine(run.training.model, run.exam, run.world, with_questions=step > 0)
    run.tracker.log(step, **row)


def save(run: Run, step: int, must_succeed: bool) -> None:
    """Writes a checkpoint on rank 0. One that fails in mid-run is reported; training goes on."""
    tokens, keep = step * run.config.batch_tokens, run.config.keep
    write = partial(checkpoint.save, run.path, step, tokens, run.training, keep)
    try:
        run.world.print("saved", run.world.on_main(write))
    except Failed as error:
        if must_succeed:
            raise
        run.world.print(f"warning: {error}; training goes on, the checkpoints before it are good")
        run.tracker.log(step, event=f"checkpoint failed: {error}")


def finish(run: Run, step: int) -> int:
    """Says how the run ended: the plot, a marker after a signal, the next command to try."""
    world, stopped = run.world, step < run.config.steps
    if stopped:
        reason = f"stopped by {run.guard.stop_name()} at step {step}"
        world.on_main(lambda: write_marker(run.path, reason))
        run.tracker.log(step, event=reason)
        world.print(f"{reason}; the same command goes on from there")
    world.print("plot:", world.on_main(lambda: plot_losses(run.path)))
    if not stopped:
        prompt = shlex.quote(run.config.prompt)
        world.print(f"next: python -m eval.sample {run.path} --prompt {prompt}")
    return run.guard.exit_code if stopped else 0


if __name__ == "__main__":
    with one_line_errors():
        leave(train(cli.parse(TrainConfig, PRESETS)))
