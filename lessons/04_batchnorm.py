"""Lesson 4: what flows through a network, forward and backward, and BatchNorm, which tames it.

    python lessons/04_batchnorm.py           # half a minute: 50,000 steps a rung
    python lessons/04_batchnorm.py --full    # the lecture's 200,000 steps: two minutes

Needs names.txt, which lessons/course.py fetches. Leaves four pictures in runs/lessons/04.
Same as lesson 3: three letters in, a hidden layer, the next letter out, plain gradient descent.
Different: the scale of the first weights, BatchNorm, and a look at the numbers inside.
Figures (dev, up the ladder, in full): 2.165, 2.1311, 2.1027, 2.1070, 2.1057; deep network 2.3982.
"""

# %% The start: a folder to import from
import random
import sys
from itertools import pairwise

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, "..")  # for a notebook, which runs in its own folder
sys.path.insert(0, ".")  # for a program, which runs in the repository's root
from launch.world import World
from lessons import course
from model.diagnostics import Diagnostics
from model.gpt2 import GPT, GPTConfig
from model.optim import LossScaler, OptimConfig, configure_optimizers
from model.parallel import ParallelModel
from model.train_state import TrainState

FULL = "--full" in sys.argv
STEPS, SLOW_FROM = (200_000, 100_000) if FULL else (50_000, 40_000)
SEED = 2147483647  # of every generator here: the lecture's
EMB, CONTEXT, HIDDEN, VOCAB, BATCH = 10, 3, 200, 27, 32
KAIMING = (5 / 3) / (EMB * CONTEXT) ** 0.5  # gain of a tanh / sqrt(fan_in) = 0.3043
torch.set_num_threads(1)  # these matrices are too small to be shared out

# %% The data
# A name of n letters gives n + 1 examples: three letters before, one after, 0 being the dot that
# stands before and behind every name. Names, not examples, are split 80 : 10 : 10.


def examples(names, context=CONTEXT):
    """(N, context) letters before, (N,) the letter after."""
    rows = []
    for name in names:
        row = [0] * context + [ord(letter) - ord("a") + 1 for letter in name] + [0]
        rows += [row[i - context : i + 1] for i in range(context, len(row))]
    table = torch.tensor(rows)  # (N, context + 1)
    return table[:, :-1], table[:, -1]


names = course.names()
random.seed(42)
random.shuffle(names)
cuts = int(0.8 * len(names)), int(0.9 * len(names))
train, dev = examples(names[: cuts[0]]), examples(names[cuts[0] : cuts[1]])
course.figure("training examples", len(train[1]), 182625, 182625, "182,625")

# %% The scale of a product
# With a (1000,) and b (1000, 1000) of unit variance, c = b a has a standard deviation of sqrt(1000)
# and so has the gradient that comes back to a: hence the weights' factor of 1 / sqrt(fan_in).
draw = torch.Generator().manual_seed(SEED)
a = torch.randn((1000, 1), generator=draw).requires_grad_()
b = torch.randn((1000, 1000), generator=draw).requires_grad_()
c = b @ a  # (1000, 1)
c.retain_grad()
(torch.randn(1000, generator=draw) @ c).sum().backward()
course.figure("std of c = b a", c.detach().std(), 31.012417, 31.012417, "31.012417")
course.figure("std of the gradient at a", a.grad.std(), 30.88183, 30.88183, "30.881830")

# %% The ladder
# One network, five ways to start it. The first four differ in the scale of four tensors only and
# draw the same numbers, so they are trained side by side, on an axis R of rungs. BatchNorm takes
# the place of the first layer's bias. For a batch of n rows, std with n - 1:
#
#     xhat = (x - mean) / std,   y = gain xhat + bias
#
# The gradients are written out (lesson 5 derives each of these lines): half the time of autograd.
RUNGS = ["original", "softmax not confidently wrong", "tanh not saturated", "Kaiming"]
SCALES = torch.tensor([  # W1, b1, W2, b2
    [1, 1, 1, 1], [1, 1, 0.01, 0], [0.2, 0.01, 0.01, 0], [KAIMING, 0.01, 0.01, 0]])


