"""Lesson 3: letters as vectors, and a network that reads three of them (Bengio et al., 2003).

    python lessons/03_mlp.py

Needs names.txt (lessons/course.py fetches it). Leaves three pictures in runs/lessons/03. Same as
lesson 2: the loss, the splits, the next letter. Different: a context of three letters does not
choose a row of a table, but is looked up in an embedding, so that like letters are treated alike.
Figures: 2.126 on train and 2.170 on dev after 200,000 steps; and the honest fact that the counted
four letters of lesson 2 are better. Under a minute on one core.
"""

# %% Examples and splits
# As in lesson 2, but the lecture's cell had been run four times, each shuffling what the last left.
import math
import random
import sys
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, "..")  # for a notebook, which runs in its own folder
sys.path.insert(0, ".")  # for a program, which runs in the repository's root
from data.dataset import open_data
from data.loader import Loader
from lessons import course, drawings
from model.gpt2 import GPT
from train_gpt2 import PRESETS

LETTERS = ".abcdefghijklmnopqrstuvwxyz"
V, T, C, H = 27, 3, 10, 200  # letters, context, width of an embedding, hidden units


def examples(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """X (N, T), the letters before each letter, with dots before the first; and Y (N,)."""
    rows, targets = [], []
    for name in names:
        row = [0] * T
        for letter in [LETTERS.index(c) for c in name] + [0]:
            rows.append(row)
            targets.append(letter)
            row = row[1:] + [letter]
    return np.array(rows), np.array(targets)


names = course.names()
for _ in range(4):
    random.seed(42)
    random.shuffle(names)
n1, n2 = int(0.8 * len(names)), int(0.9 * len(names))
train, dev, test = examples(names[:n1]), examples(names[n1:n2]), examples(names[n2:])
for split, right, other in ((train, 182_441, 76_970), (dev, 22_902, 9_622), (test, 22_803, 9_538)):
    course.figure("examples of a split", len(split[1]), right, right, f"{right}", (other, other))

# %% The network
# e = embedding[x], three vectors in a row;  h = tanh(e W1 + b1);  logits = h W2 + b2.
# Drawn as the lecture does, all from N(0, 1), it starts confidently wrong: far above ln 27.


def new_network(seed: int) -> list[np.ndarray]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((V, C), (T * C, H), (H,), (H, V), (V,))
    return [torch.randn(shape, generator=g).numpy() for shape in shapes]


def forward(network: list[np.ndarray], x: np.ndarray) -> tuple[np.ndarray, ...]:
    """e (B, T C), h (B, H) and logits (B, V) of contexts x (B, T)."""
    embedding, W1, b1, W2, b2 = network
    e = embedding[x].reshape(len(x), T * C)  # (B, T, C) -> (B, T C)
    h = np.tanh(e @ W1 + b1)
    return e, h, h @ W2 + b2


def loss(network: list[np.ndarray], split: tuple[np.ndarray, np.ndarray]) -> float:
    x, y = split
    return F.cross_entropy(torch.tensor(forward(network, x)[2]), torch.tensor(y)).item()


network = new_network(2147483647)
course.figure("parameters", sum(p.size for p in network), 11_897, 11_897, "11897", (11_897, 11_897))
course.figure("loss at the start, dev", loss(network, dev), 22, 32, "25 to 30", (22, 32))
course.figure("where it should start, ln 27", math.log(V), 3.2958, 3.2958, "", (3.2958, 3.2958))

# %% Its gradient
# `loss.backward()` would do. Written out it is some four times as fast, for with 32 rows PyTorch
# spends its time on bookkeeping; lesson 5 derives each line. Here autograd is asked whether it
# agrees, in fp64, to the last digits.


def gradients(network: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Of the mean loss of a batch, for each of the five parameters."""
    embedding, W1, _, W2, _ = network
    e, h, logits = forward(network, x)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1  # dL/dlogits = (softmax - one-hot) / B
    p /= len(y)
    dh = (p @ W2.T) * (1 - h * h)  # through tanh, (B, H)
    de = (dh @ W1.T).reshape(-1, C)  # (B T, C)
    d_embedding = np.zeros_like(embedding)
    np.add.at(d_embedding, x.ravel(), de)  # +=, for a letter may stand in many contexts
    return [d_embedding, e.T @ dh, dh.sum(0), h.T @ p, p.sum(0)]


x, y = train[0][:32], train[1][:32]
tensors = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in network]
h = (tensors[0][torch.tensor(x)].view(32, T * C) @ tensors[1] + tensors[2]).tanh()
F.cross_entropy(h @ tensors[3] + tensors[4], torch.tensor(y)).backward()
by_hand = gradients([p.detach().numpy() for p in tensors], x, y)
worst = max(abs(g - p.grad.numpy()).max() for g, p in zip(by_hand, tensors, strict=True))
# Some hundred roundings of 1.1e-16 in numbers of size 1 to 10: 1e-13 at worst.
course.figure("gradient by hand against autograd", worst, 0, 1e-12, "", (0, 1e-12))

# %% Which learning rate?
# A thousand steps, each with a larger rate than the last, from 0.001 to 1. Too small and nothing
# happens, too large and it jumps about; the best lies before the loss gets restless.


def batches(count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Contexts (32, T) and targets (32,), drawn from train with replacement."""
    X, Y = train
    for rows in np.random.default_rng(seed).integers(0, len(Y), (count, 32)):
        yield X[rows], Y[rows]


def step_down(network: list[np.ndarray], x: np.ndarray, y: np.ndarray, rate: float) -> None:
    for p, g in zip(network, gradients(network, x, y), strict=True):
        p -= rate * g


searching, rates, losses = new_network(2147483647), 10 ** np.linspace(-3, 0, 1000), []
for rate, batch in zip(rates.tolist(), batches(1000, seed=0), strict=True):
    losses.append(loss(searching, batch))
    step_down(searching, *batch, rate)
smooth = np.convolve(losses, np.ones(50) / 50, mode="valid")  # a batch of 32 is off by half a nat
course.picture(drawings.rate_search(rates, smooth, (2, 15), losses), "learning-rate")
best = rates[25:-24][smooth.argmin()]
course.figure("rate at the lowest smoothed loss", best, 0.05, 0.6, "0.1", (0.05, 0.6))

# %% 200,000 steps
# 0.1 for the first half, 0.01 for the second. The minibatches are drawn without the lecture's seed
# (it had none): a band, three seeds wide.
for step, batch in enumerate(batches(200_000, seed=0)):
    step_down(network, *batch, 0.1 if step < 100_000 else 0.01)
course.figure("train", loss(network, train), 2.108, 2.136, "2.1260", (2.0, 2.07))
course.figure("dev", loss(network, dev), 2.160, 2.178, "2.1701", (2.14, 2.19))
course.figure("test", loss(network, test), 2.155, 2.180, "", (2.12, 2.175))

# %% The honest comparison
# Lesson 2's table of the same three letters, 0.1 added to each count, is better by far more than
# the noise: 531,441 counts against 11,897 parameters. Lesson 4 draws level, lesson 6 wins.
(X, Y), (x, y) = train, dev
table = np.full((V, V, V, V), 0.1)
np.add.at(table, (*X.T, Y), 1)
p = table / table.sum(-1, keepdims=True)
counted = -np.log(p[(*x.T, y)]).mean()
course.figure("dev, four letters counted", counted, 2.09, 2.12, "", (2.1, 2.12))
course.figure("the network loses by", loss(network, dev) - counted, 0.04, 0.09, "", (0.03, 0.08))

# %% What it has learned
# The embedding's 10 numbers a letter, their directions seen from where they differ most: vowels
# have found together. (Lengths say little: rare letters have kept what they were drawn with.)
directions = network[0] / np.linalg.norm(network[0], axis=1, keepdims=True)
centred = directions - directions.mean(0)
flat = centred @ np.linalg.svd(centred)[2][:2].T  # (27, 10) @ (10, 2)
course.picture(drawings.letters_map(flat, LETTERS), "letters")
draw, sampled = np.random.default_rng(1), []
while len(sampled) < 20:
    context, name = [0] * T, ""
    while not name or context[-1]:
        logits = forward(network, np.array([context]))[2][0]
        letter = int((logits + draw.gumbel(size=V)).argmax())  # a draw from softmax(logits)
        context, name = [*context[1:], letter], name + LETTERS[letter]
    sampled.append(name[:-1])
print("sampled:", ", ".join(sampled))
short = sum(0 < len(name) < 12 for name in sampled)
course.figure("samples of 1 to 11 letters, of 20", short, 10, 20, "", (10, 20))

# %% The door: train_gpt2.py
# The same search on the demo's GPT-2: 60 steps of AdamW, from 1e-4 to 1, in some seconds. The
# demo's own 4e-3 stands a little before the lowest point: 6e-3 ended one seed half a nat higher.
config = PRESETS["demo"]
torch.manual_seed(1337)
model = GPT(config.model)
optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, config.optim.beta2))
loader = Loader(open_data(config.data).train, T=128, batch_tokens=256, micro_batch=2, seed=1337)
rates, losses = np.logspace(-4, 0, 60), []
for step, rate in enumerate(rates):
    batch = loader.get_batch(step)[0]  # (B, T + 1)
    gpt_loss = model(batch[:, :-1], batch[:, 1:])
    optimizer.zero_grad()
    gpt_loss.backward()
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    losses.append(gpt_loss.item())
smooth = np.convolve(losses, np.ones(5) / 5, mode="valid")
course.picture(drawings.rate_search(rates, smooth, (5, 12), demo=config.optim.lr), "demo")
best = rates[2:-2][smooth.argmin()]
course.figure("demo: rate at the lowest smoothed loss", best, 0.003, 0.012, "", (0.003, 0.012))
