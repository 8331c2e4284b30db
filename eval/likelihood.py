"""How likely is each of several endings after a context? The core of every multiple choice.

    forks = [Fork(encode("The sky is"), [encode(" blue"), encode(" square")])]
    losses, greedy = likelihoods(model, forks, world)     # two of each: one per ending

The endings of a context are branches of one tree (model/packed.py), so that the context is computed
once; trees of like length share a pass without padding; the head, most of the work of a small
model, runs on the positions alone that predict an ending's token.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from data.tokenizer import EOT
from kernels.constants import CACHED_ROWS, CHUNK_ELEMENTS
from launch.world import World
from model.gpt2 import GPT
from model.packed import Packed

# Tokens in one pass. More gain nothing on a CPU (measured: 2,048 is 5 to 10 % faster than 1,024
# and than 4,096); a GPU wants more, and was not measured.
TOKENS_AT_ONCE_CPU = 2048
TOKENS_AT_ONCE_GPU = 16384


class Fork(NamedTuple):
    """A context of at least one token, and endings of at least one token that may follow it."""

    context: list[int]
    endings: list[list[int]]


class _Tree(NamedTuple):
    """What a pass computes at once of a fork; `first` numbers its first ending among all."""

    fork: Fork
    first: int

    @property
    def tokens(self) -> int:
        """What the model reads: an ending's last token only has to be predicted."""
        return len(self.fork.context) + sum(len(ending) - 1 for ending in self.fork.endings)


class Stopped(Exception):
    """Somebody asked the run to stop while it was being judged."""


def likelihoods(
    model: GPT, forks: list[Fork], world: World, stop: Callable[[], bool] = lambda: False
) -> tuple[list[float], list[float]]:
    """The loss of every ending of every fork, and whether it is the greedy continuation.

    Losses are sums over the ending's tokens, in nats; greedy is 1.0 where each token is the
    likeliest in its place, else 0.0. Where context and ending exceed the model's context, as much
    of their end as fits is read. The same on any number of ranks: the passes don't depend on it.
    `stop` is asked by all ranks after each pass; Stopped is raised where it says so.
    """
    count = sum(len(fork.endings) for fork in forks)
    losses, greedy = torch.zeros(2, count, dtype=torch.float64)
    cpu = world.device.type == "cpu"
    passes = list(_passes(forks, model.config.n_ctx,
                          TOKENS_AT_ONCE_CPU if cpu else TOKENS_AT_ONCE_GPU))
    for start in range(0, len(passes), world.size):
        # Under fsdp a pass needs all ranks, so those that are left without one repeat another.
        mine = start + world.rank
        indices, loss, right = _score(model, passes[min(mine, len(passes) - 1)], world.device)
        if mine < len(passes):
            losses[indices], greedy[indices] = loss, right
        if stop():
            raise Stopped
    total = world.sum(*losses.tolist(), *greedy.tolist())  # each is 0 on all ranks but one
    return total[:count], total[count:]


def windows(tokens: list[int], n_ctx: int) -> list[Fork]:
    """A text as forks that predict each of its tokens once, the first after an EOT.

    Every window reads n_ctx tokens; the last begins earlier and predicts the rest only, so that no
    token is predicted from a short context but the first ones (lm-eval's rolling likelihood).
    """
    forks = []
    stream = [EOT, *tokens]
    for start in range(1, len(stream), n_ctx):
        end = min(start + n_ctx, len(stream))
        context = stream[max(0, end - n_ctx - 1) : start]
        forks.append(Fork(context, [stream[start:end]]))
    return forks


def _passes(forks: list[Fork], n_ctx: int, tokens_at_once: int) -> Iterator[list[_Tree]]:
    """Trees of like length side by side, about tokens_at_once tokens a pass."""
    trees, first = [], 0
    for fork in forks:
        trees += _fit(fork, first, n_ctx)
        first += len(fork.endings)
    trees.sort(key=lambda tree: tree.tokens)
    batch: list[_Tree] = []
    total = 0
    for tree in trees:
        if batch and total + tree.tokens > tokens_at_once:
            yield batch
            batch, total = [], 0
        batch.append(tree)
        total += tree.tokens
    if batch:
        yield batch


