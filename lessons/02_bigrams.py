"""Lesson 2: which letter follows which, counted and learned; the loss that both are measured by.

    python lessons/02_bigrams.py

Needs names.txt (lessons/course.py fetches it). Leaves a picture in runs/lessons/02. Same as lesson
1: slopes, steps downhill. Different: rows of a table instead of scalars, PyTorch's gradients, and a
loss in nats a letter. Figures: 2.4540 by counting, the same by learning; on names held out 2.4530
with pairs of letters, 2.2223 with three, 2.1018 with four. Ten seconds.
"""

# %% Names as numbers
# 0 is the dot that begins and ends a name, a to z are 1 to 26.
import math
import random
import sys

import matplotlib
import torch
import torch.nn.functional as F

sys.path.insert(0, "..")  # for a notebook, which runs in its own folder
sys.path.insert(0, ".")  # for a program, which runs in the repository's root
from data import corpus
from eval.report.floor import bigram_loss
from lessons import course

matplotlib.use("agg")
import matplotlib.pyplot as plt

LETTERS = ".abcdefghijklmnopqrstuvwxyz"
V = len(LETTERS)
names = course.names()


def examples(names: list[str], context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """X (N, context), the letters before each letter, with dots before the first; and Y (N)."""
    rows, targets = [], []
    for name in names:
        row = [0] * context
        for letter in [LETTERS.index(c) for c in name] + [0]:
            rows.append(row)
            targets.append(letter)
            row = row[1:] + [letter]
    return torch.tensor(rows), torch.tensor(targets)


X, Y = examples(names, 1)
course.figure("pairs of neighbours", len(Y), 228_146, 228_146, "228146", (96_130, 96_130))

# %% Counting
# counts[x, y]: how often y follows x. The most frequent pair is n and the end.
counts = torch.bincount(X[:, 0] * V + Y, minlength=V * V).view(V, V)  # (27, 27)
for pair in ("n.", "a.", "an"):
    seen = counts[LETTERS.index(pair[0]), LETTERS.index(pair[1])].item()
    right = {"n.": 6763, "a.": 6640, "an": 5438}[pair]
    course.figure(f"count of {pair}", seen, right, right, lecture=f"{right}")
course.figure("pairs that never occur, of 729", (counts == 0).sum().item(), 102, 102)
drawing, axes = plt.subplots(figsize=(8, 8))
axes.imshow(counts, cmap="Blues")
for i in range(V):
    for j in range(V):
        axes.text(j, i, f"{LETTERS[i]}{LETTERS[j]}\n{counts[i, j]}", ha="center", va="center",
                  fontsize=4, color="white" if counts[i, j] > 3000 else "black")
axes.axis("off")
course.picture(drawing, "counts")

# %% From counts to probabilities
# p[x, y] = counts[x, y] / sum over y: each ROW is divided by its own sum, which keepdim leaves as
# a column (27, 1). As (27,) it would be taken for a row, and columns would be divided instead,
# without a word of complaint.
p = counts / counts.sum(1, keepdim=True)  # (27, 27) / (27, 1)
g = torch.Generator().manual_seed(2147483647)
for _ in range(5):
    letter, name = 0, ""
    while not name or letter:
        letter = torch.multinomial(p[letter], 1, generator=g).item()
        name += LETTERS[letter]
    print("sampled:", name[:-1])

# %% One number for a model
# L = -mean ln p(y | x), nats a letter: ln 27 for a model that knows nothing, 0 for one that knows
# all. A pair that was never counted has p = 0 and costs infinity, so every count gets `a` more.


def likelihood(counts: torch.Tensor, x: torch.Tensor, y: torch.Tensor, a: float) -> float:
    """-mean ln p(y | x) by counts (contexts, 27) with a added to each, in fp64."""
    p = (counts.double() + a) / (counts.sum(1, keepdim=True) + a * V)
    return -p[x, y].log().mean().item()


course.figure("knowing nothing, ln 27", math.log(V), 3.2958, 3.2958, "3.2958", (3.2958, 3.2958))
course.figure("pairs counted on all names", likelihood(counts, X[:, 0], Y, 0), 2.45401, 2.45401,
              "2.4540", embedded=(2.4905, 2.4905))
course.figure("the same, 1 added to each count", likelihood(counts, X[:, 0], Y, 1), 2.45458,
              2.45458, lecture="2.4546")
x, y = examples(["andrejq"], 1)
course.figure("andrejq, in which q follows j", likelihood(counts, x[:, 0], y, 1), 3.4834, 3.4834,
              lecture="3.4834")

# %% Longer memory, and names held out
# With n - 1 letters before, the table has 27^(n-1) rows, and soon more rows than names: it learns
# them by heart. So the names are shuffled and split: 80 % to count, 10 % (dev) to choose `a` by,
# 10 % (test) to report once. Counting four letters sets the mark that lesson 3 has to beat.
random.seed(42)
random.shuffle(names)
n1, n2 = int(0.8 * len(names)), int(0.9 * len(names))
splits = {"train": names[:n1], "dev": names[n1:n2], "test": names[n2:]}
right = {2: (2.4543, 2.4530, 2.4580), 3: (2.1914, 2.2223, 2.2235), 4: (1.9187, 2.1018, 2.1044)}
words = {2: (2.4911, 2.4972, 2.4913), 3: (2.1508, 2.2235, 2.2184), 4: (1.8070, 2.0889, 2.0949)}
for n in (2, 3, 4):
    powers = V ** torch.arange(n - 2, -1, -1)  # a context as one number: 27 x first + second ...
    data = {}
    for split, some in splits.items():
        before, after = examples(some, n - 1)
        data[split] = before @ powers, after
    x, y = data["train"]
    table = torch.bincount(x * V + y, minlength=V**n).view(-1, V)  # (27^(n-1), 27)
    tried = {a: likelihood(table, *data["dev"], a) for a in (0.01, 0.03, 0.1, 0.2, 0.3, 1.0, 3.0)}
    best = min(tried, key=tried.get)
    for split, figure, word in zip(splits, right[n], words[n], strict=True):
        loss = likelihood(table, *data[split], best)
        course.figure(f"{n} letters in a row, a = {best}, {split}", loss, figure, figure,
                      embedded=(word, word))

# %% The same table, learned
# A network of one layer: one-hot(x) @ W are the logits; exp and a division by the row's sum make
# them probabilities. A one-hot row times W is nothing but a row of W, so W[x] does it.
W = torch.randn(V, V, generator=torch.Generator().manual_seed(2147483647), requires_grad=True)
x, y = examples(["emma"], 1)
assert torch.equal(F.one_hot(x[:, 0], V).float() @ W, W[x[:, 0]])  # (5, 27), to the last bit
for step, right in enumerate((3.7693, 3.7492, 3.7292, 3.7092, 3.6892)):
    logits = W[x[:, 0]]  # (5, 27)
    loss = F.cross_entropy(logits, y)
    course.figure(f"emma, five pairs, step {step}", loss.item(), right, right, f"{right}",
                  embedded=(right, right))
    (slope,) = torch.autograd.grad(loss, W)
    W.data -= 0.1 * slope

# %% Until it is the counted one
# The loss is convex in W, and its slope is p x n(row) - n: zero exactly where p are the counted
# shares. The pairs can be put together, so a step costs 729 cells and not 182,625 rows, and 7,000
# steps a moment. (The few hundred steps of the lecture end at 2.462, not at the counts.)
x, y = examples(splits["train"], 1)
n = torch.bincount(x[:, 0] * V + y, minlength=V * V).view(V, V).float()  # (27, 27)
W = torch.randn(V, V, generator=torch.Generator().manual_seed(2147483647))
for _ in range(7000):
    W -= 50 * (W.softmax(1) * n.sum(1, keepdim=True) - n) / n.sum()
learned = -(n * W.log_softmax(1)).sum().item() / n.sum().item()
course.figure("learned in 7,000 steps, train", learned, 2.4542, 2.4545,
              embedded=(2.4908, 2.4911))
apart = (W.softmax(1) - n / n.sum(1, keepdim=True)).abs().max().item()
course.figure("largest difference from the counted table", apart, 0, 3e-3, embedded=(0, 3e-3))

# %% The door: eval/report/floor.py
# Counting is a floor for any language model: one that is above it hasn't learnt which token follows
# which. `python -m eval.report RUN` prints it for every run on a text. Here it is for the demo of
# train_gpt2.py, with GPT-2's 50,257 tokens in place of 27 letters: `make train` ends at 4.21.
train, val = corpus.embedded()  # tokens, uint16
floor = bigram_loss(train, val[:46_081], 50_257)
course.figure("pairs of tokens counted, the demo's val text", floor, 4.3281, 4.3281,
              embedded=(4.3281, 4.3281))