class Net:
    """R networks side by side: embedding, a hidden layer of 200 tanh, softmax over 27."""

    def __init__(self, scales, batchnorm):
        self.draw, R = torch.Generator().manual_seed(SEED), len(scales)
        s = scales.T.reshape(4, R, 1, 1)
        self.C = self.randn(27, EMB).repeat(R, 1, 1)
        self.W1 = self.randn(EMB * CONTEXT, HIDDEN) * s[0]
        self.b1 = torch.zeros(R, 1, HIDDEN)  # BatchNorm's bias, where there is one
        if not batchnorm:
            self.b1 = self.randn(HIDDEN) * s[1]
        self.W2, self.b2 = self.randn(HIDDEN, VOCAB) * s[2], self.randn(VOCAB) * s[3]
        self.batchnorm, self.gain = batchnorm, torch.ones(R, 1, HIDDEN)
        self.running_mean, self.running_std = torch.zeros(R, 1, HIDDEN), torch.ones(R, 1, HIDDEN)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.draw)

    def forward(self, before, training=True):
        """(N, 3) letters -> hidden units (R, N, 200), logits (R, N, 27)."""
        self.x = self.C[:, before].flatten(2)  # (R, N, 3, 10) -> (R, N, 30)
        hidden = self.x @ self.W1  # (R, N, 200)
        if self.batchnorm:
            mean, self.std = self.running_mean, self.running_std
            if training:
                mean, self.std = hidden.mean(1, keepdim=True), hidden.std(1, keepdim=True)
                self.running_mean = 0.999 * self.running_mean + 0.001 * mean
                self.running_std = 0.999 * self.running_std + 0.001 * self.std
            self.xhat = (hidden - mean) / self.std
            hidden = self.gain * self.xhat
        h = torch.tanh(hidden + self.b1)
        return h, h @ self.W2 + self.b2

    def step(self, before, after, h, logits, lr):
        """One step of gradient descent; h and logits are what forward() has just given."""
        dlogits = logits.softmax(-1)
        dlogits[:, torch.arange(BATCH), after] -= 1
        dlogits /= BATCH
        dhidden = dlogits @ self.W2.mT * (1 - h * h)  # (R, N, 200)
        self.W2 -= lr * (h.mT @ dlogits)
        self.b2 -= lr * dlogits.sum(1, keepdim=True)
        self.b1 -= lr * dhidden.sum(1, keepdim=True)
        if self.batchnorm:
            dxhat, xhat = dhidden * self.gain, self.xhat
            self.gain -= lr * (dhidden * xhat).sum(1, keepdim=True)
            along = (dxhat * xhat).sum(1, keepdim=True) / (BATCH - 1)
            dhidden = (dxhat - dxhat.mean(1, keepdim=True) - xhat * along) / self.std
        dx = dhidden @ self.W1.mT  # (R, N, 30)
        self.W1 -= lr * (self.x.mT @ dhidden)
        self.C.index_add_(1, before.flatten(), dx.reshape(len(dx), -1, EMB), alpha=-lr)

    def losses(self, split):
        """(R,) mean losses over a whole split, with the running mean and std."""
        _, logits = self.forward(split[0], training=False)
        return [F.cross_entropy(rung, split[1]).item() for rung in logits]

    def train(self):
        """Yields, ahead of each step: its number, the letters after, hidden units and logits."""
        for step in range(STEPS):
            if step % 1000 == 0:  # a block of draws is the same as a thousand draws
                rows = torch.randint(0, len(train[1]), (1000, BATCH), generator=self.draw)
            batch = rows[step % 1000]
            before, after = train[0][batch], train[1][batch]
            h, logits = self.forward(before)
            yield step, after, h, logits
            self.step(before, after, h, logits, lr=0.1 if step < SLOW_FROM else 0.01)


# %% Before and after training
# Uniform guessing costs ln 27 = 3.30. A first loss of 27.9 is a network that is sure of what it
# can't know; and where |h| > 0.99 tanh passes less than 2 % of the gradient.
FIRST = [(27.8817, 60.95), (3.3221, 60.95), (3.3135, 0.98), (3.3179, 8.14)]
DEV = [(2.163, 2.1685), (2.1311,) * 2, (2.1027,) * 2, (2.107,) * 2] if FULL else [
    (2.213, 2.233), (2.147, 2.164), (2.116, 2.130), (2.117, 2.131)]
net = Net(SCALES, batchnorm=False)
for step, after, h, logits in net.train():
    if step == 0:
        for rung, (loss, saturated) in enumerate(FIRST):
            first = F.cross_entropy(logits[rung], after)
            course.figure(f"{RUNGS[rung]}: first loss", first, loss, loss)
            share = 100 * (h[rung].abs() > 0.99).double().mean()
            course.figure("  % of hidden units saturated", share, saturated, saturated)
