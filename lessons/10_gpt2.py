"""Lesson 10: GPT-2, from an empty file to the same losses as train_gpt2.py.

    python lessons/10_gpt2.py
    torchrun --standalone --nproc_per_node=2 lessons/10_gpt2.py      # the ranks' cell alone

Needs tiny shakespeare. Figures: 124,439,808 parameters; a first loss near ln 50257 = 10.82; one
batch learned by heart; 1, 2 and 4 ranks with the same losses to 1e-12, and other losses with the
fault that the lecture was filmed with; logits and losses of this house to 1e-12. A minute on one
core, most of which nine processes take to start.
Same as lesson 7, the transformer, on lesson 9's tokens; different: GPT-2's names, sizes and first
weights, and a step that any number of ranks shares.
"""

# %% The start
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

sys.path.insert(0, "..")  # for a notebook, which runs in its own folder
sys.path.insert(0, ".")  # for a program, which runs in the repository's root
from data.loader import DataConfig, Loader, open_data
from data.tokenizer import VOCAB, encode
from launch.errors import exit_process
from lessons import course
from model import gpt2, optim
from model.gpt2 import GPTConfig


def for_any_text(what: str, value: float, low: float, high: float) -> None:
    """A figure that has one band, whether the text is Shakespeare's or stands in for it."""
    course.figure(what, value, low, high, embedded=(low, high))


# %% The network
# Lesson 7's block, with OpenAI's names, biases everywhere and the tanh GELU. The head is the
# embedding once more (tied): tokens that mean alike should be read and predicted alike, and at
# 124M it saves 38.6 million parameters.


