"""The runs that have a name: `python train_gpt2.py NAME`. Each is a TrainConfig of train_gpt2.py.

Hyper-parameters of llm.c's scripts/run_gpt2_{124M,350M,774M,1558M}.sh and run_gpt3_125M.sh; shapes
of GPT-2 (table 2) and GPT-3 (arXiv 2005.14165, table 2.1). micro_batch is what 80 GB hold.
shakespeare-char: nanoGPT's config/train_shakespeare_char.py, and its README for a CPU.
speedrun: modded-nanogpt's track 3, entry 36, with the skip and the momentum warm-up of record 9.
Other widths C: AdamW's rates times (C / 768)^-0.5 (nanochat).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from data.dataset import DataConfig
from eval.evaluator import EvalConfig
from model.gpt2 import GPTConfig
from model.optim import OptimConfig
from model.saving import SavingConfig
from model.training import ComputeConfig

Config = TypeVar("Config")
SHAKESPEARE = DataConfig(dir="", text="shakespeare", vocab="char")
# The GELU is nanoGPT's; its missing biases aren't: GPT-2 has them everywhere, and so has this.
NANOGPT_SMALL = GPTConfig(
    n_layer=6, n_head=6, n_embd=384, n_ctx=256, n_vocab=65, gelu="exact", dropout=0.2)
NANOGPT_CPU = GPTConfig(n_layer=4, n_head=4, n_embd=128, n_ctx=64, n_vocab=65, gelu="exact")
SPEEDRUN = OptimConfig(
    optimizer="muon", schedule="wsd", decay_ratio=0.7, lr=0.025, warmup_steps=0, weight_decay=0.05,
    beta1=0.8, beta2=0.95, eps=1e-10, clip=0)


def speedrun(lr: float, C: int) -> OptimConfig:
    """The speedrun's optimizer at another width, with this rate of Muon's."""
    rates = {name: round(getattr(SPEEDRUN.muon, name) * (C / 768) ** -0.5, 5)
             for name in ("embed_lr", "head_lr", "vector_lr")}
    return replace(SPEEDRUN, lr=lr, muon=replace(SPEEDRUN.muon, **rates))


def presets(config: Callable[..., Config]) -> dict[str, Config]:
    """Name -> run. config: TrainConfig, whose defaults are GPT-2 124M's."""
    return {
        "demo": config(  # the best of what was tried for four minutes on two CPU cores
            name="demo", steps=900, batch_tokens=1024, micro_batch=8,
            model=GPTConfig(n_layer=4, n_head=2, n_embd=128, n_ctx=128),
            optim=OptimConfig(lr=6e-3, warmup_steps=120, weight_decay=0.02, beta2=0.995),
            data=DataConfig(dir=""), saving=SavingConfig(save_every=450),
            evaluation=EvalConfig(eval_every=225, prompt="In the beginning", hellaswag="off")),
        "gpt2-124m": config(),
        "gpt2-350m": config(name="gpt2-350m", steps=60_000, micro_batch=32,
            model=GPTConfig(n_layer=24, n_head=16, n_embd=1024), optim=OptimConfig(lr=3e-4)),
        "gpt2-774m": config(name="gpt2-774m", steps=286_102, micro_batch=16,
            model=GPTConfig(n_layer=36, n_head=20, n_embd=1280), optim=OptimConfig(lr=2.5e-4)),
        "gpt2-1558m": config(name="gpt2-1558m", steps=32_000, batch_tokens=2**20, micro_batch=8,
            model=GPTConfig(n_layer=48, n_head=25, n_embd=1600), optim=OptimConfig(final_lr=0.1)),
        "gpt3-125m": config(name="gpt3-125m", steps=572_204, micro_batch=32,
            model=GPTConfig(n_ctx=2048), optim=OptimConfig(final_lr=0.1)),
        "shakespeare-char": config(  # published: 1.4697, the best of its estimates
            name="shakespeare-char", steps=5_000, batch_tokens=64 * 256, micro_batch=64,
            model=NANOGPT_SMALL, data=SHAKESPEARE, saving=SavingConfig(save_every=250),
            optim=OptimConfig(lr=1e-3, final_lr=0.1, warmup_steps=100, beta2=0.99),
            evaluation=EvalConfig(eval_every=250, prompt="ROMEO:", hellaswag="off")),
        "shakespeare-char-cpu": config(  # published: 1.88 in about three minutes
            name="shakespeare-char-cpu", steps=2_000, batch_tokens=12 * 64, micro_batch=12,
            model=NANOGPT_CPU, data=SHAKESPEARE, saving=SavingConfig(save_every=1_000),
            optim=OptimConfig(lr=1e-3, final_lr=0.1, warmup_steps=100, beta2=0.99),
            compute=ComputeConfig(dtype="fp32"),
            evaluation=EvalConfig(eval_every=250, prompt="ROMEO:", hellaswag="off")),
        "speedrun": config(  # published: 3.2787 on FineWeb, the mean of ten runs of its recipe
            name="speedrun", steps=3_250, optim=SPEEDRUN,
            model=GPTConfig(arch="speedrun", n_head=6)),
        "speedrun-350m": config(  # a guess: 2.92 was reached with 3.9 B tokens of 64 K context
            name="speedrun-350m", steps=12_000, micro_batch=32, optim=speedrun(0.02, 1024),
            model=GPTConfig(arch="speedrun", n_layer=24, n_head=8, n_embd=1024)),
        "speedrun-1.5b": config(  # 2.7297 was published for a network much like it
            name="speedrun-1.5b", steps=20_344, batch_tokens=480 * 1024, micro_batch=8,
            optim=speedrun(0.007, 1536),
            model=GPTConfig(arch="speedrun", n_layer=52, n_head=12, n_embd=1536)),
        "speedrun-demo": config(  # demo's size, data and steps
            name="speedrun-demo", steps=900, batch_tokens=1024, micro_batch=8,
            model=GPTConfig(arch="speedrun", n_layer=4, n_head=2, n_embd=128, n_ctx=128),
            optim=speedrun(0.02, 128), data=DataConfig(dir=""), saving=SavingConfig(save_every=450),
            evaluation=EvalConfig(eval_every=225, prompt="In the beginning", hellaswag="off")),
    }
