"""Lesson 4: what flows through a network, forward and backward, and BatchNorm, which tames it.

    python lessons/04_batchnorm.py           # half a minute: 50,000 steps a rung
    python lessons/04_batchnorm.py --full    # the lecture's 200,000 steps: two minutes

Needs names.txt, which lessons/course.py fetches. Leaves four pictures in runs/lessons/04.
Same as lesson 3: three letters in, a hidden layer, the next letter out, plain gradient descent.
Different: the scale of the first weights, BatchNorm, and a look at the numbers inside.
Figures (dev, up the ladder, in full): 2.165, 2.1311, 2.1027, 2.1070, 2.1057; deep network 2.3982.
"""

# %% The data
# As in lesson 3: three letters before, one after; names are split 80 : 10 : 10.
import sys
from itertools import pairwise

import torch
import torch.nn.functional as F

sys.path.insert(0, "..")  # for a notebook, which runs in its own folder
sys.path.insert(0, ".")  # for a program, which runs in the repository's root
from launch.world import World
from lessons import course, drawings
from lessons.solutions.e04 import batchnorm, fold_batchnorm
from lessons.stacked import BATCH, CONTEXT, EMB, KAIMING, SEED, VOCAB, Net, splits
from model.diagnostics import Diagnostics
from model.gpt2 import GPT, GPTConfig
from model.optim import LossScaler, OptimConfig, configure_optimizers
from model.parallel import ParallelModel
from model.train_state import TrainState

FULL = "--full" in sys.argv
STEPS, SLOW_FROM = (200_000, 100_000) if FULL else (50_000, 40_000)
torch.set_num_threads(1)  # these matrices are too small to be shared out
train, dev = splits()  # each (N, 3) letters, (N,) the next
course.figure("training examples", len(train[1]), 182625, 182625, "182,625")

# %% The scale of a product
# With a (1000,) and b (1000, 1000) of unit variance, c = b a has a standard deviation of sqrt(1000)
# and so has the gradient that comes back to a: hence the weights' factor of 1 / sqrt(fan_in).
draw = torch.Generator().manual_seed(SEED)
a = torch.randn((1000, 1), generator=draw).requires_grad_()
c = torch.randn((1000, 1000), generator=draw) @ a  # (1000, 1)
(torch.randn(1000, generator=draw) @ c).sum().backward()
course.always("std of c = b a", c.detach().std(), 31.012417, 31.012417, "31.012417")
course.always("std of the gradient at a", a.grad.std(), 30.88183, 30.88183, "30.881830")

# %% The ladder
# One network and five ways to start it: with e, the vectors of three letters in a row,
#     h = tanh(e W1 + b1),   logits = h W2 + b2.
# Four differ in the scale of W1, b1, W2 and b2 only; lessons/stacked.py trains them side by side.
# Uniform guessing costs ln 27 = 3.30: a first loss of 27.9 is a network that is sure of what it
# can't know. And where |h| > 0.99 tanh passes less than 2 % of the gradient.
LADDER = {  # scales; first loss; % saturated; dev after 50,000, 200,000 steps, in the lecture
    "original": ((1, 1, 1, 1), 27.8817, 60.95, (2.213, 2.233), (2.163, 2.1685), "2.1682"),
    "softmax not confidently wrong":
        ((1, 1, 0.01, 0), 3.3221, 60.95, (2.147, 2.164), (2.1311, 2.1311), "2.13"),
    "tanh not saturated":
        ((0.2, 0.01, 0.01, 0), 3.3135, 0.98, (2.116, 2.130), (2.1027, 2.1027), "2.1027"),
    "Kaiming":
        ((KAIMING, 0.01, 0.01, 0), 3.3179, 8.14, (2.117, 2.131), (2.107, 2.107), "2.1070")}
net = Net([scales for scales, *_ in LADDER.values()])
units, first = net.train(train, STEPS, SLOW_FROM)[0]  # (R, 32, 200), (R,)
dev_losses = net.losses(dev)
for rung, (name, row) in enumerate(LADDER.items()):
    _, loss, saturated, short, full, said = row
    course.figure(f"{name}: first loss", first[rung], loss, loss)
    share = 100 * (units[rung].abs() > 0.99).double().mean()
    course.figure("  % of hidden units saturated", share, saturated, saturated)
    band = full if FULL else short
    course.figure(f"  dev after {STEPS:,} steps", dev_losses[rung], *band, f"{said} after 200,000")