class Block(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x))."""

    def __init__(self, C: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        D = C // self.heads
        qkv = self.attn["c_attn"](self.ln_1(x))  # (B, T, 3C)
        q, k, v = qkv.view(B, T, 3, self.heads, D).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(later, -math.inf)  # (B, H, T, T)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        x = x + self.attn["c_proj"](y)
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")  # (B, T, 4C)
        return x + self.mlp["c_proj"](hidden)


class GPT(nn.Module):
    """(B, T) tokens -> (B, T, V) logits, or with targets (B, T) the mean loss in nats."""

    def __init__(self, size: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(size.n_vocab, size.n_embd)
        self.wpe = nn.Embedding(size.n_ctx, size.n_embd)
        self.h = nn.ModuleList(Block(size.n_embd, size.n_head) for _ in range(size.n_layer))
        self.ln_f = nn.LayerNorm(size.n_embd)
        # N(0, 0.02) and no bias. What writes into the stream is divided by the root of how many
        # do, two a block, so that the sum has the same variance at any depth.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                writers = 2 * size.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(writers))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]  # (B, T, C)
        for block in self.h:
            x = block(x)
        logits = self.ln_f(x) @ self.wte.weight.T  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# %% The optimizer and its learning rate
# AdamW with GPT-3's numbers. Weight decay pulls on matrices and embeddings; on biases and
# LayerNorms, which have one axis, it would only shift. The rate rises for `warmup` steps, then
# falls along half a cosine to a share `final` of its peak.


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


def get_lr(step: int, steps: int, warmup: int, peak: float = 6e-4, final: float = 0.1) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))


# %% Gradients of a large batch
# A batch that doesn't fit is taken in micro-batches, whose gradients add up. Each loss is a mean
# over its own tokens, so each is divided by their number: the sum is the mean over all. With
# several ranks the gradients are averaged too, and once is enough: in the last micro-step.


def accumulate(model: nn.Module, micro_batches: Tensor) -> Tensor:
    """Adds the gradients of (micro-steps, B, T + 1) tokens up; their mean loss on this rank."""
    mean = torch.zeros(())
    for i, tokens in enumerate(micro_batches):  # (B, T + 1)
        more = i + 1 < len(micro_batches)
        with model.no_sync() if more and isinstance(model, DDP) else nullcontext():
            loss = model(tokens[:, :-1], tokens[:, 1:]) / len(micro_batches)
            loss.backward()
        mean = mean + loss.detach()
    return mean


def accumulate_as_filmed(model: nn.Module, micro_batches: Tensor) -> Tensor:
    """The same as the lecture first had it. One line is in the wrong place: an exercise."""
    mean = torch.zeros(())
    for i, tokens in enumerate(micro_batches):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / len(micro_batches)
        model.require_backward_grad_sync = i + 1 == len(micro_batches)
        loss.backward()
        mean = mean + loss.detach()
    return mean


def train(model, batches, rates, gradients=accumulate) -> list[float]:
    """A step for each batch; the losses before them."""
    optimizer, losses = make_optimizer(model), []
    for micro_batches, lr in zip(batches, rates, strict=True):
        loss = gradients(model, micro_batches)
        if isinstance(model, DDP):
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# %% One rank of several
# torchrun starts this file once a rank. All ranks begin with the same weights and take their slice
# of the same batch: step s has sequences 8 s to 8 s + 7 of the text, whoever computes them. fp64,
# so that what isn't rounding shows.
torch.set_num_threads(1)
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_ctx=16)
STEPS, SEQUENCES = 4, 8
RATES = [get_lr(step, STEPS, warmup=2) for step in range(STEPS)]


def share_of(rank: int, ranks: int, text: str) -> list[Tensor]:
    """A rank's batches, each (2 micro-steps, 4 / ranks sequences, T + 1)."""
    T = SMALL.n_ctx
    tokens = torch.tensor(encode(text[:9000])[: STEPS * SEQUENCES * T + 1])
    rows = tokens.unfold(0, T + 1, T)  # sequences begin every T tokens: (STEPS x 8, T + 1)
    mine = rows.view(STEPS, ranks, SEQUENCES // ranks, T + 1)[:, rank]  # (STEPS, 8 / ranks, T + 1)
    return list(mine.unflatten(1, (2, -1)))


def small_model() -> GPT:
    torch.manual_seed(1337)
    return GPT(SMALL).double()


shakespeare = course.shakespeare()
if "RANK" in os.environ:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for gradients in (accumulate, accumulate_as_filmed):
        model = DDP(small_model())
        losses = train(model, share_of(rank, ranks, shakespeare), RATES, gradients)
        spread = torch.stack([model.module.wpe.weight, -model.module.wpe.weight]).detach()
        dist.all_reduce(spread, op=dist.ReduceOp.MAX)  # largest and smallest weight of all ranks
        if rank == 0:
            print(json.dumps([losses, spread.sum(0).max().item()]), flush=True)
    exit_process(0)

# %% What it is before it has learned
# Nothing is preferred yet, so the loss is near ln V = 10.8249. Not at it: LayerNorm's output has
# length sqrt(C), and times weights of 0.02 that makes logits of variance C 0.02^2, whose uneven
# chances cost half of it: ln V + C 0.02^2 / 2 = 10.98 at C = 768. So it is on random tokens. On
# text it's less: with a tied head each token foretells itself, and line breaks do come in pairs.
torch.manual_seed(1337)
model = GPT(GPTConfig())
parameters = sum(p.numel() for p in model.parameters())
for_any_text("parameters, head tied", parameters, 124_439_808, 124_439_808)
for_any_text("parameters, head its own", parameters + VOCAB * 768, 163_037_184, 163_037_184)
tokens = encode(shakespeare)
course.figure("tiny shakespeare in tokens", len(tokens), 338_025, 338_025, "338,025",
              embedded=(274_698, 274_698))
batch = torch.tensor(tokens[: 4 * 32 + 1]).unfold(0, 33, 32)  # (B, T + 1)
noise = torch.randint(VOCAB, (4, 33))
with torch.no_grad():
    first, of_noise = (model(rows[:, :-1], rows[:, 1:]).item() for rows in (batch, noise))
# A mean of 128 losses that scatter by 0.55: 0.05, and a band of twice that.
for_any_text("first loss at 124M, random tokens", of_noise, 10.88, 11.08)
for_any_text("first loss at 124M, text", first, 10.6, 11.08)
del model

# %% One batch by heart
# Before anything larger: can it learn four rows of 32 tokens? If not, some gradient doesn't arrive.
# It's no skill: it has seen the answers.
torch.manual_seed(1337)
model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128, n_ctx=32))
losses = train(model, [batch[None]] * 50, [3e-3] * 50)
for_any_text("one batch, first loss", losses[0], 10.7, 10.95)
for_any_text("one batch, after 50 steps", losses[-1], 0.002, 0.1)

# %% The schedule
# The lecture's: 715 steps up to 6e-4, then down to a tenth at step 19,073.
lecture = optim.OptimConfig(lr=6e-4, warmup_steps=715, final_lr=0.1)
apart = max(abs(get_lr(step, 19_073, 715) - optim.get_lr(step, 19_073, lecture))
            for step in range(19_073))
for_any_text("largest difference from model/optim.py", apart, 0, 1e-15)

