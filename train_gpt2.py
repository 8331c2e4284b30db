"""Trains GPT-2. Read this file from top to bottom and you have read the whole run.

    python train_gpt2.py demo                                  # minutes on a laptop
    torchrun --standalone --nproc_per_node=8 train_gpt2.py gpt2-124m
    python train_gpt2.py runs/demo/config.json --name again    # the same run once more

It reads tokens (--data.dir, --data.text, or the embedded corpus), and writes runs/NAME/ with
config.json, metrics.jsonl, checkpoints/ and report/. Start the same command again and it goes on
from the newest checkpoint. gpt2-124m on FineWeb ends at a validation loss of about 3.28 (llm.c).
"""

import gc
import sys
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launch import cli
from launch.errors import exit_process, one_line_errors, run_command
from presets import PRESETS, TrainConfig

if __name__ == "__main__":
    # Before PyTorch is imported, which takes seconds: --help, --plan and wrong flags end here.
    with one_line_errors(output_may_fail=True):
        # No PRESET: TrainConfig's defaults; a run's folder: that run. --steps scales the warm-up.
        CONFIG = cli.parse(TrainConfig, PRESETS)
        CONFIG.check()
        if CONFIG.planning.plan:
            exit_process(CONFIG.show_plan())
        if not CONFIG.planning.preflight:
            CONFIG.check_surroundings()
    gc.disable()  # what is imported is no garbage, and looking for some takes 0.3 s

import torch

from data.config import fit_micro_batch
from data.dataset import open_on_all_ranks
from data.loader import Loader
from eval.evaluator import Evaluator
from eval.report import plot_losses
from launch import folder, preflight, recovery
from launch.files import folder_lock
from launch.reports import StepReports
from launch.signals import DistributedSignalHandler, record_stop, was_stopped
from launch.spikes import SpikeDetector, spike_detector
from launch.tracker import Tracker
from launch.watchdog import Watchdog
from launch.world import World, choose_dtype, init_distributed
from model import checkpoint, diagnostics, pace
from model.longer import set_aside_decayed
from model.network import flops_per_token, is_compiled, parameter_count
from model.optim import decay_start, get_lr
from model.saving import Saver
from model.training import TrainState, build_train_state, device_decides


@dataclass
class Run:
    """Everything a step needs, put together by set_up."""

    config: TrainConfig
    world: World  # the ranks
    path: Path  # the run's folder
    loader: Loader
    evaluator: Evaluator
    state: TrainState  # ParallelModel, AdamW, fp16's LossScaler: model/parallel, optim
    saver: Saver
    tracker: Tracker
    signals: DistributedSignalHandler
    spikes: SpikeDetector
    reports: StepReports  # of steps, on their way here from the device
    watch: diagnostics.Diagnostics  # of --diagnose_every
    pace: pace.Pace  # of --minutes
    first_step: int  # steps that were finished before this process began

    def is_due(self, step: int) -> bool:
        """Whether the weights of this step are evaluated or saved, or are the last ones."""
        return (step % self.config.evaluation.eval_every == 0 or step == self.config.steps
                or step % self.config.saving.save_every == 0 or self.saver.must_keep(step))

    def save(self, step: int, wait: bool) -> None:
        """All ranks begin a checkpoint, if this step has none; wait: till it's there, or Failed."""
        if self.pace.timing and step > 0:  # a step that will be taken back
            return
        progress = {"step": step, "tokens": step * self.config.batch_tokens,
                    "skipped": self.loader.skipped_batches, **self.spikes.state_dict()}
        self.saver.save(step, progress, wait)