for name, loss, band, said in zip(RUNGS, net.losses(dev), DEV,
                                  ("2.1682", "2.13", "2.1027", "2.1070"), strict=True):
    course.figure(f"{name}: dev after {STEPS:,} steps", loss, *band, f"{said} after 200,000")

# %% BatchNorm
# Whatever W1's scale, a hidden unit has mean 0 and std 1 over a batch. Here it draws level with a
# careful start, no more; what it is for shows in the deep network below.
net = Net(torch.tensor([[KAIMING, 0, 0.01, 0]]), batchnorm=True)
SEEN = {0: 3.3239, 10_000: 2.0322, 20_000: 2.5675, 30_000: 2.0125}
for step, after, _, logits in net.train():
    if step in SEEN:
        batch_loss = F.cross_entropy(logits[0], after)
        course.figure(f"BatchNorm: loss of batch {step:,}", batch_loss, *[SEEN[step]] * 2)
band = (2.1047, 2.1067) if FULL else (2.130, 2.144)
course.figure(f"BatchNorm: dev after {STEPS:,} steps", net.losses(dev)[0], *band,
              "2.1057 after 200,000")


# %% A deep network
# Five hidden layers. Without BatchNorm every layer multiplies the scale by the same factor, forward
# and backward, so the gain of the first weights has to be just right: at 5/3 all layers are alike,
# at 1 they fade, at 3 they saturate.
class Deep:
    """Embedding, five layers of 100 tanh, softmax; BatchNorm after every product, or none."""

    def __init__(self, gain, batchnorm):
        self.draw, self.batchnorm = torch.Generator().manual_seed(SEED), batchnorm
        sizes = [EMB * CONTEXT, 100, 100, 100, 100, 100, VOCAB]
        self.C, self.W = torch.randn((VOCAB, EMB), generator=self.draw), []
        for fan_in, fan_out in pairwise(sizes):
            W = torch.randn((fan_in, fan_out), generator=self.draw) / fan_in**0.5
            self.W.append(gain * W)
        self.gains = [torch.ones(size) for size in sizes[1:]]
        self.biases = [torch.zeros(size) for size in sizes[1:]]
        if batchnorm:  # the last layer starts small either way: nothing is known yet
            self.gains[-1] *= 0.1
        else:
            self.W[-1] *= 0.1 / gain
        self.running = [(torch.zeros(()), torch.ones(())) for _ in self.W]  # mean, variance
        self.weights = [self.C, *self.W]
        self.parameters = [*self.weights, *self.biases, *(self.gains if batchnorm else [])]
        for p in self.parameters:
            p.requires_grad_()

    def forward(self, before, training=True):
        x, self.tanhs = self.C[before].flatten(1), []  # (N, 3, 10) -> (N, 30)
        for i, W in enumerate(self.W):
            x = x @ W
            if self.batchnorm:
                mean, variance = self.running[i]
                if training:
                    mean, variance = x.mean(0), x.var(0)
                    self.running[i] = (0.9 * self.running[i][0] + 0.1 * mean.detach(),
                                       0.9 * self.running[i][1] + 0.1 * variance.detach())
                x = self.gains[i] * (x - mean) / (variance + 1e-5).sqrt()
            x = x + self.biases[i]
            if i < 5:
                x = torch.tanh(x)
                self.tanhs.append(x)
        return x

    def backward(self):
        """Draws a batch and makes the gradients; returns the loss."""
        rows = torch.randint(0, len(train[1]), (BATCH,), generator=self.draw)
        logits = self.forward(train[0][rows])
        for x in [*self.tanhs, *self.parameters]:
            x.retain_grad()
            x.grad = None
        loss = F.cross_entropy(logits, train[1][rows])
        loss.backward()
        return loss.item()


for gain, *stds in ((5 / 3, 0.75, 0.66), (1, 0.62, 0.32), (0.5, 0.41, 0.02), (3, 0.85, 0.84)):
    deep = Deep(gain, batchnorm=False)
    deep.backward()
    for layer, std in zip((1, 5), stds, strict=True):
        found = deep.tanhs[layer - 1].detach().std()
        course.figure(f"no BatchNorm, gain {gain:.2g}: std of layer {layer}", found, std, std)

