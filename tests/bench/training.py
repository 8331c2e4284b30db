"""Training: tokens/s of one step after the other, forward to update, on the same tokens.

    python -m tests.bench training
"""

from functools import partial

import torch

from launch.world import choose_dtype, init_distributed
from model.config import ComputeConfig, GPTConfig, OptimConfig
from model.gpt2 import GPT
from model.size import flops_per_token
from model.train_state import TrainState
from model.training import build_train_state
from tests.bench import limits, plain
from tests.bench.pairs import Done, Row, Work

CPU = torch.device("cpu")
LARGE = GPTConfig()
SMALL = GPTConfig(n_layer=4, n_head=4, n_embd=256, n_ctx=128)
QUICK = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=64, n_vocab=500)
# Of two losses near 11 after few steps: fp32's rounding over 1e8 products is far below 1e-3; bf16
# products are off by 2^-9 each, and what they make of a loss was 0.01 and less.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}


def rows(quick: bool = False) -> list[Row]:
    """The table's rows of training."""
    auto = choose_dtype("auto", CPU)
    if quick:
        return [row("training, quick", QUICK, 2, 32, "fp32")]
    made = [row(f"training 124M, B=4 T=256, {auto}", LARGE, 4, 256, auto),
            row(f"training 124M, B=1 T=1024, {auto}", LARGE, 1, 1024, auto)]
    if auto != "fp32":
        made.append(row("training 124M, B=4 T=256, fp32", LARGE, 4, 256, "fp32"))
    return [*made, row(f"training 4 x 256, B=16 T=128, {auto}", SMALL, 16, 128, auto)]


def row(name: str, config: GPTConfig, B: int, T: int, dtype: str) -> Row:
    """One of them: the plain way is always in fp32."""
    flops = flops_per_token(GPTConfig(config.n_layer, config.n_head, config.n_embd, T,
                                      config.n_vocab))
    limit = partial(limits.products, B * T, config.n_embd, 4 * config.n_embd, dtype, flops)
    return Row(name, "tokens", partial(plain_steps, config, B, T),
               partial(our_steps, config, B, T, dtype), limit, TOLERANCE[dtype])


def tokens(config: GPTConfig, B: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) inputs and targets: the same for both."""
    drawn = torch.randint(config.n_vocab, (B, T + 1), generator=torch.Generator().manual_seed(7))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def first_weights(config: GPTConfig) -> dict[str, torch.Tensor]:
    """By name: the same for both."""
    torch.manual_seed(1)
    return GPT(config).state_dict()


def plain_steps(config: GPTConfig, B: int, T: int) -> Work:
    """The plain way."""
    model = plain.PlainGPT(config)
    model.load_state_dict(first_weights(config))
    optimizer = plain.optimizer_of(model)
    inputs, targets = tokens(config, B, T)
    return lambda: Done(B * T, plain.step(model, optimizer, inputs, targets))


def our_steps(config: GPTConfig, B: int, T: int, dtype: str) -> Work:
    """What train_gpt2.py does in a step."""
    world = init_distributed()
    state, _ = build_train_state(
        config, OptimConfig(), ComputeConfig(), dtype, 1, "", None, world)
    state.model.module.load_state_dict(first_weights(config))
    for group in state.optimizer.param_groups:
        group["lr"] = 6e-4
    return step_of(state, *tokens(config, B, T))


def step_of(state: TrainState, inputs: torch.Tensor, targets: torch.Tensor) -> Work:
    """The training step of train_gpt2.py, on these (B, T) inputs and targets."""
    model, optimizer, _ = state

    def step() -> Done:
        with model.gradient_sync(True):
            loss = model(inputs, targets, "sum") / targets.numel()
            loss.backward()
        model.clip_gradients(model.gradient_norm(), 1.0)
        model.optimizer_step(optimizer)
        model.zero_grad()
        return Done(targets.numel(), loss.item())

    return step


def our_first_step(config: GPTConfig, B: int, T: int, dtype: str) -> None:
    """A new model and its first step (tests/bench/startup.py)."""
    state, _ = build_train_state(
        config, OptimConfig(), ComputeConfig(), dtype, 1, "", None, init_distributed())
    step_of(state, *tokens(config, B, T))()
