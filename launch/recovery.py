"""What follows data that can't be read, and a step that would do harm: as --on_spike says, skip it,
roll back, or end the run.

`run` is train_gpt2.py's Run: this room knows no model and no data, and asks the run's saver,
loader, tracker and spike detector to do it. All ranks come here together, with one verdict.
"""

from typing import Any, NoReturn

from launch import console
from launch.errors import Failed


def get_batch(run: Any, step: int) -> tuple[Any, Any, float]:
    """(this rank's tokens of a step, (micro-steps, B, T + 1), and their orders, (micro-steps, B T),
    on its device; the targets that a rank has on the average). Where its data can't be read it is
    other tokens: the other ranks need this one for the step, which none of them applies, and then
    stop_for_data() ends the run."""
    batch, targets, error = run.loader.try_get_batch(step)
    run.reports.data_error = run.reports.data_error or error
    orders = run.loader.token_orders(batch)
    on_device = [x.to(run.world.device, non_blocking=True) for x in (batch, orders)]
    return *on_device, targets / run.world.size


def stop_for_data(run: Any, step: int) -> NoReturn:
    """Saves, and raises what a rank's data have, on all ranks."""
    run.save(step, wait=True)
    run.world.raise_on_all_ranks(run.reports.data_error)  # of the first that has one
    raise AssertionError("no rank's data are at fault")


def after_bad_step(run: Any, step: int, problem: str, loss: float, norm: float) -> int:
    """The step to go on with. Raises Failed where policy or too many bad steps end the run."""
    reason = run.spikes.reason_to_end(step + 1, problem, loss, norm)
    if reason and run.spikes.streak == 1:  # one bad step tells nothing of the weights before it
        raise Failed(reason)
    if reason:
        end(run, step + 1, reason)
    line = f"step {step + 1}: {problem}"
    if run.spikes.policy == "rollback":
        return roll_back(run, step, line)
    run.tracker.log_event(step + 1, f"skipped {line}", train_loss=loss, grad_norm=norm)
    return step + 1


def report_skipped(run: Any) -> None:
    """Says at the end how many steps were left out, which the losses alone don't show."""
    skipped = run.spikes.total
    if skipped and run.spikes.policy == "skip":
        run.world.print0(console.warning(
            f"{skipped:,} of {run.config.steps:,} steps were skipped, their gradients exploded or "
            "were no numbers: a lower --optim.lr, or a longer --optim.warmup_steps, avoids that"))


def end(run: Any, step: int, reason: str) -> NoReturn:
    """Ends the run after `step`. What was saved since the last good step is doubtful."""
    run.saver.doubt_since(step - run.spikes.streak, reason)
    raise Failed(reason)


def roll_back(run: Any, step: int, line: str) -> int:
    """Returns to the newest checkpoint, and leaves out the batches from there to this step."""
    saved = run.saver.load_newest()  # its state.json
    first = saved["step"]
    run.loader.skip_batches(first, step + 1)
    run.spikes.rewind(saved)
    run.tracker.drop_after(first)
    event = f"rolled back to step {first} and left out the batches up to {line}"
    run.tracker.log_event(first, event)
    run.save(first, wait=True)  # with the skipped batches, for a run that is killed now
    return first