# %% The same with BatchNorm, and four pictures
# Stopped after 1,001 steps: a look at the flow, not a trained network. All layers are alike now,
# whatever the gain; what still sees a bad scale is the fourth picture, the step's size relative to
# the weights. About 10^-3 is healthy.
deep, ratios, lr = Deep(1, batchnorm=True), [], 0.1
course.figure("parameters", sum(p.numel() for p in deep.parameters), 47024, 47024, "47,024")
for step in range(1001):
    loss = deep.backward()
    if step == 0:
        course.figure("first loss", loss, 3.2870, 3.2870, "3.2870")
    ratios.append([(lr * W.grad.std() / W.std()).log10().item() for W in deep.weights])
    with torch.no_grad():
        for p in deep.parameters:
            p -= lr * p.grad
FLOW = [(0.63, 2.78, 2.641), (0.64, 2.56, 2.246), (0.65, 2.25, 2.046), (0.65, 1.69, 1.983),
        (0.65, 1.88, 1.952)]
for layer, (x, (std, saturated, grad)) in enumerate(zip(deep.tanhs, FLOW, strict=True), 1):
    course.figure(f"layer {layer}: std", x.detach().std(), std, std, f"{std}")
    share = 100 * (x.abs() > 0.97).double().mean()
    course.figure("  % saturated", share, saturated, saturated, f"{saturated}")
    course.figure("  std of its gradient, in 1e-3", 1e3 * x.grad.std(), grad, grad, f"{grad}e-3")
RATIO = [8.013, 48.81, 69.65, 60.74, 56.31, 55.70, 116.0]
for W, ratio in zip(deep.weights, RATIO, strict=True):
    found = 1e3 * W.grad.std() / W.detach().std()
    course.figure(f"{tuple(W.shape)}: gradient : data, in 1e-3", found, ratio, ratio, f"{ratio}e-3")


def histograms(title, tensors, labels):
    """Draws how the numbers of each tensor are spread."""
    drawing = Figure(figsize=(7, 3))
    axes = drawing.add_subplot(title=title)
    for x, label in zip(tensors, labels, strict=True):
        heights, edges = torch.histogram(x.detach().float().flatten(), bins=40, density=True)
        axes.plot(edges[:-1], heights, label=label)
    axes.legend(fontsize=7)
    course.picture(drawing, title.replace(" ", "-"))


layers = [f"layer {layer}" for layer in range(1, 6)]
shapes = [f"{tuple(W.shape)}" for W in deep.weights]
histograms("activations", deep.tanhs, layers)
histograms("gradients", [x.grad for x in deep.tanhs], layers)
histograms("weight gradients", [W.grad for W in deep.weights], shapes)
drawing = Figure(figsize=(7, 3))
axes = drawing.add_subplot(title="update to data", xlabel="step", ylabel="log10")
axes.plot(ratios, label=shapes)
axes.axhline(-3, color="black", linewidth=0.8)
axes.legend(fontsize=7)
course.picture(drawing, "update-to-data")
with torch.no_grad():
    for name, split, loss in (("train", train, 2.4003), ("dev", dev, 2.3982)):
        found = F.cross_entropy(deep.forward(split[0], training=False), split[1])
        course.figure(f"{name} after 1,001 steps", found, loss, loss, f"{loss}")

# %% The door: the same four pictures of any GPT-2
# `train_gpt2.py demo --diagnose_every 25` records them, `python -m eval.report runs/demo` draws
# them; model/diagnostics.py is how. Here it watches Adam's first step on a small GPT-2. Adam moves
# every weight by lr at first, and weights begin with a std of 0.02: log10(0.001 / 0.02) = -1.30.
# With plain descent we looked for -3: Adam needs its warm-up of the learning rate for this reason.
torch.manual_seed(SEED)
shape = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=CONTEXT, n_vocab=VOCAB)
model = ParallelModel(GPT(shape), "ddp", World(0, 1, torch.device("cpu")), "fp32")
adamw = configure_optimizers(model.shards, OptimConfig(lr=1e-3, weight_decay=0.0))
watch = Diagnostics(TrainState(model, adamw, LossScaler()), every=1)
letters = train[0][:256]  # (B, 3)
model(letters, torch.cat([letters[:, 1:], train[1][:256, None]], 1)).backward()
model.optimizer_step(adamw)
row = watch.take(1)
course.figure("GPT-2: std of the stream behind block 2", row["activation_std"][1], 0.025, 0.04)
course.figure("GPT-2: log10 of Adam's first update : data",
              row["weights"]["h.1.mlp.c_fc.weight"]["log10_update_to_data"], -1.32, -1.28)
