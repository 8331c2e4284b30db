"""How likely is each of several continuations of a context? The core of every multiple choice.

    requests = [Request(encode("The sky is"), [encode(" blue"), encode(" square")])]
    losses, is_greedy = negative_loglikelihoods(model, requests, world)   # one per continuation

lm-evaluation-harness's words, with one difference: it asks a context and one continuation at a
time, and gets log-likelihoods; a Request here has all continuations of its context, and what comes
back are losses, negative log-likelihoods in nats.

A context is computed once for all its continuations (model/packed.py); requests of like length
share a pass without padding; the head, most of the work of a small model, runs on the positions
alone that predict a continuation's token.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from data.tokenizer import EOT
from kernels.constants import CHUNK_ELEMENTS
from kernels.reference import rows_at_once
from launch.progress import track
from launch.world import World
from model.gpt2 import GPT
from model.packed import PackedRequests

# Tokens in one pass. More gain nothing on a CPU (measured: 2,048 is 5 to 10 % faster than 1,024
# and than 4,096); a GPU wants more, and was not measured.
TOKENS_AT_ONCE_CPU = 2048
TOKENS_AT_ONCE_GPU = 16384


class Request(NamedTuple):
    """A context of at least one token, and continuations of at least one token."""

    context: list[int]
    continuations: list[list[int]]


class _Row(NamedTuple):
    """A request that fits into a model's context, or as much of one as does."""

    request: Request
    first: int  # number of its first continuation among those of all requests

    @property
    def tokens(self) -> int:
        """What the model reads: a continuation's last token only has to be predicted."""
        context, continuations = self.request
        return len(context) + sum(len(tokens) - 1 for tokens in continuations)


class Stopped(Exception):
    """Somebody asked the run to stop while it was being judged."""


def negative_loglikelihoods(
    model: GPT, requests: list[Request], world: World, stop: Callable[[], bool] = lambda: False
) -> tuple[list[float], list[float]]:
    """The loss of every continuation of every request, and whether it is the greedy one.

    Losses are sums over the continuation's tokens, in nats; is_greedy is 1.0 where each token is
    the likeliest in its place, else 0.0. Where context and continuation exceed the model's context,
    as much of their end as fits is read. The same on any number of ranks: the passes don't depend
    on it. `stop` is asked by all ranks after each pass; Stopped is raised where it says so.
    """
    count = sum(len(request.continuations) for request in requests)
    losses, is_greedy = torch.zeros(2, count, dtype=torch.float64)
    cpu = world.device.type == "cpu"
    tokens_at_once = TOKENS_AT_ONCE_CPU if cpu else TOKENS_AT_ONCE_GPU
    passes = list(_passes(requests, model.config.n_ctx, tokens_at_once))
    for start in track(range(0, len(passes), world.size), "scoring", "pass"):
        # Under fsdp a pass needs all ranks, so those that are left without one repeat another.
        own = start + world.rank
        numbers, loss, greedy = _score(model, passes[min(own, len(passes) - 1)], world.device)
        if own < len(passes):
            losses[numbers] = loss
            is_greedy[numbers] = greedy
        if stop():
            raise Stopped
    # Each is 0 on all ranks but one.
    total = world.all_reduce_sum(*losses.tolist(), *is_greedy.tolist())
    return total[:count], total[count:]


def rolling_requests(tokens: list[int], n_ctx: int) -> list[Request]:
    """A text as requests that predict each of its tokens once, the first after an EOT.

    Every window reads n_ctx tokens; the last begins earlier and predicts the rest only, so that no
    token is predicted from a short context but the first ones (lm-eval's loglikelihood_rolling).
    """
    requests = []
    stream = [EOT, *tokens]
    for start in range(1, len(stream), n_ctx):
        end = min(start + n_ctx, len(stream))
        context = stream[max(0, end - n_ctx - 1) : start]
        requests.append(Request(context, [stream[start:end]]))
    return requests


def _passes(requests: list[Request], n_ctx: int, tokens_at_once: int) -> Iterator[list[_Row]]:
    """Rows of like length side by side, about tokens_at_once tokens a pass."""
    rows: list[_Row] = []
    first = 0
    for request in requests:
        rows += _fit(request, first, n_ctx)
        first += len(request.continuations)
    rows.sort(key=lambda row: row.tokens)
    batch: list[_Row] = []
    total = 0
    for row in rows:
        if batch and total + row.tokens > tokens_at_once:
            yield batch
            batch, total = [], 0
        batch.append(row)
        total += row.tokens
    if batch:
        yield batch


