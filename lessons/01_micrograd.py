"""Lesson 1: scalars that differentiate themselves, and a network made of them.

    python lessons/01_micrograd.py

Same as: nothing, it all begins here. Leaves three pictures in runs/lessons/01; half a minute.
Figures: f(2, 3, 4) = 6.336362 and its gradient, an expression of two variables to four digits, and
337 scalars that tell two moons apart: after 100 steps a loss of .010978, and 100 % are right.
"""

# %% The start: a folder to import from
import gc
import itertools
import math
import random
import sys
from operator import attrgetter, mul

import numpy as np
import torch

sys.path.insert(0, "..")  # for a notebook, which runs in its own folder
sys.path.insert(0, ".")  # for a program, which runs in the repository's root
from kernels import reference
from lessons import course, drawings
from lessons.solutions.e01 import one_sided, symmetric  # its exercises


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
# One-sided, the error falls with h; symmetric, (f(x + h) - f(x - h)) / 2 h, with h squared. Below
# some h it rises again: f(x + h) and f(x) agree in all but their last digits, the rest is rounding.
steps, errors = [10.0**-k for k in range(1, 13)], {}
for quotient in (one_sided, symmetric):
    slopes = [quotient(f, at, h) for h in steps]  # (12, 3)
    errors[quotient.__name__] = np.abs(np.subtract(slopes, exact)).max(1)  # (12,)
course.picture(drawings.step_errors(steps, errors), "h")
course.figure("error, symmetric, h = 1e-6", errors["symmetric"][5], 1e-10, 1e-8)


# %% A scalar that remembers
# A Value knows what it was made of, and how steeply it answers to each parent. `_backward` hands
# its gradient on: each parent gets slope x gradient (the chain rule), and gets it ADDED, because a
# scalar that is used twice is reached by two paths, and the sum over the paths is its slope.
class Value:
    """A number, its gradient, its parents and its slope in each of them."""
    made = itertools.count()

    def __init__(self, data: float, parents: tuple = (), slopes: tuple = (), op: str = ""):
        self.data, self.grad, self.op = data, 0.0, op
        self.parents, self.slopes = parents, slopes
        self.number = next(Value.made)  # parents have lower numbers than what is made of them

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
        nodes, seen = [self], {self}
        for node in nodes:  # and nodes grows meanwhile
            new = set(node.parents) - seen
            seen |= new
            nodes += new
        return sorted(nodes, key=attrgetter("number"))

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
x1, x2, w1, w2, b = map(Value, (2.0, 0.0, -3.0, 1.0, 6.8813735870195432))
o = (x1 * w1 + x2 * w2 + b).tanh()
o.backward()
course.figure("a neuron's output", o.data, 0.70710678, 0.70710678, "0.70710678")
names = {x1: "x1", x2: "x2", w1: "w1", w2: "w2", b: "b"}
for (node, name), right in zip(names.items(), (-1.5, 0.5, 1.0, 0.0, 0.5), strict=True):
    course.figure(f"its slope in {name}", node.grad, right, right, lecture=f"{right}")
course.picture(drawings.graph(o.history(), names), "neuron")

# %% Two moons
# 100 points on two half circles, shuffled, then noise: in this order, since all draw from one seed.
np.random.seed(1337)
random.seed(1337)
angle = np.linspace(0, math.pi, 50)
moon = np.column_stack([np.cos(angle), np.sin(angle)])  # (50, 2)
order = np.random.permutation(100)
points = np.vstack([moon, (1, 0.5) - moon])[order] + np.random.normal(0, 0.1, (100, 2))
labels = np.where(order < 50, -1, 1)
layers, parameters = [], []
for inputs, outputs in ((2, 16), (16, 16), (16, 1)):
    layers.append([])
    for _ in range(outputs):  # a neuron is its weights and, last, its bias
        neuron = [Value(random.uniform(-1, 1)) for _ in range(inputs)] + [Value(0.0)]
        layers[-1].append(neuron)
        parameters += neuron
course.figure("parameters", len(parameters), 337, 337, lecture="337")


def score(x: list) -> Value:
    """Layer by layer, w x + b, with ReLU after all but the last."""
    for layer in layers:
        x = [sum(map(mul, weights, x), bias) for *weights, bias in layer]
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
    loss = sum(margins) * (1 / 100) + sum(map(mul, parameters, parameters)) * 1e-4
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
heights = [score([x, y]).data for y, x in itertools.product(grid.tolist(), repeat=2)]
course.picture(drawings.moons(points, labels, grid, np.reshape(heights, (36, 36)), losses), "moons")

# %% The door: kernels/layernorm.py
# A kernel is one large Value. `_forward.register_autograd(_gradients, setup_context=_remember)`
# tells PyTorch what a Value knows: `_remember` keeps what the slopes are made of (the sum, mean and
# rstd), `_gradients` is `_backward` and hands on dx, dweight and dbias. Here is a row of it, made
# of 130 Values, y = (x - mean) / sqrt(variance + eps) w + b, against kernels/reference.py.
torch.manual_seed(0)
rows = torch.randn(4, 8, dtype=torch.float64).requires_grad_()
x, w, b, dy = (list(map(Value, row)) for row in rows.tolist())
mean = sum(x) * (1 / 8)
centred = [xi - mean for xi in x]
rstd = (sum(map(mul, centred, centred)) * (1 / 8) + 1e-5) ** -0.5
y = [c * rstd * wi + bi for c, wi, bi in zip(centred, w, b, strict=True)]
sum(map(mul, y, dy)).backward()
reference.layer_norm(*rows[:3])[1].backward(rows[3].detach())
mine = torch.tensor([value.grad for value in x + w + b], dtype=torch.float64)
difference = (mine - rows.grad[:3].flatten()).abs().max().item()
# 8 numbers of size 1, some 40 roundings of 1.1e-16 each: 1e-14 at worst, and 1e-12 leaves room.
course.figure("LayerNorm of Values against kernels.reference", difference, 0, 1e-12)