# %% BatchNorm
# For a batch of n rows, with mean, and std by n - 1, of each hidden unit's x = e W1 in it:
#     xhat = (x - mean) / std,   h = tanh(gain xhat + bias)
# Whatever W1's scale, xhat has mean 0 and std 1. Here it draws level with a careful start, no more;
# what it is for shows in the deep network below.
net = Net([(KAIMING, 0, 0.01, 0)], batchnorm=True)
seen = net.train(train, STEPS, SLOW_FROM)
for step, loss in ((0, 3.3239), (10_000, 2.0322), (20_000, 2.5675), (30_000, 2.0125)):
    course.figure(f"BatchNorm: loss of batch {step:,}", seen[step][1], loss, loss)
band = (2.1047, 2.1067) if FULL else (2.130, 2.144)
course.figure(f"  dev after {STEPS:,} steps", net.losses(dev)[0], *band, "2.1057 after 200,000")


# %% A deep network
# Five hidden layers. Without BatchNorm every layer multiplies the scale by the same factor, forward
# and backward, so the gain of the first weights has to be just right: at 5/3 all layers are alike,
# at 1 they fade, at 3 they saturate.
class Deep:
    """Embedding, five layers of 100 tanh, softmax; BatchNorm after every product, or none."""

    def __init__(self, gain, batchnorm):
        self.draw, self.batchnorm = torch.Generator().manual_seed(SEED), batchnorm
        self.C, self.W = torch.randn((VOCAB, EMB), generator=self.draw), []
        for shape in pairwise([EMB * CONTEXT, 100, 100, 100, 100, 100, VOCAB]):
            W = torch.randn(shape, generator=self.draw) / shape[0] ** 0.5
            self.W.append(gain * W)
        self.gains = [torch.ones(W.shape[1]) for W in self.W]
        self.gains[-1] *= 0.1  # the last layer starts small: nothing is known yet
        self.biases = [torch.zeros(W.shape[1]) for W in self.W]
        self.running = [(torch.zeros(()), torch.ones(()))] * 6  # mean, variance

    def forward(self, before):
        """Logits (N, 27) of letters (N, 3); leaves the five layers' outputs in tanhs."""
        x, self.tanhs = self.C[before].flatten(1), []  # (N, 3, 10) -> (N, 30)
        for i, W in enumerate(self.W):
            if self.batchnorm:
                x, *running = batchnorm(x @ W, self.gains[i], self.biases[i], *self.running[i])
                self.running[i] = [statistic.detach() for statistic in running]
            else:
                x = x @ W + self.biases[i]
            if i < 5:
                x = torch.tanh(x)
                self.tanhs.append(x)
        return x

    def batch(self):
        rows = torch.randint(0, len(train[1]), (BATCH,), generator=self.draw)
        return train[0][rows], train[1][rows]


for gain, *stds in ((5 / 3, 0.75, 0.66), (1, 0.62, 0.32), (0.5, 0.41, 0.02), (3, 0.85, 0.84)):
    deep = Deep(gain, batchnorm=False)
    deep.forward(deep.batch()[0])
    for layer, std in zip((1, 5), stds, strict=True):
        found = deep.tanhs[layer - 1].std()
        course.figure(f"no BatchNorm, gain {gain:.2g}: std of layer {layer}", found, std, std)