def _fit(request: Request, first: int, n_ctx: int) -> list[_Row]:
    """The request as rows of at most n_ctx tokens (attention takes their square): often one.

    Context and continuation are cut at their beginning where both together exceed what a model
    reads.
    """
    rows: list[_Row] = []
    for number, continuation in enumerate(request.continuations, first):
        tokens = (request.context + continuation)[-(n_ctx + 1) :]
        predicted = min(len(continuation), len(tokens) - 1)
        context, continuation = tokens[:-predicted], tokens[-predicted:]
        last = rows[-1] if rows else None
        if last and last.request.context == context and last.tokens + predicted - 1 <= n_ctx:
            last.request.continuations.append(continuation)
        else:
            rows.append(_Row(Request(context, [continuation]), number))
    return rows


@torch.no_grad()
def _score(model: GPT, rows: list[_Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: the numbers of these rows' continuations, their losses, whether they're greedy."""
    read: list[int] = []  # what the model sees
    predicting: list[int] = []  # places in `read` whose logits are wanted
    # For each token of a continuation: the token, the continuation's number, and which of
    # `predicting` predicts it.
    targets: list[int] = []
    number_of: list[int] = []
    predicted_by: list[int] = []
    lengths: list[tuple[int, list[int]]] = []
    for (context, continuations), first in rows:
        read += context
        end_of_context = len(predicting)  # it predicts the first token of each continuation
        predicting.append(len(read) - 1)
        for number, continuation in enumerate(continuations, first):
            rest = len(continuation) - 1  # the last token is predicted and not read
            predicted_by.append(end_of_context)
            predicted_by += range(len(predicting), len(predicting) + rest)
            predicting += range(len(read), len(read) + rest)
            read += continuation[:-1]
            targets += continuation
            number_of += [number] * len(continuation)
        lengths.append((len(context), [len(tokens) - 1 for tokens in continuations]))

    packed = PackedRequests(lengths, device)
    idx = torch.tensor([read], device=device)  # (1, N)
    x = model.hidden(idx, packed.positions, packed.attend)[0]  # (N, C)
    x = x[torch.tensor(predicting, device=device)]  # (rows, C)
    loss, right = _token_losses(
        model, x, torch.tensor(predicted_by, device=device), torch.tensor(targets, device=device)
    )
    # Sums over each continuation's tokens.
    numbers, place = torch.tensor(number_of).unique(return_inverse=True)
    zeros = torch.zeros(len(numbers), dtype=torch.float64)
    losses = zeros.index_add(0, place, loss.cpu().double())
    wrong = zeros.index_add(0, place, (~right).cpu().double())
    return numbers, losses, (wrong == 0).double()


def _token_losses(
    model: GPT, x: Tensor, predicted_by: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of each target, and whether it's the likeliest token: two of shape (n,).

    x: (rows, C); predicted_by, targets: (n,), the row that predicts each target. The logits are
    made in chunks of bounded size, and widened on a CPU by as many rows as its cache holds.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    losses = torch.empty(len(targets), device=x.device, dtype=exact)
    greedy = torch.empty(len(targets), device=x.device, dtype=torch.bool)
    chunk = CHUNK_ELEMENTS // model.config.n_vocab
    for start in range(0, len(x), chunk):
        logits = model.logits(x[start : start + chunk])  # (chunk, V)
        largest, lse = _largest_and_lse(logits, exact)  # each (chunk,)
        in_chunk = (predicted_by >= start) & (predicted_by < start + chunk)
        here = in_chunk.nonzero()[:, 0]  # (m,): targets that these rows predict
        row, target = predicted_by[here] - start, targets[here]
        at_target = logits[row, target].to(exact)
        losses[here] = lse[row] - at_target
        # bf16 logits tie often, and argmax, which decides, is slow: asked where it may say yes.
        likeliest = at_target == largest[row]
        maybe = likeliest.nonzero()[:, 0]
        likeliest[maybe] = logits[row[maybe]].argmax(-1) == target[maybe]
        greedy[here] = likeliest
    return losses, greedy


def _largest_and_lse(logits: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest logit and the log-sum-exp of each row, in `exact`. (rows, V) -> two (rows,)."""
    largest, lse = [], []
    for rows in logits.split(rows_at_once(logits)):
        wide = rows.to(exact)
        top = wide.amax(-1)
        # The largest p is 1 / sum(exp(logit - largest logit)), and at least 1 / V: safe to log.
        p = wide.softmax(-1).amax(-1)
        largest.append(top)
        lse.append(top - p.log())
    return torch.cat(largest), torch.cat(lse)
