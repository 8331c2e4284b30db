"""Lesson 5: every gradient of lesson 4's network by hand, and the closed forms that real code uses.

    python lessons/05_backprop.py           # half a minute
    python lessons/05_backprop.py --full    # the lecture's training of 200,000 steps, a minute more

Needs names.txt, which lessons/course.py fetches. Same as lesson 4: letters, a hidden layer with
BatchNorm. Different: no autograd; it stands by as the judge only.
Figures: 26 gradients and three closed forms within 1e-12 of autograd's in fp64 (the lecture: equal
to the bit in fp32, which today's tanh is not); loss 2.0705 / 2.1099 after 200,000 steps.
"""

# %% The start: a folder to import from
import importlib.util
import os
import random
import sys

os.environ["TRITON_INTERPRET"] = "1"  # for the door; Triton reads it when it is imported

import torch
import torch.nn.functional as F

sys.path.insert(0, "..")  # for a notebook, which runs in its own folder
sys.path.insert(0, ".")  # for a program, which runs in the repository's root
from kernels import reference
from lessons import course

FULL = "--full" in sys.argv
SEED = 2147483647  # of the generator of all draws but BatchNorm's: the lecture's
EMB, CONTEXT, VOCAB, BATCH = 10, 3, 27, 32
KAIMING = (5 / 3) / (EMB * CONTEXT) ** 0.5
SAME = 1e-12  # fp64 rounds by 1e-16; sums of some hundred numbers below 10 stay far under this
EXACT = dict(low=0, high=SAME, embedded=(0, SAME))  # whatever the text
torch.set_num_threads(1)  # these matrices are too small to be shared out

# %% The data
# Three letters before, one after; 0 is the dot. Names are split 80 : 10 : 10.


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


def start(hidden, draw, dtype=torch.float32):
    """The parameters, drawn in the lecture's order. Small, but not zero: a zero hides mistakes."""
    def randn(*shape):
        return torch.randn(shape, generator=draw)
    C, W1, b1 = randn(27, EMB), randn(EMB * CONTEXT, hidden) * KAIMING, randn(hidden) * 0.1
    W2, b2 = randn(hidden, VOCAB) * 0.1, randn(VOCAB) * 0.1
    other = torch.Generator().manual_seed(1)  # the lecture's had no seed
    gain = 1 + 0.1 * torch.randn((1, hidden), generator=other)
    bias = 0.1 * torch.randn((1, hidden), generator=other)
    return [p.to(dtype) for p in (C, W1, b1, W2, b2, gain, bias)]


# %% Forward, in steps so small that each has one derivative
# Between the letters and the loss stand 26 tensors. b1 is of no use before BatchNorm, which takes
# the mean off again: its gradient must come out as 0.


def forward(parameters, before, after):
    """Every tensor on the way, by name, in order."""
    C, W1, b1, W2, b2, gain, bias = parameters
    n, v = len(before), dict(zip(("C", "W1", "b1", "W2", "b2", "gain", "bias"), parameters,
                                 strict=True))
    v["emb"] = C[before]  # (n, 3, 10)
    v["x"] = v["emb"].view(n, -1)  # (n, 30)
    v["hprebn"] = v["x"] @ W1 + b1  # (n, hidden)
    v["mean"] = v["hprebn"].sum(0, keepdim=True) / n
    v["diff"] = v["hprebn"] - v["mean"]
    v["diff2"] = v["diff"] ** 2
    v["var"] = v["diff2"].sum(0, keepdim=True) / (n - 1)  # unbiased
    v["inv"] = (v["var"] + 1e-5) ** -0.5
    v["raw"] = v["diff"] * v["inv"]
    v["hpreact"] = gain * v["raw"] + bias
    v["h"] = torch.tanh(v["hpreact"])
    v["logits"] = v["h"] @ W2 + b2  # (n, 27)
    v["max"] = v["logits"].max(1, keepdim=True).values
    v["norm"] = v["logits"] - v["max"]  # exp of it can't overflow
    v["counts"] = v["norm"].exp()
    v["sum"] = v["counts"].sum(1, keepdim=True)
    v["suminv"] = v["sum"] ** -1
    v["probs"] = v["counts"] * v["suminv"]
    v["logprobs"] = v["probs"].log()
    v["loss"] = -v["logprobs"][torch.arange(n), after].mean()
    return v


