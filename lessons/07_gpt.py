"""Lesson 7: a character GPT, rung by rung from bigram to GPT-2's block.

    python lessons/07_gpt.py

Needs tinyshakespeare (1.1 MB, fetched once); draws runs/lessons/07/ladder.png. Same as lesson 6:
characters in, a distribution over the next one out. Different: positions talk to each other by
attention, whose weights depend on what is said; a text in place of names. Figures: 2.49, 2.41,
2.28, 2.24, 2.08, 2.06 nats on the whole validation split, each +-0.03, and 2.06 again with GPT-2's
own choices; 0.99 and 0.92 of the sums never seen. Two to three minutes on one core.
"""

# %% Characters
# The text as numbers: its characters in order are the vocabulary, the last tenth is held out.
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, "..")  # for a notebook, which runs in its own folder
sys.path.insert(0, ".")  # for a program, which runs in the repository's root
from lessons import course, drawings
from lessons.solutions import e07
from model.gpt2 import GPT, GPTConfig

torch.set_num_threads(1)  # products this small lose by being shared out
text = course.shakespeare()
symbols = sorted(set(text))
ids = torch.tensor([symbols.index(s) for s in text])
train_ids, val_ids = ids.tensor_split([int(0.9 * len(ids))])
V, C, T, H = len(symbols), 32, 8, 4  # vocabulary, width, context, heads
curves = {}  # of each rung: steps and estimates of its validation loss