def train(config: TrainConfig) -> int:
    """Trains from the first step, or the newest checkpoint, to the last. Returns the exit code."""
    config.check()
    if config.planning.preflight:  # on_disk(): a default folder is filled in
        settings = asdict(replace(config, data=config.data.on_disk()))
        return preflight.of_run(settings, parameter_count(config.model))
    with ExitStack() as at_exit:
        run = set_up(config, at_exit)
        config, world = run.config, run.world  # --minutes of a run that goes on: its steps
        step, save_due = run.first_step, False
        model, optimizer, scaler = run.state  # under fsdp all ranks must call model together
        while True:
            # What became of the steps before: a line for each. Of a bad one --on_spike: it was left
            # out, or step is a checkpoint's again, without the batches since, or Failed is raised.
            # A GPU's latest step is heard of next time, unless something is due now.
            everything = save_due or run.pace.timing or run.is_due(step)
            step, stopping = run.reports.settle(run, step, everything)  # stopping: after a signal
            if run.pace.is_known(step, run):  # --minutes: the first steps were timed for it
                config, step = run.pace.plan(run), 0
            run.saver.report_finished(step)  # all ranks; prints "saved" or a warning, no more
            last_step = step == config.steps

            # once in a while, and at the end: evaluate the model
            if (step % config.evaluation.eval_every == 0 and not stopping) or last_step:
                # False where a signal came first; on record already, or weights broken: True.
                stopping = not run.evaluator.evaluate(model, step, run.tracker)
            last_step = last_step or run.evaluator.stops_early(step, run.tracker)  # --early_stop

            # once in a while, but not while steps are bad, and before leaving: save a checkpoint
            save_due |= step % config.saving.save_every == 0 or run.saver.must_keep(step)
            if save_due and run.spikes.in_a_row == 0 or last_step or stopping:
                run.save(step, wait=last_step or stopping or step == 0)
                save_due = False

            if last_step or stopping:
                return finish(run, step, last_step)

            # ---- one training step ----
            began = run.reports.begin()  # its time
            # (micro-steps, B, T + 1) tokens, and (micro-steps, B T) their places sorted by token
            micro_batches, orders, targets_a_rank = recovery.get_batch(run, step)
            lr = get_lr(step, config.steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_ratio"]  # 1 but for AdamW's groups beside Muon

            # forward and backward: the gradients of all micro-steps are added up
            if config.model.dropout:
                world.seed_step(config.seed, step)  # what it draws
            micro_losses = []
            for i, (tokens, order) in enumerate(zip(micro_batches, orders, strict=True)):
                last_micro_step = i == len(micro_batches) - 1
                inputs, targets = run.loader.inputs_and_targets(tokens)  # (B, T) each
                with model.gradient_sync(last_micro_step):  # ranks average in the last one only
                    micro_loss = model(inputs, targets, "sum", order) / targets_a_rank
                    scaler.scaled(micro_loss).backward()
                micro_losses.append(micro_loss.detach())
                interrupted = not last_micro_step and run.signals.stop_requested_in_step()
                if interrupted:  # asked of all ranks, but not of several GPUs: theirs are fast
                    break
            if interrupted:  # by a signal: this step is not applied, and comes again on resume
                model.zero_grad()
                continue
            model.unscale_gradients(scaler.scale)
            total_norm = model.gradient_norm()  # under fsdp ranks add up what each has, else agree

            # the update, unless it would do harm: judged where loss and norm are, on the device
            loss = sum(micro_losses[1:], micro_losses[0])
            verdict = run.reports.judge(run, loss, total_norm)
            model.optimizer_step(optimizer, verdict)  # clips; under zero1 all ranks get all rows
            model.zero_grad()
            run.reports.put(step, verdict, lr, began)
            run.tracker.step_launched()  # --profile
            step += 1


def set_up(config: TrainConfig, at_exit: ExitStack) -> Run:
    """Opens data and run folder, builds the model, and loads the checkpoint to go on from."""
    world = init_distributed(config.compute.deterministic)  # ranks leave if torchrun dies; no TF32
    T, path = config.model.n_ctx, Path(config.out_dir) / config.name
    world.require_same(folder.same_on_all_ranks(asdict(config)))  # places of data needn't be
    config, minutes = pace.known_steps(config, path, world)  # of --minutes, where it was planned
    run_pace = pace.Pace(config.minutes)
    watchdog = at_exit.enter_context(closing(Watchdog(world, path, config.watchdog)))
    # Signals print a line and raise a flag; a second Ctrl-C ends the process at once.
    signals = at_exit.enter_context(closing(DistributedSignalHandler(world, watchdog)))
    at_exit.push(world)  # leaves the process group
    watchdog.heartbeat(setting_up=True)  # starts its thread; a rank that hangs prints its stacks

    # data
    dtype = choose_dtype(config.compute.dtype, world.device)  # auto: bf16, fp16, fp32: what is fast
    world.require_same({"--dtype": dtype})
    micro_batch = fit_micro_batch(config.batch_tokens, world.size, T, config.micro_batch)
    # Opened, not read; a text is tokenised anew. Fingerprints are of tokens, not of file names.
    data = open_on_all_ranks(config.data, T, world)
    config = config.with_vocabulary(data.tokenizer.n_vocab)
    characters = data.tokenizer.characters  # "": GPT-2's
    # on rank 0 it downloads HellaSwag, where it will be asked for; so all ranks are needed
    evaluator = Evaluator(config.evaluation, data, T, micro_batch, world, signals.stop_requested)
    loader = at_exit.enter_context(closing(Loader(
        data.train, T=T, batch_tokens=config.batch_tokens, micro_batch=micro_batch,  # or less data
        seed=config.seed, rank=world.rank, ranks=world.size, pin=world.device.type == "cuda",
    )))

    # the run's folder, which no other process may use, and the checkpoint to go on from
    description = folder.describe(  # of config.json; decay_start: -1 for a cosine
        asdict(config), world, data.fingerprints(), characters, dtype=dtype,
        val_set=evaluator.val_set, micro_batch=micro_batch, accumulation=loader.micro_steps,
        epochs=loader.epoch(config.steps), decay_start=decay_start(config.steps, config.optim),
        compile=config.compute.compiled(world.device), minutes=minutes,
        parameters=parameter_count(config.model), flops_per_token=flops_per_token(config.model),
    )
    world.broadcast_from_rank0(at_exit.enter_context, folder_lock(path))
    world.broadcast_from_rank0(checkpoint.clean_up, path / "checkpoints")  # mends what a kill left
    world.broadcast_from_rank0(set_aside_decayed, path, description)  # where more steps are asked
    # The folder's own newest, or before there is one --resume PATH; damaged ones are passed over.
    source = world.broadcast_from_rank0(checkpoint.find_resume_checkpoint, config.resume, path)
    if source:  # BadInput unless model, optim, batch_tokens, seed, data (and mostly steps) match
        world.broadcast_from_rank0(folder.require_same_run, source, description)

    state, saved = build_train_state(config.model, config.optim, config.compute, dtype,
                                     config.seed, config.init, source, world, characters,
                                     micro_batch)
    description["resolved"]["compile"] = is_compiled(state.model.module)  # by hand, they are not
    description["resolved"]["kernels"] = state.model.chosen  # the fastest, or as source says
    # On GPUs mostly: whether a step is applied is decided there, and heard of here a step late.
    late = state.model.device_decides = device_decides(state, config.tracker.diagnose_every)
    spikes = spike_detector(config.spikes, world.device if late else torch.device("cpu"))
    newest_step = saved.get("step", -1)  # of source, or -1: a new run has saved nothing
    first_step = max(newest_step, 0)
    if source:
        loader.load_skipped_batches(saved["skipped"])
        spikes.load_state_dict(saved)
    if first_step == config.steps and not world.broadcast_from_rank0(was_stopped, path):
        world.print0(f"{path} is finished: {config.steps} steps. For another run: --name")
        sys.exit(0)

    # what is written: config.json, metrics.jsonl (rows past newest_step are cut; those left that
    # hold an evaluation are returned: it is not done again), checkpoints
    evaluated_rows = world.broadcast_from_rank0(folder.prepare, path, description, newest_step)
    with world.fail_together():
        tracker = at_exit.enter_context(closing(Tracker(path, world, description, evaluated_rows)))
    saver = at_exit.enter_context(closing(Saver(  # source: for a rollback before the first save
        path, state, tracker, config.saving.keep, newest_step, source, watchdog.heartbeat,
        config.saving.keep_best, description["resolved"]["decay_start"])))
    world.print0(folder.summary(description, T))
    if first_step:
        tracker.log_event(first_step, f"resumed on {world.size} ranks from {source}")
    watch = diagnostics.Diagnostics(state, config.tracker.diagnose_every, first_step)
    return Run(config, world, path, loader, evaluator, state, saver, tracker, signals, spikes,
               StepReports(world, int(late)), watch, run_pace, first_step)


def finish(run: Run, step: int, last_step: bool) -> int:
    """Says how the run ended: the plot, STOPPED after a signal, the next command to try."""
    world = run.world
    if last_step and run.evaluator.problem:  # Failed, after marking the checkpoints DOUBTFUL
        recovery.end(run, step, run.evaluator.problem)
    completed = last_step and step in run.tracker.evaluated_steps
    if not completed:
        record_stop(run, step)
    recovery.report_skipped(run)
    if picture := world.broadcast_from_rank0(plot_losses, run.path):
        world.print0("plot:", picture)
    if not completed:
        return run.signals.exit_code  # 130 after Ctrl-C, 0 after any other signal
    world.print0("next:", run.evaluator.command_to_sample(run.path))
    return 0


if __name__ == "__main__":
    gc.freeze()  # what was imported is never looked through again
    gc.enable()
    # What a full or closed stdout refuses is dropped.
    run_command(lambda: train(CONFIG), output_may_fail=True)
