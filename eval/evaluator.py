"""What a run is evaluated on while it trains: validation loss, HellaSwag, a sample of its text."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data.chat import question_text
from data.dataset import Data
from data.loader import describe_validation, validation_sequences
from data.tokenizer import GPT2, Tokenizer
from eval import hellaswag
from eval.config import EvalConfig
from eval.likelihood import Stopped
from eval.loss import validation_loss
from eval.sample import crop_note, prompt_tokens
from eval.wrap import indented
from launch import cli
from launch.errors import BadInput, Failed
from launch.progress import track
from launch.tracker import Tracker
from launch.world import World
from model.generate import SampleConfig, generate
from model.gpt2 import GPT
from model.network import without_compiling
from model.parallel import ParallelModel


class Evaluator:
    """Evaluates a run's model, on all ranks, on the same things each time.

    val_set names the data set and the number of tokens that the validation loss is the loss of.
    """

    def __init__(
        self, config: EvalConfig, data: Data, T: int, micro_batch: int, world: World,
        stop: Callable[[], bool],
    ) -> None:
        """Fetches HellaSwag's questions if there is a GPU, or unless --hellaswag says otherwise.

        stop: called by all ranks together, between batches and tokens; ends an evaluation. Raises
        BadInput where the validation set or the file of questions is unusable.
        """
        self.stop = stop
        self.world, self.micro_batch, self.prompt = world, micro_batch, config.prompt
        self.how = cli.quoted_flag("prompt", config.prompt)  # --prompt '...', for a shell
        if data.chat:
            self.prompt, self.how = question_text(config.prompt), "--chat"
        self.early_stop = config.early_stop
        self.val_stream, self.tokenizer = data.val, data.tokenizer
        with world.fail_together():
            self.val_sequences = validation_sequences(data.val, T, config.val_tokens)
            prompt = self.tokenizer.encode(self.prompt)
        self.val_set = describe_validation(data, T, self.val_sequences)
        self.questions = read_questions(config.hellaswag, world, self.tokenizer)
        self.problem = ""  # why the latest evaluation gave no numbers
        note = crop_note(len(prompt), T)
        if note:
            world.print0(f"note: {note}")

    def evaluate(self, model: ParallelModel, step: int, tracker: Tracker) -> bool:
        """Evaluates a run's model, if this step isn't on record yet; prints and logs the results.

        False where `stop` said so. Weights that give no numbers are an event, and True.
        """
        if step in tracker.evaluated_steps:  # before this process began
            return True
        self.problem = ""
        started = time.perf_counter()
        try:
            with model.summon_full_params(), model.autocast():
                row = self.results(model.module, with_hellaswag=step > 0)
        except Failed as error:  # broken weights, before the spike detector has come to its verdict
            self.problem = f"no evaluation of step {step}: {error}"
            tracker.log_event(step, self.problem)
            tracker.evaluated_steps.add(step)
            return True
        if row is None:
            return False
        tracker.log(step, **row)
        tracker.evaluation_seconds = time.perf_counter() - started
        return True

    def command_to_sample(self, run: Path) -> str:
        """What reads the run's model aloud, to be pasted into a shell."""
        return f"python -m eval.sample {cli.quoted(run)} {self.how}"

    def stops_early(self, step: int, tracker: Tracker) -> bool:
        """Whether this step's evaluation is the last that --early_stop waits for; says so if it is.

        It follows from the record alone: on resume the answer is the same, on every rank.
        """
        best = tracker.best_step()
        if not self.early_stop or best is None or step not in tracker.val_losses:
            return False
        without_improvement = sum(evaluated > best for evaluated in tracker.val_losses)
        if without_improvement < self.early_stop:
            return False
        tracker.log_event(step, f"stopped early at step {step}: {without_improvement} evaluations "
                          f"without a lower validation loss than {tracker.val_losses[best]:.4f} of "
                          f"step {best} (a larger --early_stop goes on)")
        return True

    def results(self, model: GPT, with_hellaswag: bool) -> dict[str, Any] | None:
        """The row for metrics.jsonl, printed too; None where `stop` said so."""
        loss = validation_loss(model, self.val_stream, self.val_sequences, self.micro_batch,
                               self.world, self.stop)
        if loss is None:
            return None
        self.world.print0(f"val loss {loss:.4f} ({self.val_set})")
        row: dict[str, Any] = {"val_loss": loss, "val_set": self.val_set}
        with without_compiling(model):  # every sentence has another length
            if with_hellaswag and self.questions:
                try:
                    score = hellaswag.evaluate(model, self.questions, self.world, self.stop)
                except Stopped:
                    return None
                row["hellaswag_acc"] = score.acc
                row["hellaswag_acc_norm"] = score.acc_norm
                self.world.print0(f"HellaSwag acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f}, "
                                  f"{score.n} questions")
            text = sample_text(model, self.tokenizer, self.prompt, self.world, self.stop)
        if text is None:
            return None
        row["sample"] = self.prompt + text
        self.world.print0(f"sample:\n{indented(row['sample'])}")
        return row


def read_questions(
    source: str, world: World, tokenizer: Tokenizer = GPT2
) -> list[hellaswag.Question]:
    """HellaSwag's questions; or none, and unless that was asked for a line that says why. Raises
    BadInput where they are asked of a model that reads characters."""
    if source == "off":
        return []
    if tokenizer.characters:
        if source != "auto":
            raise BadInput(f"--hellaswag {source}: its questions are asked in GPT-2's tokens, and "
                           "--data.vocab char trains a model that reads characters")
        return []
    if source == "auto" and world.device.type != "cuda":
        world.print0("no HellaSwag in this run: minutes on a CPU; --hellaswag FILE asks for it")
        return []
    if source != "auto":
        return world.broadcast_from_rank0(hellaswag.read_questions, Path(source))
    try:
        path = world.broadcast_from_rank0(hellaswag.fetch)
        return world.broadcast_from_rank0(hellaswag.read_questions, path)
    except Failed as error:
        world.print0(f"no HellaSwag in this run: {error}")
        return []


def sample_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, world: World, stop: Callable[[], bool]
) -> str | None:
    """A continuation of the prompt; None where `stop` said so.

    Every rank calls `stop` equally often, even where rounding let one draw an early end of text.
    """
    tokens_before = prompt_tokens(prompt, model.config.n_ctx, tokenizer)
    idx = torch.tensor([tokens_before], device=world.device)  # (1, T)
    config = SampleConfig()
    drawn: list[int] = []
    stream = generate(model, idx, config, tokenizer.eot)
    for _ in track(range(config.max_tokens), "sample", "token"):
        tokens = next(stream, None)  # (1,)
        if tokens is not None:
            drawn.append(int(tokens))
        if stop():
            return None
    if tokenizer.eot in drawn:
        drawn = drawn[: drawn.index(tokenizer.eot)]
    return tokenizer.decode(drawn)
