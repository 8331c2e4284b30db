"""Lesson 1: scalars that differentiate themselves, and a network made of them.

    python lessons/01_micrograd.py

Needs nothing. Leaves three pictures in runs/lessons/01. Figures: f(2, 3, 4) = 6.336362 and its
gradient, an expression of two variables to four digits, a network of 337 scalars that separates two
moons with a loss of .010978 and 100 % after 100 steps. About half a minute on one core.
Same as: nothing, it all begins here.
"""

# %% The start: a folder to import from
import gc
import itertools
import math
import random
import sys
from operator import attrgetter

import matplotlib
import numpy as np
import torch

sys.path.insert(0, "..")  # for a notebook, which runs in its own folder
sys.path.insert(0, ".")  # for a program, which runs in the repository's root
from kernels import reference
from lessons import course

matplotlib.use("agg")
import matplotlib.pyplot as plt

# %% A slope is a quotient
# f'(x) is what (f(x + h) - f(x)) / h tends to. For a function of three variables there are three
# slopes, and each says how f answers to a nudge of one variable while the others hold still.


def f(a: float, b: float, c: float) -> float:
    return -(a**3) + math.sin(3 * b) - 1 / c + b**2.5 - a**0.5


at = (2.0, 3.0, 4.0)
exact = (-3 * 2**2 - 0.5 * 2**-0.5, 3 * math.cos(3 * 3) + 2.5 * 3**1.5, 1 / 4**2)
course.figure("f(2, 3, 4)", f(*at), 6.336362, 6.336362, lecture="6.336362")
for name, slope, right in zip("abc", exact, (-12.353553, 10.256990, 0.0625), strict=True):
    course.figure(f"df/d{name}", slope, right, right, lecture=f"{right}")

# %% How small should h be?
# One-sided, the error falls with h; from both sides, with h squared. Below some h it rises again,
# for f(x + h) and f(x) agree in all but their last digits, and the quotient is made of rounding.


def worst_error(h: float, symmetric: bool) -> float:
    """The largest error of the three slopes by a step of h."""
    errors = []
    for i in range(3):
        up, down = np.array(at), np.array(at)
        up[i] += h
        down[i] -= h * symmetric
        errors.append(abs((f(*up) - f(*down)) / (up[i] - down[i]) - exact[i]))
    return max(errors)


steps = [10.0**-k for k in range(1, 13)]
drawing, axes = plt.subplots(figsize=(6, 3.5))
for label in ("one-sided", "symmetric"):
    errors = [worst_error(h, label == "symmetric") for h in steps]
    axes.loglog(steps, errors, "o-", label=label)
axes.set(xlabel="h", ylabel="largest error of a slope", title="truncation against rounding")
axes.legend()
course.picture(drawing, "h")
course.figure("error, symmetric, h = 1e-6", worst_error(1e-6, True), 1e-10, 1e-8)

# %% A scalar that remembers
# A Value knows what it was made of, and how steeply it answers to each parent. `_backward` hands
# its gradient on: each parent gets slope x gradient (the chain rule), and gets it ADDED, because a
# scalar that is used twice is reached by two paths, and the sum over the paths is its slope.

made = itertools.count()


class Value:
    """A number, its gradient, its parents and its slope in each of them."""

    def __init__(self, data: float, parents: tuple = (), slopes: tuple = (), op: str = ""):
        self.data, self.grad, self.op = data, 0.0, op
        self.parents, self.slopes = parents, slopes
        self.number = next(made)  # parents have lower numbers than what is made of them

    def _backward(self) -> None:
        for parent, slope in zip(self.parents, self.slopes, strict=True):
            parent.grad += slope * self.grad

    def __add__(self, other):  # d(x + y) = dx + dy
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data + other.data, (self, other), (1.0, 1.0), "+")

    def __mul__(self, other):  # d(x y) = y dx + x dy
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data * other.data, (self, other), (other.data, self.data), "*")

    def __pow__(self, n: float):  # d(x^n) = n x^(n-1) dx
        return Value(self.data**n, (self,), (n * self.data ** (n - 1),), f"^{n}")

    def tanh(self):  # d tanh(x) = (1 - tanh(x)^2) dx
        t = math.tanh(self.data)
        return Value(t, (self,), (1 - t * t,), "tanh")

    def relu(self):
        return Value(max(0.0, self.data), (self,), (float(self.data > 0),), "relu")

    def __sub__(self, other):
        return self + other * -1

    __radd__, __rmul__ = __add__, __mul__

    def history(self) -> list:
        """All Values that this one rests on, in the order in which they were made."""
        seen, stack = {self}, [self]
        while stack:
            for parent in stack.pop().parents:
                if parent not in seen:
                    seen.add(parent)
                    stack.append(parent)
        return sorted(seen, key=attrgetter("number"))

    def backward(self) -> None:
        self.grad = 1.0  # dL/dL
        for node in reversed(self.history()):
            node._backward()


