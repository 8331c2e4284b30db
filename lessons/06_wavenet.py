"""Lesson 6: eight letters taken in by a tree, two by two, and the same tree as a convolution.

    python lessons/06_wavenet.py           # a minute: the last network for 30,000 steps
    python lessons/06_wavenet.py --full    # the lecture's five networks, 200,000 steps: 8 minutes

Needs names.txt, which lessons/course.py fetches. Same as lesson 5: letters, BatchNorm, tanh, plain
descent. Different: a context of eight, layer upon layer (WaveNet's idea, arXiv 1609.03499), and
autograd again. Figures: dev 2.03 after 30,000 steps, 1.9937 after 200,000; the tree equals a
dilated convolution, and GPT-2 with its cache GPT-2 without, to 1e-12.
"""

# %% The start: a folder to import from
import math
import random
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, "..")  # for a notebook, which runs in its own folder
sys.path.insert(0, ".")  # for a program, which runs in the repository's root
from lessons import course, drawings
from lessons.solutions.e03 import contexts
from model.generate import KVCache
from model.gpt2 import GPT, GPTConfig

FULL = "--full" in sys.argv
STEPS, SLOW_FROM = (200_000, 150_000) if FULL else (30_000, 22_500)
VOCAB, BATCH = 27, 32
# fp64 rounds by 1e-16; sums of some hundred numbers below 10 stay far under this, whatever the text
EXACT = dict(low=0, high=1e-12, embedded=(0, 1e-12))
torch.set_num_threads(1)  # these matrices are too small to be shared out

# %% The data
# Lesson 3's examples: the letters before (N, context), the letter after (N,). 0 is the dot, a to z
# are 1 to 26, names are split 80 : 10 : 10.
names = course.names()
random.seed(42)
random.shuffle(names)
cuts = int(0.8 * len(names)), int(0.9 * len(names))
train_names, dev_names = names[: cuts[0]], names[cuts[0] : cuts[1]]
data = {size: (contexts(train_names, size), contexts(dev_names, size)) for size in (3, 8)}
course.figure("training examples", len(data[8][0][1]), 182625, 182625, "182,625")