# %% Accumulated or at once
# Two micro-batches of four against one of eight: a sum in another order, some 1e-17 in fp64.
rows = share_of(0, 1, shakespeare)[0]  # (2, 4, T + 1)
gradients = []
for parts in (rows, rows.view(1, 8, -1)):
    model = small_model()
    accumulate(model, parts)
    gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
apart = (gradients[0] - gradients[1]).abs().max().item()
for_any_text("2 x 4 against 1 x 8, largest difference", apart, 0, 1e-14)

# %% 1, 2 and 4 ranks
# The batch is the same, so the run is: ranks change the order of sums. As filmed, nobody complains
# and the losses fall; but the ranks train models that drift apart, and none is the one of one rank.
# (Reported for the lecture's own run: validation loss 4.88 where 4.15 was right, at step 1,000.)
ROOT = Path(course.__file__).parent.parent
alone = train(small_model(), share_of(0, 1, shakespeare), RATES)
print("1 rank:", alone)
# The ranks need no network: either the text is here by now, or it can't be had.
environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
for ranks in (2, 4):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={ranks}", ROOT / "lessons" / "10_gpt2.py"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    (losses, spread), (filmed, filmed_spread) = map(json.loads, done.stdout.splitlines())
    apart = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
    filmed_apart = max(abs(a - b) for a, b in zip(filmed, alone, strict=True))
    print(f"{ranks} ranks: {losses}, as filmed {filmed}")
    for_any_text(f"{ranks} ranks, losses against 1", apart, 0, 1e-12)
    for_any_text(f"{ranks} ranks, weights of one against another", spread, 0, 1e-12)
    for_any_text(f"{ranks} ranks as filmed, losses against 1", filmed_apart, 0.002, 0.2)
    for_any_text(f"{ranks} ranks as filmed, weights apart", filmed_spread, 0.0005, 0.02)

# %% The door: model/gpt2.py
# The names are the same, so weights load. There the vocabulary is padded to 50,304 rows, which
# GPUs like better; padding is zero, and its logits are cut off.
mine, theirs = small_model(), gpt2.GPT(SMALL).double()
weights = mine.state_dict()
padding = torch.zeros(SMALL.padded_vocab - VOCAB, SMALL.n_embd)
theirs.load_state_dict(weights | {"wte.weight": torch.cat([weights["wte.weight"], padding])})
with torch.no_grad():
    apart = (mine(rows[0, :, :-1]) - theirs(rows[0, :, :-1])).abs().max().item()
for_any_text("logits against model/gpt2.py", apart, 0, 1e-12)

# %% The door: train_gpt2.py
# A run of it, at this size and in fp64. From its first weights and its batches (shuffled, which
# the lecture's aren't) the steps above have to give the losses of its metrics.jsonl. What the
# lecture does for speed on a GPU (TF32, bf16, compile, flash attention) is in there, and changes
# roundings only.
folder = course.OUT / "10"
shutil.rmtree(folder / "run", ignore_errors=True)
folder.mkdir(parents=True, exist_ok=True)
text = folder / "text.txt"
text.write_text(shakespeare)
command = f"""train_gpt2.py gpt2-124m --out_dir {folder} --name run --steps {STEPS} --dtype fp64
    --model.n_layer 2 --model.n_head 2 --model.n_embd 64 --model.n_ctx 16 --batch_tokens 128
    --micro_batch 4 --optim.warmup_steps 2 --kernels torch --val_tokens 160 --hellaswag off
    --eval_every {STEPS} --save_every {STEPS} --data.text {text}"""
print("python", command)
script, *flags = command.split()
subprocess.run([sys.executable, ROOT / script, *flags], stdout=subprocess.DEVNULL, check=True)
rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
theirs = [row["train_loss"] for row in rows if "train_loss" in row]
model = GPT(SMALL).double()
model.load_state_dict(load_file(folder / "run/checkpoints/step_00000000/model.safetensors"))
loader = Loader(open_data(DataConfig(text=str(text))).train, T=SMALL.n_ctx,
                batch_tokens=128, micro_batch=4, seed=1337)
batches = [loader.get_batch(step) for step in range(STEPS)]  # each (2, 4, T + 1)
loader.close()
mine = train(model, batches, [get_lr(step, STEPS, 2, final=0) for step in range(STEPS)])
apart = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
print("losses:", mine)
for_any_text("losses against train_gpt2.py's", apart, 0, 1e-12)