# %% Does it differentiate?
# First what goes wrong where += is only =: a + a, whose slope is 2, would get 1.
a = Value(3.0)
(a + a).backward()
course.figure("d(a + a)/da", a.grad, 2.0, 2.0, lecture="2")
a, b = Value(-4.0), Value(2.0)
e = (a + b) * 4 + 3 - a - ((a * b + b**3) * 12 + (a + b).relu() * 4 + (b - a).relu())
g = e**2 * 0.5 + (e**2) ** -1 * 10
g.backward()
course.figure("an expression of a = -4 and b = 2", g.data, 24.7041, 24.7041, lecture="24.7041")
course.figure("its slope in a", a.grad, 138.8338, 138.8338, lecture="138.8338")
course.figure("its slope in b", b.grad, 645.5773, 645.5773, lecture="645.5773")

# %% A neuron, and the graph that it leaves
# o = tanh(w1 x1 + w2 x2 + b). Below each value stands its gradient.
v = {"x1": Value(2.0), "x2": Value(0.0), "w1": Value(-3.0), "w2": Value(1.0),
     "b": Value(6.8813735870195432)}
o = (v["x1"] * v["w1"] + v["x2"] * v["w2"] + v["b"]).tanh()
o.backward()
course.figure("a neuron's output", o.data, 0.70710678, 0.70710678, "0.70710678")
for name, right in zip(v, (-1.5, 0.5, 1.0, 0.0, 0.5), strict=True):
    course.figure(f"its slope in {name}", v[name].grad, right, right, lecture=f"{right}")


def draw(root: Value, names: dict, axes) -> None:
    """Every Value as a box, one column further right than the last of its parents."""
    rows, place = [0] * 99, {}
    for node in root.history():
        column = 1 + max((place[p][0] for p in node.parents), default=-1)
        rows[column] += 1
        place[node] = (column, -rows[column] - 0.4 * column)
        text = f"{names.get(node, node.op)}\n{node.data:.4f}\ngrad {node.grad:.4f}"
        axes.text(*place[node], text, ha="center", va="center", fontsize=8,
                  bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "#4467c4"})
        for parent in node.parents:
            axes.plot(*zip(place[parent], place[node], strict=True), color="#999999", zorder=0)
    axes.axis("off")


drawing, axes = plt.subplots(figsize=(8, 4))
draw(o, {node: name for name, node in v.items()}, axes)
course.picture(drawing, "neuron")

# %% Two moons
# 100 points on two half circles, shuffled, then noise: in this order, since all draw from one seed.
np.random.seed(1337)
random.seed(1337)
angle = np.linspace(0, math.pi, 50)
points = np.vstack([np.column_stack([np.cos(angle), np.sin(angle)]),
                    np.column_stack([1 - np.cos(angle), 0.5 - np.sin(angle)])])  # (100, 2)
order = np.arange(100)
np.random.shuffle(order)
points = points[order] + np.random.normal(scale=0.1, size=(100, 2))
labels = np.where(order < 50, -1, 1)


layers = []  # of neurons, each of which is its weights and, last, its bias
for inputs, outputs in ((2, 16), (16, 16), (16, 1)):
    layers.append([[*(Value(random.uniform(-1, 1)) for _ in range(inputs)), Value(0.0)]
                   for _ in range(outputs)])
