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
from pathlib import Path

import torch
from tyro.conf import OmitArgPrefixes

from data.loader import DataConfig, Loader, fit_micro_batch, open_data
from data.tokenizer import VOCAB
from eval.exam import Exam, ExamConfig, examine, set_exam
from eval.report import plot_losses
from launch import cli, folder, plan, preflight
from launch.errors import BadInput, leave, one_line_errors
from launch.files import folder_lock
from launch.guard import MARKER, Guard, GuardConfig, write_marker
from launch.tracker import Tracker, TrackerConfig
from launch.world import World, autocast, choose_dtype, start_world
from model import checkpoint
from model.gpt2 import GPTConfig, flops_per_token, parameter_count
from model.optim import OptimConfig, clip_factor, learning_rate
from model.saving import Saver, SavingConfig
from model.training import ComputeConfig, make_training


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
    resume: str = "auto"
    """auto: go on from the newest checkpoint; never: refuse a used folder; or a checkpoint."""
    init: str = ""
    """Weights for a new run: a checkpoint, a run folder, or hf:DIR (hf:gpt2: from the Hub)."""
    model: GPTConfig = field(default_factory=GPTConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    compute: OmitArgPrefixes[ComputeConfig] = field(default_factory=ComputeConfig)
    saving: OmitArgPrefixes[SavingConfig] = field(default_factory=SavingConfig)
    exam: OmitArgPrefixes[ExamConfig] = field(default_factory=ExamConfig)
    tracker: OmitArgPrefixes[TrackerConfig] = field(default_factory=TrackerConfig)
    guard: OmitArgPrefixes[GuardConfig] = field(default_factory=GuardConfig)
    planning: OmitArgPrefixes[plan.PlanConfig] = field(default_factory=plan.PlanConfig)

    def check(self) -> None:
        """Raises BadInput for numbers that make no run."""
        cli.at_least_1(self, "steps", "batch_tokens", "micro_batch")
        if not 0 <= self.seed < 2**32:
            raise BadInput(f"--seed {self.seed}: expected 0 to 4294967295")
        if self.model.n_vocab != VOCAB:
            raise BadInput(f"--model.n_vocab is {VOCAB}, the tokenizer's")
        folder.check_name(self.name)
        self.exam.check(self.model.n_ctx)
        self.saving.check()


# Hyper-parameters of llm.c's scripts/run_gpt2_{350M,774M,1558M}.sh and run_gpt3_125M.sh; shapes of
# GPT-2 (table 2) and GPT-3 (arXiv 2005.14165, table 2.1). micro_batch is what 80 GB hold.
PRESETS = {
    "demo": TrainConfig(  # the best of what was tried for four minutes on two CPU cores
        name="demo", steps=900, batch_tokens=1024, micro_batch=8,
        model=GPTConfig(n_layer=4, n_head=2, n_embd=128, n_ctx=128),
        optim=OptimConfig(lr=6e-3, warmup_steps=120, weight_decay=0.02, beta2=0.995),
        data=DataConfig(dir=""), saving=SavingConfig(save_every=450),
        exam=ExamConfig(eval_every=225, prompt="In the beginning", hellaswag="off")),
    "gpt2-124m": TrainConfig(),
    "gpt2-350m": TrainConfig(name="gpt2-350m", steps=60_000, micro_batch=32,
        model=GPTConfig(n_layer=24, n_head=16, n_embd=1024), optim=OptimConfig(lr=3e-4)),
    "gpt2-774m": TrainConfig(name="gpt2-774m", steps=286_102, micro_batch=16,
        model=GPTConfig(n_layer=36, n_head=20, n_embd=1280), optim=OptimConfig(lr=2.5e-4)),
    "gpt2-1558m": TrainConfig(name="gpt2-1558m", steps=32_000, batch_tokens=1_048_576,
        model=GPTConfig(n_layer=48, n_head=25, n_embd=1600), optim=OptimConfig(final_lr=0.1),
        micro_batch=8),
    "gpt3-125m": TrainConfig(name="gpt3-125m", steps=572_204, micro_batch=32,
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
    saver: Saver
    tracker: Tracker
    guard: Guard
    start: int  # steps finished before this process began
    saved: int  # step of the newest checkpoint, on the disk or on its way there
    evaluated: set[int]  # steps whose validation loss is on record already


def train(config: TrainConfig) -> int:
    """Trains from the first step, or the newest checkpoint, to the last. Returns the exit code."""
    config.check()
    parameters, flops = parameter_count(config.model), flops_per_token(config.model)
    if config.planning.plan:
        return plan.show(asdict(config), parameters, flops)
    if config.planning.preflight:
        return preflight.of_run(asdict(replace(config, data=config.data.resolve())), parameters)
    with ExitStack() as stack:
        run = set_up(config, stack)
        world, net, optimizer, scale = run.world, *run.training
        step = run.start

        while True:
            run.saver.tell_news(step)
            last, stop = step == config.steps, run.guard.asked_to_stop()
            if step % config.exam.eval_every == 0 and not stop or last:
                stop = not evaluate(run, step)
            if step % config.saving.save_every == 0 or last or stop:
                save(run, step, wait=last or stop or step == 0)
            if last or stop:
                return finish(run, step)

            # ---- one training step ----
            started = time.perf_counter()
            batch = next_batch(run, step)  # (micro-steps, B, T + 1)
            lr = learning_rate(step, config.steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), device=world.device)
            for i, tokens in enumerate(batch):  # (B, T + 1)
                with net.micro_step(last=i == len(batch) - 1), autocast(world.device, run.dtype):
                    part = net(tokens[:, :-1], tokens[:, 1:]) / len(batch)
                    (part * scale.value).backward()
                loss = loss + part.detach()
                run.guard.watchdog.alive()
            norm = net.gradient_norm(scale.value)
            mean_loss = world.sum(loss.item())[0] / world.size
            overflow = scale.overflowed(mean_loss, norm.item())  # fp16's own affair
            if not overflow and (problem := run.guard.spikes.judge(step, mean_loss, norm.item())):
                step = recover(run, step, problem, mean_loss, norm.item())
                continue
            if not overflow:
                net.scale_gradients(clip_factor(norm, config.optim.clip))
                optimizer.step()
                net.exchange()
            net.forget_gradients()
            step += 1

            # ---- everything that follows is diagnostics ----
            seconds = time.perf_counter() - started
            run.tracker.step(step, loss=mean_loss, lr=lr, norm=norm.item(), seconds=seconds)


def set_up(config: TrainConfig, stack: ExitStack) -> Run:
    """Opens data and run folder, builds the model, and resumes."""
    world = start_world(config.compute.deterministic)
    T, path = config.model.n_ctx, Path(config.out_dir) / config.name
    guard = Guard(world, path, config.guard)
    stack.callback(guard.close)
    stack.push(world.leave)
    dtype = choose_dtype(config.compute.dtype, world.device)
    micro_batch = fit_micro_batch(config.batch_tokens, world.size, T, config.micro_batch)
    data = world.together(lambda: open_data(config.data))
    exam = set_exam(config.exam, data, T, micro_batch, world)
    loader = Loader(
        data.train, T=T, batch_tokens=config.batch_tokens, micro_batch=micro_batch,
        seed=config.seed, rank=world.rank, ranks=world.size, pin=world.device.type == "cuda",
    )
    stack.callback(loader.close)
    description = folder.describe(
        asdict(config), world, data.fingerprint(), dtype=dtype,
        compile=config.compute.compiled(world.device), micro_batch=micro_batch,
        accumulation=len(loader), epochs=loader.epoch(config.steps), val_set=exam.val_set,
        parameters=parameter_count(config.model), flops_per_token=flops_per_token(config.model),
    )

    world.on_main(lambda: stack.enter_context(folder_lock(path)))
    source = world.on_main(lambda: checkpoint.find_start(config.resume, path))
    if source:
        world.together(lambda: folder.require_same(source, description))
    training, state = make_training(config.model, config.optim, config.compute, dtype, config.seed,
                                    config.init, source, world)
    start = state.get("step", 0)
    if source:
        loader.load_skipped_batches(state["skipped"])
        guard.spikes.load(state)
    if start == config.steps and not (path / MARKER).exists():
        world.print(f"{path} is finished: {config.steps} steps. For another run: --name")
        sys.exit(0)
    evaluated = world.on_main(lambda: folder.open_run(path, description, start if source else -1))
    tracker = world.together(lambda: Tracker(path, world, description))
    stack.callback(tracker.close)
    saver = Saver(path, training, tracker, config.saving.keep)
    stack.callback(saver.close)
    world.print(folder.introduction(description, T))
    if start:
        tracker.event(start, f"resumed on {world.size} ranks from {source}")
    return Run(config, world, path, dtype, loader, exam, training, saver, tracker, guard, start,
               start if source else -1, evaluated)


def next_batch(run: Run, step: int) -> torch.Tensor:
    """This rank's tokens. Data that can't be read on any rank stops them all, after a save."""
    batch, fault = run.loader.try_get_batch(step)
    if run.world.max(fault is not None):
        save(run, step, wait=True)
        run.world.agree(fault)
    return batch.to(run.world.device, non_blocking=True)


def evaluate(run: Run, step: int) -> bool:
    """Judges the model, if that isn't on record, on all ranks; False where a signal came first."""
    if step in run.evaluated:
        return True
    model, stop = run.training.net.model, run.guard.asked_to_stop
    with run.training.net.whole(), autocast(run.world.device, run.dtype):
        row = examine(model, run.exam, run.world, stop, with_questions=step > 0)
    if row:
        run.tracker.log(step, **row)
        run.evaluated.add(step)
    return row is not None


def save(run: Run, step: int, wait: bool) -> None:
    """Begins a checkpoint. One that fails in mid-run is reported, and training goes on."""
    if step == run.saved:
        return
    progress = {"step": step, "tokens": step * run.config.batch_tokens}
    state = progress | {"skipped": run.loader.skipped_batches} | run.guard.spikes.state()
    run.saver.save(step, state, wait)
    run.saved = step


def recover(run: Run, step: int, problem: str, loss: float, norm: float) -> int:
    """After a step that would do harm: the step to go on with, as --on_spike says."""
    run.training.net.forget_gradients()
    run.guard.spikes.end_if_hopeless(step + 1, problem, loss, norm)
    line = f"step {step + 1}: {problem}"
    if run.config.guard.on_spike == "rollback":
        return roll_back(run, step, line)
    run.tracker.event(step + 1, f"skipped {line}", train_loss=loss, grad_norm=norm)
    return step + 1


def roll_back(run: Run, step: int, line: str) -> int:
    """Returns to the newest checkpoint, and leaves out the batches from there to this step."""
    run.saver.wait_for_last()
    source = run.world.on_main(lambda: checkpoint.find(str(run.path)))
    state = run.world.together(lambda: checkpoint.load_training(run.training, source))
    first = state["step"]
    run.loader.skip_batches(first, step + 1)
    run.guard.spikes.rewind(state)
    run.evaluated -= set(range(first + 1, step + 1))
    run.tracker.rewind(first)
    run.tracker.event(first, f"rolled back to step {first} and left out the batches up to {line}")
    run.saved = -1
    save(run, first, wait=True)  # with the skipped batches, for a run that is killed now
    return first


def finish(run: Run, step: int) -> int:
    """Says how the run ended: the plot, a marker after a signal, the next command to try."""
    world, stopped = run.world, step < run.config.steps or step not in run.evaluated
    if stopped:
        reason = f"stopped by {run.guard.stop_name()} at step {step}"
        world.on_main(lambda: write_marker(run.path, reason))
        run.tracker.event(step, f"{reason}; the same command goes on from there")
    world.print("plot:", world.on_main(lambda: plot_losses(run.path)))
    if not stopped:
        prompt = shlex.quote(run.config.exam.prompt)
        world.print(f"next: python -m eval.sample {run.path} --prompt {prompt}")
    return run.guard.exit_code if stopped else 0


if __name__ == "__main__":
    with one_line_errors():
        leave(train(cli.parse(TrainConfig, PRESETS)))