# %% Backward: the same list from its end
# Three rules do nearly all of it. What was broadcast is summed up on the way back, what was summed
# is broadcast; a tensor that is used twice gets two gradients, added; and of a product A B the
# gradients are dC B^T and A^T dC, the only ones whose shapes fit.


def backward(v, before, after):
    """The gradient of the loss in each of the 26 tensors."""
    n, rows, d = len(before), torch.arange(len(before)), {}
    d["logprobs"] = torch.zeros_like(v["logprobs"])
    d["logprobs"][rows, after] = -1 / n  # loss = -sum / n, of one letter a row
    d["probs"] = d["logprobs"] / v["probs"]
    d["suminv"] = (v["counts"] * d["probs"]).sum(1, keepdim=True)
    d["sum"] = -(v["sum"] ** -2) * d["suminv"]
    d["counts"] = v["suminv"] * d["probs"] + d["sum"]  # used twice
    d["norm"] = v["counts"] * d["counts"]
    d["max"] = -d["norm"].sum(1, keepdim=True)  # 0, but for rounding: a shift changes no softmax
    largest = F.one_hot(v["logits"].argmax(1), VOCAB)
    d["logits"] = d["norm"] + largest * d["max"]
    d["h"] = d["logits"] @ v["W2"].T
    d["W2"] = v["h"].T @ d["logits"]
    d["b2"] = d["logits"].sum(0)
    d["hpreact"] = (1 - v["h"] ** 2) * d["h"]
    d["gain"] = (v["raw"] * d["hpreact"]).sum(0, keepdim=True)
    d["raw"] = v["gain"] * d["hpreact"]
    d["bias"] = d["hpreact"].sum(0, keepdim=True)
    d["inv"] = (v["diff"] * d["raw"]).sum(0, keepdim=True)
    d["var"] = -0.5 * (v["var"] + 1e-5) ** -1.5 * d["inv"]
    d["diff2"] = torch.ones_like(v["diff2"]) / (n - 1) * d["var"]
    d["diff"] = v["inv"] * d["raw"] + 2 * v["diff"] * d["diff2"]  # used twice
    d["mean"] = -d["diff"].sum(0, keepdim=True)
    d["hprebn"] = d["diff"] + torch.ones_like(d["diff"]) / n * d["mean"]  # used twice
    d["x"] = d["hprebn"] @ v["W1"].T
    d["W1"] = v["x"].T @ d["hprebn"]
    d["b1"] = d["hprebn"].sum(0)
    d["emb"] = d["x"].view(v["emb"].shape)
    # A letter that stands in several places gets the sum of their gradients.
    d["C"] = torch.zeros_like(v["C"]).index_add_(0, before.flatten(), d["emb"].view(-1, EMB))
    return d


def furthest(ours, right):
    """The largest difference between any two of these tensors."""
    return max((ours[name] - right[name]).abs().max().item() for name in ours)


for dtype, limit in ((torch.float32, 2e-8), (torch.float64, SAME)):  # fp64 goes on below
    draw = torch.Generator().manual_seed(SEED)
    parameters = start(64, draw, dtype)
    course.figure("parameters", sum(p.numel() for p in parameters), 4137, 4137, "4,137")
    rows = torch.randint(0, len(train[1]), (BATCH,), generator=draw)
    before, after = train[0][rows], train[1][rows]
    values = forward([p.requires_grad_() for p in parameters], before, after)
    for value in values.values():
        value.retain_grad()
    values["loss"].backward()
    judge = {name: value.grad for name, value in values.items()}
    with torch.no_grad():
        ours = backward(values, before, after)
    course.figure("loss", values["loss"].item(), 3.330, 3.350, "3.3377, BatchNorm unseeded")
    course.figure("gradients by hand", len(ours), 26, 26, "26", embedded=(26, 26))
    band = dict(low=0, high=limit, embedded=(0, limit))
    course.figure(f"furthest from autograd, {str(dtype)[6:]}", furthest(ours, judge), **band,
                  lecture="0 in fp32")
    course.figure("gradient of b1, which BatchNorm makes useless", ours["b1"].abs().max().item(),
                  **band)