parameters = [p for layer in layers for neuron in layer for p in neuron]
course.figure("parameters", len(parameters), 337, 337, lecture="337")


def score(x: list) -> Value:
    """Layer by layer, w x + b, with ReLU after all but the last."""
    for layer in layers:
        x = [sum((w * xi for w, xi in zip(ws, x, strict=True)), b) for *ws, b in layer]
        if layer is not layers[-1]:
            x = [s.relu() for s in x]
    return x[0]


# %% A hundred steps downhill
# L = mean(max(0, 1 - y score)) + 1e-4 sum p^2: a point costs nothing once it is right by 1.
gc.disable()  # it would walk through all Values again and again: two thirds of the time
printed = {0: .895844, 1: 1.723591, 2: .742901, 10: .245070, 20: .189775, 50: .098751, 99: .010978}
losses = []
for k in range(100):
    scores = [score(point) for point in points.tolist()]
    margins = [(s * -y + 1).relu() for s, y in zip(scores, labels.tolist(), strict=True)]
    size = sum((p * p for p in parameters), Value(0.0))
    loss = sum(margins, Value(0.0)) * (1 / 100) + size * 1e-4
    loss.backward()
    for p in parameters:
        p.data -= (1 - 0.9 * k / 100) * p.grad
        p.grad = 0.0  # += again: this step's gradient would be added to the next one's
    losses.append(loss.data)
    if k in printed:
        course.figure(f"loss at step {k}", loss.data, printed[k], printed[k], f"{printed[k]}")
right = sum((s.data > 0) == (y > 0) for s, y in zip(scores, labels, strict=True))
course.figure("points on the right side, %", right, 100, 100, lecture="100")

# %% What it has learned
grid = np.linspace(-1.6, 2.6, 36)
heights = [[score([x, y]).data for x in grid.tolist()] for y in grid.tolist()]
drawing, (left, middle) = plt.subplots(1, 2, figsize=(9, 4))
left.contourf(grid, grid, heights, levels=[-99, 0, 99], colors=["#f4c7b5", "#b9cdf0"])
left.scatter(*points.T, c=labels, cmap="coolwarm_r", edgecolors="black", s=18)
middle.plot(losses)
middle.set(xlabel="step", ylabel="loss")
course.picture(drawing, "moons")

# %% The door: kernels/layernorm.py
# A kernel is one large Value. `_forward.register_autograd(_gradients, setup_context=_remember)`
# tells PyTorch what a Value knows: `_remember` keeps what the slopes are made of (the sum, mean and
# rstd), `_gradients` is `_backward` and hands on dx, dweight and dbias. Here LayerNorm of scalars,
#     n = (x - mean) / sqrt(variance + eps),   y = n w + b
# against kernels/reference.py, by which the kernels are judged.
C = 8
torch.manual_seed(0)
x, w, b, dy = torch.randn(4, C, dtype=torch.float64)
scalars = [[Value(number) for number in row.tolist()] for row in (x, w, b)]
mean = sum(scalars[0], Value(0.0)) * (1 / C)
centred = [xi - mean for xi in scalars[0]]
rstd = (sum((c * c for c in centred), Value(0.0)) * (1 / C) + 1e-5) ** -0.5
y = [c * rstd * wi + bi for c, wi, bi in zip(centred, *scalars[1:], strict=True)]
total = sum((yi * d for yi, d in zip(y, dy.tolist(), strict=True)), Value(0.0))
total.backward()
tensors = [tensor.clone().requires_grad_() for tensor in (x, w, b)]
reference.layer_norm(*tensors)[1].backward(dy)
mine = torch.tensor([[value.grad for value in row] for row in scalars], dtype=torch.float64)
difference = (mine - torch.stack([tensor.grad for tensor in tensors])).abs().max().item()
# 8 numbers of size 1, some 40 roundings of 1.1e-16 each: 1e-14 at worst, and 1e-12 leaves room.
course.figure("LayerNorm of Values against kernels.reference", difference, 0, 1e-12)
print(f"LayerNorm of one row of {C}: {len(total.history())} Values, or one node of autograd")
