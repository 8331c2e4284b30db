"""Lesson 5: every gradient of lesson 4's network by hand, and the closed forms that real code uses.

    python lessons/05_backprop.py           # half a minute
    python lessons/05_backprop.py --full    # the lecture's training of 200,000 steps, a minute more

Needs names.txt, which lessons/course.py fetches. Same as lesson 4: the network with BatchNorm.
Different: no autograd; it is the judge only. Figures: 26 gradients, four closed forms, within 1e-12
of autograd's in fp64 (the lecture: equal to the bit in fp32, which today's tanh is not); a loss of
2.0705 / 2.1099 after 200,000 steps.
"""

# %% The data
# As in lesson 3: three letters before, one after; names are split 80 : 10 : 10.
import importlib.util
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # for the door; Triton reads it when it is imported

import torch
import torch.nn.functional as F

sys.path.insert(0, "..")  # for a notebook, which runs in its own folder
sys.path.insert(0, ".")  # for a program, which runs in the repository's root
from kernels import reference
from lessons import course
from lessons.solutions import e05
from lessons.stacked import BATCH, CONTEXT, EMB, KAIMING, SEED, VOCAB, Net, splits

SAME = 1e-12  # fp64 rounds by 1e-16; sums of some hundred numbers below 10 stay far under this
EXACT = dict(low=0, high=SAME, embedded=(0, SAME))  # whatever the text
torch.set_num_threads(1)  # these matrices are too small to be shared out
train, dev = splits()  # each (N, 3) letters, (N,) the next


def start(hidden, draw, dtype=torch.float32):
    """The parameters, drawn in the lecture's order. Small, but not zero: a zero hides mistakes."""
    shapes = (VOCAB, EMB), (EMB * CONTEXT, hidden), (hidden,), (hidden, VOCAB), (VOCAB,)
    C, W1, b1, W2, b2 = (torch.randn(shape, generator=draw) for shape in shapes)
    other = torch.Generator().manual_seed(1)  # of BatchNorm's; the lecture's had no seed
    gain, bias = (0.1 * torch.randn((1, hidden), generator=other) for _ in range(2))
    return [p.to(dtype) for p in (C, W1 * KAIMING, b1 * 0.1, W2 * 0.1, b2 * 0.1, 1 + gain, bias)]


# %% Forward, in steps so small that each has one derivative
# Between the letters and the loss stand 26 tensors. b1 is of no use before BatchNorm, which takes
# the mean off again: its gradient must come out as 0.
def forward(parameters, before, after):
    """Every tensor on the way, by name, in order."""
    C, W1, b1, W2, b2, gain, bias = parameters
    n, v = len(before), dict(C=C, W1=W1, b1=b1, W2=W2, b2=b2, gain=gain, bias=bias)
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
# is broadcast; a tensor, or a letter's vector, that is used twice gets two gradients, added; and of
# a product A B the gradients are dC B^T and A^T dC, the only ones whose shapes fit.
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
    d["logits"] = d["norm"] + F.one_hot(v["logits"].argmax(1), VOCAB) * d["max"]
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
    d["C"] = torch.zeros_like(v["C"]).index_add_(0, before.flatten(), d["emb"].view(-1, EMB))
    return d


for dtype, limit in ((torch.float32, 2e-8), (torch.float64, SAME)):  # fp64 goes on below
    draw = torch.Generator().manual_seed(SEED)
    parameters = start(64, draw, dtype)
    course.always("parameters", sum(p.numel() for p in parameters), 4137, 4137, "4,137")
    rows = torch.randint(0, len(train[1]), (BATCH,), generator=draw)
    before, after = train[0][rows], train[1][rows]
    values = forward([p.requires_grad_() for p in parameters], before, after)
    slopes = torch.autograd.grad(values["loss"], list(values.values()))
    judge = dict(zip(values, slopes, strict=True))
    values = {name: value.detach() for name, value in values.items()}
    ours = backward(values, before, after)
    course.figure("loss", values["loss"].item(), 3.330, 3.350, "3.3377, BatchNorm unseeded")
    course.always("gradients by hand", len(ours), 26, 26, "26")
    band = dict(low=0, high=limit, embedded=(0, limit))
    error = max((ours[name] - judge[name]).abs().max() for name in ours)
    course.figure(f"furthest from autograd, {str(dtype)[6:]}", error, **band, lecture="0 in fp32")
    course.figure("gradient of b1, which is of no use", ours["b1"].abs().max(), **band)

# %% Softmax and cross-entropy in one go
# Eight of the steps above are dlogits = (p - onehot) / n: every row pulls its right letter up and
# pushes the others down by what they were believed, and a row's pulls and pushes cancel. This and
# the next closed forms are the exercises, so their code comes from lessons/solutions/e05.py.
dlogits = e05.cross_entropy_backward(values["logits"], after)
error = (dlogits - judge["logits"]).abs().max()
course.figure("softmax minus one-hot", error, **EXACT, lecture="5.1e-9 in fp32")
error = dlogits.sum(1).abs().max()
course.figure("a row of dlogits sums to", error, **EXACT, lecture="1.4e-9 in fp32")

