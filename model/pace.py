"""--minutes N: as many steps as fit into so much time, known from the speed of the first ones.

    python train_gpt2.py demo --minutes 5

Such a run begins as every other: step 0 is evaluated and saved. Then it times its first steps, and
with them what an evaluation and a save take; rank 0 plans the number of steps that ends in time,
and all ranks go back to step 0. So it is, bit for bit, the run that --steps with this number would
have been (with the same kernels), under any schedule, and the warm-up has the preset's share of it.
config.json and the checkpoints hold the number. A run that goes on keeps it, however fast the
machine is then, and one that was stopped before it was planned begins anew.

The minutes count from where the run opens its data to its last line; what Python takes to start is
not among them. Steps that grow slower later on, another job beside it, end later than was planned.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from launch import cli, folder
from launch.errors import BadInput
from launch.world import World
from model.checkpoint import list_checkpoints, read_config
from model.optim import decay_start

MOST, FEWEST = 20, 5  # steps that are timed
SHARE = 0.05  # of the minutes, after which no more are timed than the fewest
WARM = 2  # steps that count only where there are no others: the first ones compile and allocate
LAST_LINES = 3.0  # seconds for the picture at the end, 1.2 of CPU time, and for leaving


def known_steps(config: Any, run: Path, world: World) -> tuple[Any, float]:
    """(the configuration with the steps that its run was planned with, for how many minutes).

    As it was given, with 0 minutes, for a run that was never planned; --minutes then is left in it
    where it has yet to be. Raises BadInput where the folder holds another run than --minutes asks
    for. All ranks call it.
    """
    steps, warmup, minutes = world.broadcast_from_rank0(_read_plan, config.minutes, run)
    if config.minutes and not minutes:
        world.print0(f"--minutes {config.minutes:g}: up to {MOST} steps are timed first")
    if not config.minutes or not minutes:
        return config, minutes
    optim = replace(config.optim, warmup_steps=warmup)
    return replace(config, steps=steps, optim=optim, minutes=0.0), minutes


def _read_plan(asked: float, run: Path) -> tuple[int, int, float]:
    """Steps, warm-up and minutes of the run in a folder; 0 minutes where it has no plan yet."""
    for checkpoint in list_checkpoints(run / "checkpoints"):
        try:
            saved = read_config(checkpoint)
            config, minutes = saved["config"], saved.get("resolved", {}).get("minutes", 0.0)
            steps, warmup = config["steps"], config["optim"]["warmup_steps"]
        except (BadInput, KeyError, TypeError):  # a damaged one
            continue
        if asked and asked != minutes and not config.get("minutes"):
            what = f"of {minutes:g} minutes" if minutes else f"of {steps:,} steps"
            raise BadInput(f"{run} holds a run {what}, and --minutes {asked:g} is asked: choose "
                           f"another --name; without --minutes that run goes on")
        return steps, warmup, minutes
    return 0, 0, 0.0


class Pace:
    """The clock of one rank: times the first steps of a run, and plans the others.

    timing: whether the run's steps are being timed; then nothing is saved but step 0.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.minutes, self.clock = minutes, clock
        self.timing = minutes > 0
        self.started = self.looked_at = clock()
        self.steps: list[float] = []  # seconds of each, without evaluations
        self.saving = 0.0  # seconds that the first save took

    def is_known(self, step: int, run: Any) -> bool:
        """Whether enough steps were timed: asked before each step, of all ranks."""
        if not self.timing:
            return False
        now = self.clock()
        if step == 1 and not self.steps:  # since the last look: an evaluation, a save, a step
            before = run.tracker.last_seconds + run.tracker.evaluation_seconds
            self.saving = max(0.0, now - self.looked_at - before)
        if step > len(self.steps):  # one that was broken off comes again
            self.steps.append(run.tracker.last_seconds)
        self.looked_at = now
        return run.world.broadcast_from_rank0(self._enough, step == run.config.steps)

    def _enough(self, last_step: bool) -> bool:
        spent = sum(self.steps)
        late = len(self.steps) >= FEWEST and spent > 60 * SHARE * self.minutes
        return len(self.steps) >= MOST or late or last_step

    def plan(self, run: Any) -> Any:
        """Goes back to step 0 with the steps that there is time for; returns the configuration.

        run: train_gpt2.py's Run. All ranks call it together.
        """
        step = len(self.steps)
        # That of step 0 was without HellaSwag, and not done again by a run that was stopped.
        if run.evaluator.questions or not run.tracker.evaluation_seconds:
            run.evaluator.evaluate(run.state.model, step, run.tracker)
        steps = run.world.broadcast_from_rank0(self._steps_left, run)
        share = run.config.optim.warmup_steps / run.config.steps
        optim = replace(run.config.optim, warmup_steps=round(share * steps))
        start = decay_start(steps, optim)
        run.world.broadcast_from_rank0(
            folder.change_steps, run.path, steps, optim.warmup_steps,
            dict(minutes=self.minutes, epochs=run.loader.epoch(steps), decay_start=start))

        saved = run.saver.load_newest()  # of step 0: nothing was saved since
        run.loader.load_skipped_batches(saved["skipped"])
        run.spikes.load_state_dict(saved)
        run.watch.go_back(0)
        run.tracker.drop_after(0)
        run.config = replace(run.config, steps=steps, optim=optim, minutes=0.0)
        run.tracker.steps, run.saver.full_rate, self.timing = steps, start, False
        run.save(0, wait=True)  # with the new config.json
        run.tracker.log_event(0, f"--minutes {self.minutes:g}: {steps:,} steps of "
                              f"{1e3 * self._step_seconds():,.0f} ms are planned, "
                              f"{optim.warmup_steps:,} of them warm-up; back to step 0")
        return run.config

    def _step_seconds(self) -> float:
        return median(self.steps[WARM:] or self.steps)

    def _steps_left(self, run: Any) -> int:
        """How many steps end in time. Raises BadInput where not one does."""
        passed = self.clock() - self.started
        going_back = 2 * self.saving  # a checkpoint is read, and written anew
        end = self.saving + LAST_LINES
        evaluation = run.tracker.evaluation_seconds
        left = 60 * self.minutes - passed - going_back - end
        steps = steps_within(left, self._step_seconds(), evaluation, run.tracker.eval_every)
        if steps < 1:
            needed = passed + going_back + end + evaluation + self._step_seconds()
            raise BadInput(f"--minutes {self.minutes:g} leaves no time to train: until here "
                           f"{passed:.0f} s have passed, and an evaluation takes {evaluation:.0f}; "
                           f"at least --minutes {needed / 60 + 0.1:.1f}")
        return min(steps, cli.MOST_STEPS)


def steps_within(seconds: float, step: float, evaluation: float, every: int) -> int:
    """The most steps that fit: each takes `step` seconds, and each `evaluation` after every `every`
    of them and after the last `evaluation` more. 0 or less: not one does."""
    periods, rest = divmod(seconds, every * step + evaluation)
    # What is left of a period has its evaluation too.
    return int(periods) * every + max(0, int((rest - evaluation) / step))
