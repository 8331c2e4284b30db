"""Any task of EleutherAI's lm-evaluation-harness on any of our checkpoints.

    pip install -c constraints.txt -e '.[eval]'
    python -m eval.harness runs/gpt2-124m --tasks hellaswag,lambada_openai,wikitext
    python -m eval.harness hf:gpt2 --tasks mine --include_path my_tasks/      # own task YAMLs

The harness fetches its tasks' data from the Hub; with a task that reads local files it needs no
network. Its HellaSwag asks another text than eval.hellaswag (see there). The last line is JSON: for
each task its metrics.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from data.tokenizer import EOT, decode, encode
from eval import choice
from eval.likelihood import Request, negative_loglikelihoods, rolling_requests
from launch.errors import BadInput, one_line_errors
from launch.world import Dtype, World, start_world
from model.generate import SampleConfig, generate
from model.gpt2 import GPT

with one_line_errors():
    try:
        import lm_eval
        from lm_eval.api.model import TemplateLM
        from lm_eval.tasks import TaskManager
    except ImportError as missing:
        raise BadInput(f"lm-evaluation-harness is not here ({missing}): "
                       "pip install -c constraints.txt -e '.[eval]'") from None

MAX_NEW_TOKENS = 256  # where a task sets no limit, as in lm-eval's own Hugging Face adapter


class Adapter(TemplateLM):
    """A GPT as the harness wants a language model: texts in, likelihoods and texts out."""

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
        ours: list[Request] = []  # one for each context, with all its continuations
        theirs: list[list[int]] = []  # the numbers, among `requests`, of each one's continuations
        of_context: dict[tuple[int, ...], int] = {}
        for i, (_texts, context, continuation) in enumerate(requests):
            number = of_context.setdefault(tuple(context), len(ours))
            if number == len(ours):
                ours.append(Request(context, []))
                theirs.append([])
            ours[number].continuations.append(continuation)
            theirs[number].append(i)
        losses, is_greedy = negative_loglikelihoods(self.model, ours, self.world)
        answers = [(0.0, False)] * len(requests)
        order = [i for numbers in theirs for i in numbers]
        for i, loss, greedy in zip(order, losses, is_greedy, strict=True):
            answers[i] = (-loss, bool(greedy))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """The log-likelihood of whole texts, each token predicted once."""
        n_ctx = self.model.config.n_ctx
        texts = [rolling_requests(encode(request.args[0]), n_ctx) for request in requests]
        every = [window for windows in texts for window in windows]
        losses, _is_greedy = negative_loglikelihoods(self.model, every, self.world)
        rest = iter(losses)
        return [-sum(next(rest) for _ in windows) for windows in texts]

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """Continuations up to the first of the texts that the task stops at."""
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        n_ctx = self.model.config.n_ctx
        most = min(int(settings.get("max_gen_toks", MAX_NEW_TOKENS)), n_ctx - 1)
        sampled = settings.get("do_sample", settings.get("temperature", 0) > 0)
        config = SampleConfig(
            max_tokens=most,
            temperature=settings.get("temperature", 1.0) if sampled else 0.0,
            top_k=settings.get("top_k", 0),
            top_p=settings.get("top_p", 1.0),
        )
        tokens = (encode(context) or [EOT])[-(n_ctx - most) :]
        drawn: list[int] = []
        text = ""
        idx = torch.tensor([tokens], device=self.world.device)
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
    """The harness's metrics of each task that the manager knows."""
    for name in tasks:
        if name not in manager.all_tasks:
            raise BadInput(f"lm-evaluation-harness has no task {name!r}; `lm-eval ls tasks` lists "
                           "them, --include_path adds a folder of your own")
    found = lm_eval.simple_evaluate(
        model=Adapter(model, world), tasks=tasks, task_manager=manager, limit=limit or None,
        bootstrap_iters=0, log_samples=False,
    )
    return found["results"]


def main(
    checkpoint: Annotated[str, tyro.conf.Positional],
    tasks: str,
    limit: int = 0,
    dtype: Dtype = "auto",
    include_path: Path | None = None,
) -> None:
    """Judges a checkpoint by tasks of lm-evaluation-harness.

    Args:
        checkpoint: A checkpoint folder, a run folder, or hf:DIR.
        tasks: Names, with commas between them.
        limit: Only the first examples of each task; 0 for all.
        dtype: Number format of the matrix products.
        include_path: A folder with task YAMLs of your own.
    """
    if limit < 0:
        raise BadInput(f"--limit {limit}: expected 0 (all) or more")
    world = start_world()
    if world.size > 1:
        raise BadInput("the harness asks one process: start it without torchrun")
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with choice.open_model(checkpoint, dtype, world) as model:
        results = evaluate(model, names, world, manager, limit)
    for task, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                world.print(f"{task:24} {metric:24} {value:.4f}")
    world.print(json.dumps(results, default=str))


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main)