# %% BatchNorm in one line
# And the nine from hprebn to hpreact, with xhat for raw, are
#     dx = gain inv / n (n dy - sum dy - n / (n - 1) xhat sum(dy xhat)):
# what would shift or stretch the column is taken out, for the normalisation undoes it anyway. With
# 1 for n / (n - 1), the biased variance's, it is off by 3e-5: a tolerance of 1e-4 lets it pass.
dy, xhat, gain, inv = judge["hpreact"], values["raw"], values["gain"], values["inv"]
dx, right = e05.batchnorm_backward(dy, xhat, gain, inv), judge["hprebn"]
course.figure("BatchNorm in one line", (dx - right).abs().max(), **EXACT, lecture="9.3e-10 in fp32")
biased = dx + gain * inv * xhat * (dy * xhat).mean(0) / (BATCH - 1)  # n / (n - 1) - 1 is put back
course.figure("the same, biased", (biased - right).abs().max(), 3.0e-5, 4.0e-5)

# %% LayerNorm: the same line, turned by 90 degrees
# GPT-2 normalises rows, with the biased variance, so the factor is gone; and its gain differs
# along the row, so it is multiplied in first. With g = dy gain and means along the row,
#     dx = inv (g - mean(g) - xhat mean(g xhat)).
x, dy = torch.randn((2, 6, 48), generator=draw, dtype=torch.float64)
weight, bias = torch.randn((2, 48), generator=draw, dtype=torch.float64)
dx, dweight, _ = e05.layernorm_backward(dy, x, weight)
reference.layer_norm(x.requires_grad_(), weight.requires_grad_(), bias)[1].backward(dy)
course.figure("LayerNorm: dx", (dx - x.grad).abs().max(), **EXACT)
course.figure("LayerNorm: dweight", (dweight - weight.grad).abs().max(), **EXACT)

# %% Attention: one number a row
# Softmax's backward pass needs sum_j p_ij dp_ij. With dp = do v^T and o = p v that is delta_i =
# sum_d o_id do_id, and not a row of the (T, T) matrix is needed: flash attention lives on it.
T, D = 12, 8
qkv = torch.randn((1, T, 3 * D), generator=draw, dtype=torch.float64).requires_grad_()
o, do = reference.attention(qkv, n_head=1), torch.randn((T, D), generator=draw).double()
o.backward(do[None])
q, k, v = qkv.detach()[0].split(D, 1)  # each (T, D)
p = (q @ k.T / D**0.5 + torch.full((T, T), -torch.inf).triu(1)).softmax(1)  # (T, T)
ds = p * (do @ v.T - e05.attention_delta(o[0].detach(), do)[:, None])
dqkv = torch.cat([ds @ k / D**0.5, ds.T @ q / D**0.5, p.T @ do], 1)
course.figure("attention: dq, dk, dv", (dqkv - qkv.grad[0]).abs().max(), **EXACT)

# %% Training without autograd
# Lesson 4's network learns by these very lines, the step() of lessons/stacked.py. Without b1.
FULL = "--full" in sys.argv
steps, slow_from = (200_000, 100_000) if FULL else (50_000, 40_000)
net = Net([(1.0, 1.0, 1.0, 1.0)], batchnorm=True)
parameters = start(200, net.draw.manual_seed(SEED))
course.always("parameters", sum(p.numel() for p in parameters), 12297, 12297, "12,297")
views = [p.view(1, -1, p.shape[-1]) for p in parameters]  # 1 network
net.C, net.W1, _, net.W2, net.b2, net.gain, net.b1 = views  # BatchNorm's bias for b1
seen = net.train(train, steps, slow_from)
course.figure("first loss", seen[0][1], 3.6, 4.05, "3.7805, unseeded")
BANDS = ((2.067, 2.076), (2.108, 2.119)) if FULL else ((2.10, 2.13), (2.125, 2.155))
course.figure(f"train, {steps:,} steps", net.losses(train)[0], *BANDS[0], "2.0705 after 200,000")
course.figure(f"dev, {steps:,} steps", net.losses(dev)[0], *BANDS[1], "2.1099 after 200,000")

# %% The door: the same lines on a GPU
# `_dkdv_step` of kernels/attention.py holds ds = p (dp - delta), dk = ds^T q and dv = p^T do, for a
# tile of keys and a tile of queries. The exercise leaves them out; here they run as they stand, on
# Triton's interpreter, against fp64. fp32 rounds by 6e-8; sums of some hundred stay below 1e-6.
if importlib.util.find_spec("triton"):
    from kernels import attention
    from lessons.checks.c05 import dkdv_errors
    for name, error in dkdv_errors(attention._dkdv_step).items():
        course.figure(f"kernels/attention.py: {name}", error, 0, 1e-6, embedded=(0, 1e-6))
else:
    print("The door needs Triton, which there is for Linux: pip install triton")
