"""Any task of EleutherAI's lm-evaluation-harness on any of our checkpoints.

    pip install -c constraints.txt -e '.[eval]'
    python -m eval.harness runs/gpt2-124m --tasks hellaswag,lambada_openai,wikitext
    python -m eval.harness hf:gpt2 --tasks my_task --include_path my_tasks/    # YAMLs of one's own

The harness fetches its tasks' data from the Hub and keeps them in HF_HOME, ~/.cache/huggingface if
not set: a copy of that folder from a machine with a network serves one without, and a task that
reads local files needs neither. Its HellaSwag asks another text than eval.hellaswag (see there).
The last line is JSON: for each task its metrics, null where one is no number.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from data.tokenizer import EOT, decode, encode
from eval import choice
from eval.likelihood import Request, negative_loglikelihoods, rolling_requests
from eval.loss import require_numbers
from launch import flags
from launch.config import ReadDtype
from launch.errors import BadInput, Failed, one_line_errors, run_command
from launch.world import World, init_distributed
from model.generate import SampleConfig, generate
from model.gpt2 import GPT

with one_line_errors():
    try:
        import lm_eval
        from huggingface_hub.errors import LocalEntryNotFoundError
        from huggingface_hub.utils.logging import set_verbosity_error
        from lm_eval.api.model import TemplateLM
        from lm_eval.tasks import TaskManager
    except ImportError as missing:
        raise BadInput(f"lm-evaluation-harness is not here ({missing}): "
                       "pip install -c constraints.txt -e '.[eval]'") from None

MAX_NEW_TOKENS = 256  # where a task sets no limit, as in lm-eval's own Hugging Face adapter


class Adapter(TemplateLM):
    """A GPT as the harness wants a language model: texts in, losses and texts out."""

    def __init__(self, model: GPT, world: World) -> None:
        super().__init__()
        self.model, self.world = model, world

    @property
    def eot_token_id(self) -> int:
        """The token that an empty context is replaced by."""
        return EOT

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; GPT-2 adds no special ones."""
        return encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is it greedy?) of each request: texts, context, continuation."""
        grouped: list[Request] = []  # one for each context, with all its continuations
        places: list[list[int]] = []  # of each one's continuations among the requests
        group_of: dict[tuple[int, ...], int] = {}  # context -> its place in `grouped`
        for i, (_texts, context, continuation) in enumerate(requests):
            key = tuple(context)
            if key not in group_of:
                group_of[key] = len(grouped)
                grouped.append(Request(context, []))
                places.append([])
            grouped[group_of[key]].continuations.append(continuation)
            places[group_of[key]].append(i)
        losses, greedy = negative_loglikelihoods(self.model, grouped, self.world)
        require_numbers(losses)
        answers = [(0.0, False)] * len(requests)
        order = [i for place in places for i in place]
        for i, loss, is_greedy in zip(order, losses, greedy, strict=True):
            answers[i] = (-loss, bool(is_greedy))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """The log-likelihood of whole texts, each token predicted once."""
        n_ctx = self.model.config.n_ctx
        texts = [rolling_requests(encode(request.args[0]), n_ctx) for request in requests]
        pieces = [piece for text in texts for piece in text]
        losses, _greedy = negative_loglikelihoods(self.model, pieces, self.world)
        require_numbers(losses)
        sums, start = [], 0
        for text in texts:
            sums.append(-sum(losses[start : start + len(text)]))
            start += len(text)
        return sums

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """Continuations up to the first of the texts that the task stops at."""
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        if isinstance(until, str):
            until = [until]
        stops = [stop for stop in until if stop]
        n_ctx = self.model.config.n_ctx
        max_tokens = min(int(settings.get("max_gen_toks", MAX_NEW_TOKENS)), n_ctx - 1)
        temperature = settings.get("temperature", 0.0)
        if not settings.get("do_sample", temperature > 0):
            temperature = 0.0  # greedy
        elif "temperature" not in settings:
            temperature = 1.0
        config = SampleConfig(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=settings.get("top_k", 0),
            top_p=settings.get("top_p", 1.0),
        )
        tokens = (encode(context) or [EOT])[-(n_ctx - max_tokens) :]
        drawn: list[int] = []
        text = ""
        idx = torch.tensor([tokens], device=self.world.device)  # (1, T)
        for step in generate(self.model, idx, config, eot=EOT):
            if int(step) == EOT:
                break
            drawn.append(int(step))
            text = decode(drawn)
            if any(stop in text for stop in stops):
                break
        ends = [text.index(stop) for stop in stops if stop in text]
        return text[: min(ends)] if ends else text


def evaluate(
    model: GPT, tasks: list[str], world: World, manager: TaskManager, limit: int = 0
) -> dict[str, dict[str, Any]]:
    """The harness's metrics of each task that the manager knows.

    Raises BadInput for another one, Failed where its data can't be fetched.
    """
    for name in tasks:
        if name not in manager.all_tasks:
            raise BadInput(f"lm-evaluation-harness has no task {name!r}; `lm-eval ls tasks` lists "
                           "them, --include_path adds a folder of your own")
    try:
        found = lm_eval.simple_evaluate(
            model=Adapter(model, world), tasks=tasks, task_manager=manager, limit=limit or None,
            bootstrap_iters=0, log_samples=False,
        )
    except (ConnectionError, LocalEntryNotFoundError) as error:
        raise Failed(
            f"the data of {', '.join(tasks)} can't be fetched: {error}. Offline: give the same "
            "command where there is a network, and copy its folder ~/.cache/huggingface here "
            "(HF_HOME names another place); or judge by a local file: python -m eval.tasks --help"
        ) from None
    return found["results"]


def main(
    checkpoint: Annotated[str, tyro.conf.Positional],
    tasks: str,
    limit: int = 0,
    dtype: ReadDtype = "auto",
    include_path: Path | None = None,
) -> None:
    """Judges a checkpoint by tasks of lm-evaluation-harness.

    Args:
        checkpoint: A checkpoint folder, a run folder, or hf:DIR.
        tasks: Names, with commas between them.
        limit: Only the first examples of each task; 0 for all.
        dtype: Number format of the matrix products; int8: of the matrices, on a CPU.
        include_path: A folder with task YAMLs of your own.
    """
    if limit < 0:
        raise BadInput(f"--limit {limit}: expected 0 (all) or more")
    world = init_distributed()
    if world.size > 1:
        raise BadInput("the harness asks one process: start it without torchrun")
    set_verbosity_error()  # without a network it would tell of each of its attempts
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with choice.open_model(checkpoint, dtype, world) as model:
        results = evaluate(model, names, world, manager, limit)
    for task, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                world.print0(f"{task:24} {metric:24} {value:.4f}")
    world.print0(json.dumps(_without_nan(results), default=str, allow_nan=False))


def _without_nan(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON doesn't have."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


if __name__ == "__main__":
    run_command(lambda: flags.parse(main))
