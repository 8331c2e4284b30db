"""Lesson 4's network, several of them side by side: letters, a hidden layer, the next letter.

    net = Net([(1.0, 1.0, 1.0, 1.0), (0.2, 0.01, 0.01, 0.0)])  # R = 2
    seen = net.train(split, steps=50_000, slow_from=40_000)
    net.losses(dev)  # [2.22, 2.12]

They draw the same numbers and differ in their scale, so an axis R of rungs costs little more than
one of them. Gradients are written out, which takes half the time of autograd here; lesson 5 derives
each of these lines.
"""

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lessons import course
from lessons.solutions.e03 import contexts

EMB, CONTEXT, HIDDEN, VOCAB, BATCH = 10, 3, 200, 27, 32
KAIMING = (5 / 3) / (EMB * CONTEXT) ** 0.5  # gain of a tanh / sqrt(fan_in) = 0.3043
SEED = 2147483647  # the lecture's
Split = tuple[Tensor, Tensor]  # (N, 3) letters before, (N,) the letter after


def splits() -> tuple[Split, Split]:
    """train and dev, as lesson 3's but shuffled once: names are split 80 : 10 : 10."""
    names = course.names()
    random.seed(42)
    random.shuffle(names)
    n1, n2 = int(0.8 * len(names)), int(0.9 * len(names))
    return contexts(names[:n1], CONTEXT), contexts(names[n1:n2], CONTEXT)


class Net:
    """R networks: embedding, a hidden layer of 200 tanh, softmax over 27 letters."""

    def __init__(self, scales: Sequence[tuple[float, ...]], batchnorm: bool = False):
        """scales: of W1, b1, W2 and b2, for each network. BatchNorm's bias takes the place of b1.
        Batches are drawn from the generator that has drawn the weights."""
        self.draw, R = torch.Generator().manual_seed(SEED), len(scales)
        W1_scale, b1_scale, W2_scale, b2_scale = torch.tensor(scales).T.reshape(4, R, 1, 1)
        self.C = self.randn(VOCAB, EMB).repeat(R, 1, 1)
        self.W1 = self.randn(EMB * CONTEXT, HIDDEN) * W1_scale
        self.b1 = torch.zeros(R, 1, HIDDEN)
        if not batchnorm:
            self.b1 = self.randn(HIDDEN) * b1_scale
        self.W2, self.b2 = self.randn(HIDDEN, VOCAB) * W2_scale, self.randn(VOCAB) * b2_scale
        self.batchnorm, self.gain = batchnorm, torch.ones(R, 1, HIDDEN)
        self.running_mean, self.running_std = torch.zeros(R, 1, HIDDEN), torch.ones(R, 1, HIDDEN)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw)

    def forward(self, before: Tensor, training: bool = True) -> Split:
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

    def step(self, before: Tensor, after: Tensor, h: Tensor, logits: Tensor, lr: float) -> None:
        """One step of gradient descent; h and logits are what forward() has just given."""
        dlogits = logits.softmax(-1)
        dlogits[:, torch.arange(BATCH), after] -= 1
        dlogits /= BATCH
        dhidden = dlogits @ self.W2.mT * (1 - h * h)  # (R, N, 200)
        self.W2.sub_(h.mT @ dlogits, alpha=lr)
        self.b2.sub_(dlogits.sum(1, keepdim=True), alpha=lr)
        self.b1.sub_(dhidden.sum(1, keepdim=True), alpha=lr)
        if self.batchnorm:
            dxhat, xhat = dhidden * self.gain, self.xhat
            self.gain.sub_((dhidden * xhat).sum(1, keepdim=True), alpha=lr)
            along = (dxhat * xhat).sum(1, keepdim=True) / (BATCH - 1)
            dhidden = (dxhat - dxhat.mean(1, keepdim=True) - xhat * along) / self.std
        dx = dhidden @ self.W1.mT  # (R, N, 30)
        self.W1.sub_(self.x.mT @ dhidden, alpha=lr)
        self.C.index_add_(1, before.flatten(), dx.reshape(len(dx), -1, EMB), alpha=-lr)

    def train(self, split: Split, steps: int, slow_from: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Batches of 32, a rate of 0.1 and from slow_from on of 0.01.

        Returns what every 10,000th batch was met with: hidden units (R, 32, 200), losses (R,).
        """
        seen = {}
        for step in range(steps):
            if step % 1000 == 0:  # a block of draws is the same as a thousand draws
                rows = torch.randint(0, len(split[1]), (1000, BATCH), generator=self.draw)
            before, after = split[0][rows[step % 1000]], split[1][rows[step % 1000]]
            h, logits = self.forward(before)
            if step % 10_000 == 0:
                seen[step] = h, torch.stack([F.cross_entropy(rung, after) for rung in logits])
            lr = 0.1 if step < slow_from else 0.01
            self.step(before, after, h, logits, lr)
        return seen

    def losses(self, split: Split) -> list[float]:
        """R mean losses over a whole split, with the running mean and std."""
        _, logits = self.forward(split[0], training=False)
        return [F.cross_entropy(rung, split[1]).item() for rung in logits]