# %% The network
# A flat network squeezes all letters into one layer at once. The tree takes neighbours together:
#
#     (N, 8, 24) - (N, 4, 48) - (N, 4, 128) - (N, 2, 256) - (N, 2, 128) - (N, 256) - (N, 128)
#
# BatchNorm's mean and variance belong to a channel: over the batch and the places in it. Over the
# batch alone each place has its own, of fewer numbers: it runs, it learns, it is a bug (by_place).
class Tree:
    """Layers that each take `groups` neighbours together; groups (8,) is a flat network."""

    def __init__(self, emb, hidden, groups, by_place=False):
        torch.manual_seed(42)  # then everything comes out of the global stream, as in the lecture
        self.groups, fan_in, self.running = groups, emb, []
        self.C, self.W, places = torch.randn(VOCAB, emb), [], math.prod(groups)
        for group in groups:
            self.W.append(torch.randn(group * fan_in, hidden) / (group * fan_in) ** 0.5)
            fan_in, places = hidden, places // group
            channels = places * hidden if by_place else hidden
            self.running.append((torch.zeros(channels), torch.ones(channels)))  # mean, variance
        self.out = torch.randn(hidden, VOCAB) / hidden**0.5 * 0.1
        self.out_bias = torch.zeros(VOCAB)
        self.gains = [torch.ones(hidden) for _ in groups]
        self.biases = [torch.zeros(hidden) for _ in groups]
        self.parameters = [self.C, *self.W, *self.gains, *self.biases, self.out, self.out_bias]
        for p in self.parameters:
            p.requires_grad_()

    def normalise(self, i, x, training=False):
        mean, variance = self.running[i]  # in training each call moves them by a tenth
        rows = x.reshape(-1, len(mean))  # (N T, C), with the bug (N, T C)
        gain, bias = (p.repeat(rows.shape[1] // len(p)) for p in (self.gains[i], self.biases[i]))
        # lesson 4's formula in one call, twice as fast, with a variance by n; by n - 1 is wanted
        share = 1 - 1 / len(rows) if training else 1
        y = F.batch_norm(rows, mean, variance, share**0.5 * gain, bias, training, 0.1, share * 1e-5)
        return y.view(x.shape)

    def forward(self, before, training=False):
        x = self.C[before]  # (N, T, E)
        for i, group in enumerate(self.groups):
            N, T, C = x.shape
            x = x.view(N, T // group, group * C)
            if T == group:
                x = x.squeeze(1)  # (N, group C): one place is left
            x = torch.tanh(self.normalise(i, x @ self.W[i], training))
        return x @ self.out + self.out_bias  # (N, 27)

    @torch.no_grad()
    def loss(self, before, after):
        """The mean over a whole split, with the running statistics."""
        parts = zip(before.split(20_000), after.split(20_000), strict=True)
        total = sum(F.cross_entropy(self.forward(b), a, reduction="sum") for b, a in parts)
        return total / len(after)


def descend(tree, before, after, steps):
    """Trains; yields the step and the loss of its batch."""
    for step in range(steps):
        if step % 1000 == 0:  # a block of draws is the same as a thousand draws
            rows = torch.randint(0, len(after), (1000, BATCH))
        batch = rows[step % 1000]
        loss = F.cross_entropy(tree.forward(before[batch], training=True), after[batch])
        yield step, loss.item()
        loss.backward()
        lr = 0.1 if step < SLOW_FROM else 0.01
        with torch.no_grad():
            for p in tree.parameters:
                p.sub_(p.grad, alpha=lr)
                p.grad = None


# %% The ladder
# The same split by windows of three and of eight letters. Each rung's first loss is exact; what
# rungs two to four reach in the lecture came from other draws, so theirs has a band.
LADDER = [  # name, context, network, parameters, first loss, the lecture's train and dev
    ("flat, 3 letters", 3, dict(emb=10, hidden=200, groups=(3,)), 12097, 3.2966, 2.058, 2.105),
    ("flat, 8 letters", 8, dict(emb=10, hidden=200, groups=(8,)), 22097, 3.2847, 1.918, 2.027),
    ("tree, statistics by place (the bug)", 8,
     dict(emb=10, hidden=68, groups=(2, 2, 2), by_place=True), 22397, 3.3107, 1.941, 2.029),
    ("tree", 8, dict(emb=10, hidden=68, groups=(2, 2, 2)), 22397, 3.3142, 1.912, 2.022),
    ("larger tree", 8, dict(emb=24, hidden=128, groups=(2, 2, 2)), 76579, 3.3167, 1.769, 1.9937)]
SEEN = {10_000: 2.0576, 20_000: 2.0723, 30_000: 2.5134}  # of the larger tree
for name, context, shape, count, first, train_loss, dev_loss in LADDER:
    train, dev = data[context]
    tree, larger = Tree(**shape), shape["hidden"] == 128
    parameters = sum(p.numel() for p in tree.parameters)
    course.always(f"{name}: parameters", parameters, count, count, f"{count:,}")
    losses = []
    for step, loss in descend(tree, *train, STEPS if larger or FULL else 1):
        losses.append(loss)
        if step == 0:
            course.figure("  first loss", loss, first, first)
        if larger and step in SEEN:
            course.figure(f"  batch {step:,}", loss, SEEN[step], SEEN[step], f"{SEEN[step]}")
    if FULL:
        wide = 0.001 if larger else 0.01
        for split, rows, loss in (("train", train, train_loss), ("dev", dev, dev_loss)):
            low, high = round(loss - wide, 4), round(loss + wide, 4)
            course.figure(f"  {split}", tree.loss(*rows), low, high, f"{loss}")
    elif larger:
        course.figure(f"  train after {STEPS:,} steps", tree.loss(*train), 1.935, 1.97,
                      "1.769 after 200,000")
        course.figure(f"  dev after {STEPS:,} steps", tree.loss(*dev), 2.01, 2.042,
                      "1.9937 after 200,000")
course.picture(drawings.means("loss of the larger tree", losses), "loss")

# %% The tree is a convolution
# Two windows that overlap share most of their tree, and it is computed anew for each. A layer's
# weight cut in two, the older neighbour's half first, is a filter of width 2; with holes of 1, 2
# and 4 between its two taps, three filters go once over all letters and give every window's output.
with torch.no_grad():
    for p in (*tree.parameters, *sum(tree.running, ())):
        p.data = p.data.double()

    def dilated(row):
        """Logits for every window of 8 in a row of T letters: (T - 7, 27)."""
        x = tree.C[row]  # (T, E)
        for i, W in enumerate(tree.W):
            taps = torch.stack(W.T.chunk(2, 1), 2)  # (hidden, E, 2): the older neighbour, the newer
            x = F.conv1d(x.T[None], taps, dilation=2**i)[0].T  # (T - 2^i, hidden)
            x = torch.tanh(tree.normalise(i, x))
        return x @ tree.out + tree.out_bias

    for name in names[:3]:
        windows, after = contexts([name], 8)
        row = torch.cat([windows[0], after[:-1]])  # (T,): eight dots, the name's letters
        error = (dilated(row) - tree.forward(windows)).abs().max()
        course.figure(f"{name}: convolution against {len(windows)} windows", error, **EXACT)

# %% Letter by letter, with a memory
# When a name is made, a new letter is one step of each filter, if what each layer has seen 1, 2 and
# 4 letters ago is kept: 3 products in place of the tree's 7 for every letter.
with torch.no_grad():
    memory, error = [[] for _ in tree.W], 0.0  # of each layer: its inputs so far
    for place, letter in enumerate(row):
        x = tree.C[letter]  # (E,)
        for i, W in enumerate(tree.W):
            memory[i].append(x)
            older = memory[i][max(0, len(memory[i]) - 1 - 2**i)]  # before the eighth: whatever
            x = torch.tanh(tree.normalise(i, torch.cat([older, x]) @ W))
        if place >= 7:
            difference = x @ tree.out + tree.out_bias - dilated(row)[place - 7]
            error = max(error, difference.abs().max().item())
    course.figure("letter by letter against the convolution", error, **EXACT)

# %% The door: model/generate.py
# GPT-2's memory is its KV cache: a new token looks back at keys and values computed when their
# tokens came; all else in a block is a matter of one place. Token by token gives the whole row.
with torch.no_grad():
    torch.manual_seed(42)
    gpt = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=32, n_ctx=16, n_vocab=VOCAB)).double()
    whole = gpt.hidden(row[None])[0]  # (T, C)
    cache, error = KVCache(gpt, batch=1, length=len(row)), 0.0
    for place, letter in enumerate(row):
        last = cache.last_hidden(gpt, letter.view(1, 1))[0]  # (C,)
        error = max(error, (last - whole[place]).abs().max().item())
    course.figure("GPT-2: its cache against the whole row", error, **EXACT)