# %% Softmax and cross-entropy in one go
# Eight of the steps above are dlogits = (p - onehot) / n: every row pulls its right letter up and
# pushes the others down by what they were believed, and a row's pulls and pushes cancel.
def cross_entropy_backward(logits, after):
    dlogits = logits.softmax(1)
    dlogits[torch.arange(len(after)), after] -= 1
    return dlogits / len(after)


with torch.no_grad():
    dlogits = cross_entropy_backward(values["logits"], after)
    course.figure("softmax minus one-hot", (dlogits - judge["logits"]).abs().max(), **EXACT,
                  lecture="5.1e-9 in fp32")
    course.figure("a row of dlogits sums to", dlogits.sum(1).abs().max(), **EXACT,
                  lecture="1.4e-9 in fp32")


# %% BatchNorm in one line
# And the nine from hprebn to hpreact, with xhat for raw, are
#
#     dx = gain inv / n (n dy - sum dy - n / (n - 1) xhat sum(dy xhat)):
#
# what would shift or stretch the whole column is taken out, for the normalisation undoes it anyway.
# With 1 for n / (n - 1), the biased variance's factor, it is off by 3e-5: a test with a tolerance
# of 1e-4 would never notice.
def batchnorm_backward(dy, xhat, gain, inv, unbiased=True):
    n = len(dy)
    along = (dy * xhat).sum(0) * (n / (n - 1) if unbiased else 1)
    return gain * inv / n * (n * dy - dy.sum(0) - xhat * along)


with torch.no_grad():
    known = judge["hpreact"], values["raw"], values["gain"], values["inv"]
    for unbiased, low, high in ((True, 0, SAME), (False, 3.0e-5, 4.0e-5)):
        error = (batchnorm_backward(*known, unbiased) - judge["hprebn"]).abs().max()
        course.figure(f"BatchNorm in one line, {'un' * unbiased}biased", error, low, high,
                      "9.3e-10 in fp32" if unbiased else "")

# %% LayerNorm: the same line, turned by 90 degrees
# GPT-2 normalises rows, with the biased variance, so the factor is gone; and its gain differs
# along the row, so it is multiplied in first. `inv` is 1 / sqrt(var + eps).
x = torch.randn((6, 48), generator=draw, dtype=torch.float64).requires_grad_()
weight, bias = (torch.randn((2, 48), generator=draw, dtype=torch.float64)).unbind()
weight.requires_grad_()
_, y = reference.layer_norm(x, weight, bias)
dy = torch.randn((6, 48), generator=draw, dtype=torch.float64)
y.backward(dy)
with torch.no_grad():
    inv = (x.var(1, correction=0, keepdim=True) + 1e-5) ** -0.5
    xhat, g = (x - x.mean(1, keepdim=True)) * inv, dy * weight
    dx = inv * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))
    course.figure("LayerNorm: dx", (dx - x.grad).abs().max(), **EXACT)
    course.figure("LayerNorm: dweight", ((dy * xhat).sum(0) - weight.grad).abs().max(), **EXACT)