def _fit(fork: Fork, first: int, n_ctx: int) -> list[_Tree]:
    """The fork as trees of at most n_ctx tokens (attention takes their square): often one.

    Context and ending are cut at their beginning where both together exceed what a model reads.
    """
    trees: list[_Tree] = []
    for number, ending in enumerate(fork.endings, first):
        tokens = (fork.context + ending)[-(n_ctx + 1) :]
        predicted = min(len(ending), len(tokens) - 1)
        context, ending = tokens[:-predicted], tokens[-predicted:]
        last = trees[-1] if trees else None
        if last and last.fork.context == context and last.tokens + predicted - 1 <= n_ctx:
            last.fork.endings.append(ending)
        else:
            trees.append(_Tree(Fork(context, [ending]), number))
    return trees


@torch.no_grad()
def _score(
    model: GPT, trees: list[_Tree], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: the numbers of these trees' endings, their losses and whether they're greedy."""
    read: list[int] = []  # what the model sees
    rows: list[int] = []  # places in `read` whose logits are wanted
    row_of: list[int] = []  # for each token of an ending: the row that predicts it
    targets: list[int] = []
    ending_of: list[int] = []
    for (context, endings), first in trees:
        read += context
        stem = len(rows)  # the context's last token predicts the first of each ending
        rows.append(len(read) - 1)
        for number, ending in enumerate(endings, first):
            row_of += [stem, *range(len(rows), len(rows) + len(ending) - 1)]
            rows += range(len(read), len(read) + len(ending) - 1)
            read += ending[:-1]
            targets += ending
            ending_of += [number] * len(ending)
    shape = [(len(fork.context), [len(e) - 1 for e in fork.endings]) for fork, _ in trees]
    x = model.hidden(torch.tensor([read], device=device), Packed(shape, device))[0]  # (N, C)
    x = x[torch.tensor(rows, device=device)]  # (rows, C)
    loss, right = _token_losses(
        model, x, torch.tensor(row_of, device=device), torch.tensor(targets, device=device)
    )
    numbers, ending = torch.tensor(ending_of).unique(return_inverse=True)
    empty = torch.zeros(len(numbers), dtype=torch.float64)
    wrong = empty.index_add(0, ending, (~right).cpu().double())
    return numbers, empty.index_add(0, ending, loss.cpu().double()), (wrong == 0).double()


def _token_losses(
    model: GPT, x: Tensor, row_of: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of each target, and whether it's the likeliest token: two of shape (n,).

    x: (rows, C); row_of, targets: (n,), the row that predicts each target. The logits are made in
    chunks of bounded size, and widened on a CPU by as many rows as its cache holds.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    losses = torch.empty(len(targets), device=x.device, dtype=exact)
    greedy = torch.empty(len(targets), device=x.device, dtype=torch.bool)
    chunk = CHUNK_ELEMENTS // model.config.n_vocab
    for start in range(0, len(x), chunk):
        logits = model.logits(x[start : start + chunk])  # (chunk, V)
        top, lse = [], []
        for part in logits.split(CACHED_ROWS if x.device.type == "cpu" else len(logits)):
            wide = part.to(exact)
            top.append(wide.amax(-1))
            # The largest p is 1 / sum(exp(logit - largest logit)), and at least 1 / V: safe to log.
            lse.append(top[-1] - wide.softmax(-1).amax(-1).log())
        here = ((row_of >= start) & (row_of < start + chunk)).nonzero()[:, 0]
        row, target = row_of[here] - start, targets[here]
        at_target = logits[row, target].to(exact)
        losses[here] = torch.cat(lse)[row] - at_target
        # bf16 logits tie often, and argmax, which decides, is slow: asked where it may say yes.
        likeliest = at_target == torch.cat(top)[row]
        maybe = likeliest.nonzero()[:, 0]
        likeliest[maybe] = logits[row[maybe]].argmax(-1) == target[maybe]
        greedy[here] = likeliest
    return losses, greedy