# %% The same with BatchNorm, and four pictures
# Stopped after 1,001 steps: a look at the flow, not a trained network. All layers are alike now,
# whatever the gain; what still sees a bad scale is the fourth picture, the step's size relative to
# the weights. About 10^-3 is healthy.
deep, ratios, lr = Deep(1, batchnorm=True), [], 0.1
weights = [deep.C, *deep.W]
parameters = [p.requires_grad_() for p in (*weights, *deep.gains, *deep.biases)]
course.always("parameters", sum(p.numel() for p in parameters), 47024, 47024, "47,024")
for step in range(1001):
    before, after = deep.batch()
    loss = F.cross_entropy(deep.forward(before), after)
    if step == 0:
        course.figure("first loss", loss.item(), 3.2870, 3.2870, "3.2870")
    slopes = torch.autograd.grad(loss, parameters + deep.tanhs)
    with torch.no_grad():
        updates = [lr * dW.std() / W.std() for W, dW in zip(weights, slopes[:7], strict=True)]
        ratios.append([update.log10() for update in updates])
        for p, slope in zip(parameters, slopes[:-5], strict=True):
            p -= lr * slope
layers, shapes = [f"layer {i}" for i in range(1, 6)], [f"{tuple(W.shape)}" for W in weights]
FLOW = [(0.63, 2.78, 2.641), (0.64, 2.56, 2.246), (0.65, 2.25, 2.046), (0.65, 1.69, 1.983),
        (0.65, 1.88, 1.952)]
for layer, x, dx, right in zip(layers, deep.tanhs, slopes[-5:], FLOW, strict=True):
    std, saturated, slope = right
    course.figure(f"{layer}: std", x.detach().std(), std, std, f"{std}")
    share = 100 * (x.abs() > 0.97).double().mean()
    course.figure("  % saturated", share, saturated, saturated, f"{saturated}")
    course.figure("  std of its gradient, in 1e-3", 1e3 * dx.std(), slope, slope, f"{slope}e-3")
RATIO = [8.013, 48.81, 69.65, 60.74, 56.31, 55.70, 116.0]
for shape, W, dW, ratio in zip(shapes, weights, slopes[:7], RATIO, strict=True):
    found = 1e3 * dW.std() / W.detach().std()
    course.figure(f"{shape}: gradient : data, in 1e-3", found, ratio, ratio, f"{ratio}e-3")
course.picture(drawings.histograms("activations", deep.tanhs, layers), "activations")
course.picture(drawings.histograms("gradients", slopes[-5:], layers), "gradients")
course.picture(drawings.histograms("weight gradients", slopes[:7], shapes), "weight-gradients")
course.picture(drawings.update_to_data(ratios, shapes), "update-to-data")

# %% After training
# BatchNorm with its running mean and variance is a product and a sum, so it folds into W and bias.
deep.batchnorm = False
with torch.no_grad():
    for i, running in enumerate(deep.running):
        folded = fold_batchnorm(deep.W[i], deep.gains[i], deep.biases[i], *running)
        deep.W[i], deep.biases[i] = folded
    for name, (before, after), loss in (("train", train, 2.4003), ("dev", dev, 2.3982)):
        found = F.cross_entropy(deep.forward(before), after)
        course.figure(f"{name} after 1,001 steps", found, loss, loss, f"{loss}")

# %% The door: the same four pictures of any GPT-2
# `train_gpt2.py demo --diagnose_every 25` records them, `python -m eval.report runs/demo` draws
# them; model/diagnostics.py is how. Here it watches Adam's first step on a small GPT-2. Adam moves
# every weight by lr at first, and weights begin with a std of 0.02: log10(0.001 / 0.02) = -1.30.
# With plain descent we looked for -3: Adam needs its warm-up of the learning rate for this reason.
torch.manual_seed(SEED)
shape = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=CONTEXT, n_vocab=VOCAB)
model = ParallelModel(GPT(shape), "ddp", World(0, 1, torch.device("cpu")), "fp32")
adamw = configure_optimizers(model, OptimConfig(lr=1e-3, weight_decay=0.0))
watch = Diagnostics(TrainState(model, adamw, LossScaler()), every=1)
letters = train[0][:256]  # (B, 3)
model(letters, torch.cat([letters[:, 1:], train[1][:256, None]], 1)).backward()
model.optimizer_step(adamw)
row = watch.take(1)
course.always("GPT-2: std of the stream behind block 2", row["activation_std"][1], 0.025, 0.04)
course.always("GPT-2: log10 of Adam's first update : data",
              row["weights"]["h.1.mlp.c_fc.weight"]["log10_update_to_data"], -1.32, -1.28)