# %% Attention: one number a row
# Softmax's backward pass needs sum_j p_ij dp_ij. With dp = do v^T and o = p v that is
# sum_d o_id do_id =: delta_i, two vectors that are at hand, and not a row of the (T, T) matrix:
# flash attention lives on it (kernels/attention.py).
T, D = 12, 8
qkv = torch.randn((1, T, 3 * D), generator=draw, dtype=torch.float64).requires_grad_()
o, do = reference.attention(qkv, n_head=1), torch.randn((T, D), generator=draw).double()
o.backward(do[None])
with torch.no_grad():
    q, k, v = qkv[0].split(D, 1)  # each (T, D)
    hidden_keys = torch.ones(T, T).triu(1).bool()
    p = (q @ k.T / D**0.5).masked_fill(hidden_keys, -torch.inf).softmax(1)  # (T, T)
    dp, delta = do @ v.T, (o[0] * do).sum(1, keepdim=True)
    ds = p * (dp - delta)
    dqkv = torch.cat([ds @ k / D**0.5, ds.T @ q / D**0.5, p.T @ do], 1)
    course.figure("attention: dq, dk, dv", (dqkv - qkv.grad[0]).abs().max(), **EXACT)

# %% Training without autograd
# Lesson 4's BatchNorm network, by the lines above; judged with mean and variance of the whole
# training set.
steps, slow_from = (200_000, 100_000) if FULL else (50_000, 40_000)
draw = torch.Generator().manual_seed(SEED)
parameters = start(200, draw)
C, W1, b1, W2, b2, gain, bias = parameters
course.figure("parameters", sum(p.numel() for p in parameters), 12297, 12297, "12,297")
for step in range(steps):
    if step % 1000 == 0:
        rows = torch.randint(0, len(train[1]), (1000, BATCH), generator=draw)
    before, after = train[0][rows[step % 1000]], train[1][rows[step % 1000]]
    x = C[before].view(BATCH, -1)
    hprebn = x @ W1 + b1
    inv = (hprebn.var(0) + 1e-5) ** -0.5
    raw = (hprebn - hprebn.mean(0)) * inv
    h = torch.tanh(gain * raw + bias)
    logits = h @ W2 + b2
    if step == 0:
        course.figure("first loss", F.cross_entropy(logits, after), 3.6, 4.05, "3.7805, unseeded")
    dlogits = cross_entropy_backward(logits, after)
    dy = (1 - h * h) * (dlogits @ W2.T)
    dhprebn = batchnorm_backward(dy, raw, gain, inv)
    dC = torch.zeros_like(C).index_add_(0, before.flatten(), (dhprebn @ W1.T).view(-1, EMB))
    gradients = (dC, x.T @ dhprebn, dhprebn.sum(0), h.T @ dlogits, dlogits.sum(0),
                 (dy * raw).sum(0), dy.sum(0))
    lr = 0.1 if step < slow_from else 0.01
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter -= lr * gradient
hidden = C[train[0]].flatten(1) @ W1 + b1
mean, inv = hidden.mean(0), (hidden.var(0) + 1e-5) ** -0.5
BANDS = ((2.067, 2.076), (2.108, 2.119)) if FULL else ((2.10, 2.13), (2.125, 2.155))
for name, (before, after), band, said in zip(("train", "dev"), (train, dev), BANDS,
                                             ("2.0705", "2.1099"), strict=True):
    h = torch.tanh(gain * (C[before].flatten(1) @ W1 + b1 - mean) * inv + bias)
    course.figure(f"{name} after {steps:,} steps", F.cross_entropy(h @ W2 + b2, after), *band,
                  f"{said} after 200,000")

# %% The door: the same lines on a GPU
# `_dkdv_step` of kernels/attention.py holds ds = p (dp - delta), dk = ds^T q and dv = p^T do, for a
# tile of keys and a tile of queries. The exercise leaves these lines out; here they run as they
# stand, on Triton's interpreter, against fp64. fp32 rounds by 6e-8, and sums of some hundred
# roundings of either sign stay below 1e-6.
if importlib.util.find_spec("triton"):
    from kernels import attention
    from lessons.checks.c05 import dkdv_errors

    for name, error in dkdv_errors(attention._dkdv_step).items():
        course.figure(f"kernels/attention.py: {name}", error, 0, 1e-6, embedded=(0, 1e-6))
else:
    print("The door needs Triton, which there is for Linux: pip install triton")