# %% One loop
# Batches, weights and evaluations share one stream of random numbers, drawn in the lecture's order.
# Its printed losses are means of 200 random batches and scatter by 0.01; the judged figure is the
# mean over the whole held-out text, cut into rows.
def batch(data: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Random rows of T characters and, one further on, what follows each: both (rows, T)."""
    starts = torch.randint(len(data) - T, (rows,))
    at = starts[:, None] + torch.arange(T + 1)  # (rows, T + 1)
    return data[at[:, :-1]], data[at[:, 1:]]


def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x).view(-1, V), y.reshape(-1))  # (B, T, V) -> (B T, V)


def train(rung: str, model: nn.Module, steps: int = 5000, lr: float = 1e-3) -> float:
    """Trains; returns the loss on the whole validation split, in nats."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, fused=True)
    curves[rung] = []
    for step in range(steps):
        if step % (steps // 10) == 0 or step == steps - 1:
            batch(train_ids, 200 * 32)  # the lecture's estimate on train, here for the stream only
            with torch.no_grad():
                estimate = mean_loss(model, *batch(val_ids, 200 * 32))
            curves[rung].append((step, estimate.item()))
        loss = mean_loss(model, *batch(train_ids, 32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = (len(val_ids) - 1) // T
    x, y = val_ids[: rows * T].view(rows, T), val_ids[1 : rows * T + 1].view(rows, T)
    with torch.no_grad():
        return mean_loss(model, x, y).item()


@torch.no_grad()
def sample(model: nn.Module, length: int = 200) -> str:
    seen = torch.zeros(1, 1, dtype=torch.long)  # (1, t), begun by a newline
    for _ in range(length):
        p = model(seen[:, -T:])[:, -1].softmax(-1)  # (1, V)
        seen = torch.cat([seen, torch.multinomial(p, 1)], 1)
    return "".join(symbols[i] for i in seen[0, 1:])

# %% Rung 1: the bigram
# Row c of a table holds the logits of what follows character c (lesson 2).
torch.manual_seed(1337)
table = nn.Embedding(V, V)
course.figure("bigram", train("bigram", table, 3000, 1e-2), 2.46, 2.52, "2.5")
print(sample(table))

# %% Rung 2: one head
# A position asks (q), every position offers (k) and says (v):
#     weight[t, s] = softmax over s <= t of q[t] . k[s] / sqrt(D)        y[t] = sum of weight v
# sqrt(D), because a sum of D products of unit variance has variance D, and a softmax of large
# numbers is a one-hot from the start. The lecture first divided by sqrt(C), C being four times D:
# the losses differ by less than two seeds do, so the formula is graded.
class Head(nn.Module):
    def __init__(self, D: int):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(C, D, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B, T, C) -> each (B, T, D)
        scores = q @ k.mT * k.shape[-1] ** -0.5  # (B, T, T)
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ v  # (B, T, D)


class Characters(nn.Module):
    """Token and position embedded, a body (B, T, C) -> (B, T, C), a head of logits."""

    def __init__(self, make_body, tied=False):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.body, self.head = make_body(), nn.Linear(C, V, bias=not tied)
        if tied:  # rung 7
            nn.init.normal_(self.wte.weight, 0, 0.02)
            nn.init.normal_(self.wpe.weight, 0, 0.02)
            self.head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.wte(x) + self.wpe.weight[: x.shape[1]]  # (B, T, C)
        return self.head(self.body(x))  # (B, T, V)


def rung(name: str, make_body, low: float, high: float, lecture="", tied=False) -> nn.Module:
    torch.manual_seed(1337)
    model = Characters(make_body, tied)
    course.figure(name, train(name, model), low, high, lecture)
    return model


rung("one head", lambda: Head(C), 2.38, 2.44, "2.5")

# %% Rungs 3 and 4: four heads of width 8, feed-forward
# Four questions side by side for the price of one; in one tensor (the exercise) they are the same
# sums, twice as fast. Then a layer in which each position thinks about what it has heard.
class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        drawn = [nn.Linear(C, C // H, bias=False).weight for _ in range(3 * H)]  # as in Head
        parts = drawn[1::3] + drawn[0::3] + drawn[2::3]  # all queries, all keys, all values
        self.c_attn = nn.Parameter(torch.cat(parts).detach())  # 3 H of (D, C) -> (3C, C)

    def forward(self, x: Tensor) -> Tensor:
        # For each head softmax(q k^T / sqrt(D), s <= t) v, and these H of (B, T, D) side by side.
        return e07.all_heads(x @ self.c_attn.mT, H)  # (B, T, C) -> (B, T, 3C) -> (B, T, C)


rung("four heads", Heads, 2.25, 2.31, "2.28")
rung("feed-forward", lambda: nn.Sequential(Heads(), nn.Linear(C, C), nn.ReLU()), 2.21, 2.27, "2.24")

# %% Rungs 5 and 6: blocks
# Three blocks that add to a stream (an addition hands the gradient on whole, lesson 1), then
# LayerNorm on what each branch reads.
class Block(nn.Module):
    def __init__(self, norm, activation):
        super().__init__()
        self.attn = nn.Sequential(Heads(), nn.Linear(C, C))
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), activation, nn.Linear(4 * C, C))
        self.ln_1, self.ln_2 = norm(C), norm(C)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def blocks(norm, activation) -> nn.Sequential:
    return nn.Sequential(*(Block(norm, activation) for _ in range(3)), norm(C))


rung("three blocks", lambda: blocks(nn.Identity, nn.ReLU()), 2.05, 2.11)
rung("with LayerNorm", lambda: blocks(nn.LayerNorm, nn.ReLU()), 2.03, 2.09, "2.06")

# %% Rung 7: GPT-2's own choices
# GELU for ReLU, and the embedding is the output head too. That asks for a small start (of unit
# variance, logits would be sums of 32 large products), and for positions as small: left at 1 they
# drown the characters, and the loss stands at 2.17.
last = rung("as GPT-2", lambda: blocks(nn.LayerNorm, nn.GELU("tanh")), 2.03, 2.09, tied=True)
print(sample(last))
course.picture(drawings.ladder(curves), "ladder")

# %% Addition
# The exercise's adder, scored by whole answers to 1,000 sums that it never saw. As written it must
# tell the hundreds before it knows the carry: 0.5 to 1.0 by the seed, and reversed 0.99 or more.
ORDERS = [("reversed", e07.write_sum, 0.98, 1),
          ("as written", lambda a, b: f"{a:02}+{b:02}={a + b:03}", 0.75, 0.97)]
for order, write, low, high in ORDERS:
    known, asked = e07.held_out(write)
    answers = e07.adder(known)([written[:6] for written in asked])
    score = e07.exact_match(answers, asked)
    course.figure(f"sums never seen, digits {order}", score, low, high, embedded=(low, high))

# %% The door
# model/gpt2.py is this network at any size. The lesson's weights go in under GPT-2's names, and out
# come the same logits, to rounding (fp64: some hundred sums of about 1e-16 each).
NAMES = {"body.3": "ln_f", "body": "h", "attn.0.c_attn": "attn.c_attn.weight", "head": "wte",
         "attn.1": "attn.c_proj", "mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj"}
gpt = GPT(GPTConfig(n_layer=3, n_head=H, n_embd=C, n_ctx=T, n_vocab=V)).double()  # biases 0
with torch.no_grad():
    for name, weight in last.double().state_dict().items():
        for mine, its in NAMES.items():
            name = name.replace(mine, its)
        gpt.get_parameter(name)[: len(weight)] = weight
    x = val_ids[: 100 * T].view(100, T)
    apart = (gpt(x) - last(x)).abs().max().item()
course.figure("logits of model/gpt2.py, furthest apart", apart, 0, 1e-12, embedded=(0, 1e-12))
