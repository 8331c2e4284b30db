"""Sampling from GPT-2 124M, random weights, the likeliest token each time: tokens/s.

    python -m tests.bench sampling

The plain way computes the whole context again for every token, in fp32. Of eight streams the plain
way is one stream of ours: what reading the weights once for eight tokens brings.
"""

from functools import partial

import torch

from kernels import int8
from launch.config import ReadDtype
from launch.world import autocast, choose_dtype, keep_freed_memory
from model.config import GPTConfig
from model.generate import SampleConfig, generate
from model.gpt2 import GPT
from model.reading import ready_to_read
from model.size import parameters
from tests.bench import limits, plain
from tests.bench.pairs import Done, Row, Work
from tests.bench.training import QUICK, first_weights

CPU = torch.device("cpu")
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def rows(quick: bool = False) -> list[Row]:
    """The table's rows of sampling."""
    if quick:
        return [stream("sampling, quick", QUICK, "fp32", 4)]
    made = [stream("sampling 124M, one stream, fp32", GPTConfig(), "fp32", 40)]
    if choose_dtype("auto", CPU) == "bf16":
        made.append(stream("sampling 124M, one stream, bf16", GPTConfig(), "bf16", 40))
    dtype = choose_dtype("auto", CPU)
    if has_int8():
        made += [stream("sampling 124M, one stream, int8", GPTConfig(), "int8", 40),
                 Row(f"sampling 124M, one stream, int8 for {dtype}", "tokens",
                     partial(cached, GPTConfig(), dtype, 1, 40),
                     partial(cached, GPTConfig(), "int8", 1, 40))]
    made.append(Row(f"sampling 124M, 8 streams for one, {dtype}", "tokens",
                    partial(cached, GPTConfig(), dtype, 1, 40),
                    partial(cached, GPTConfig(), dtype, 8, 40)))
    return made


def has_int8() -> bool:
    """Whether this machine can make kernels/int8.c."""
    try:
        int8.compiled()
    except RuntimeError:
        return False
    return True


def stream(name: str, config: GPTConfig, dtype: ReadDtype, new_tokens: int) -> Row:
    """One stream, beside the plain way and the time that reading the weights takes."""
    limit = partial(limits.reads, BYTES[dtype] * parameters(config))
    return Row(name, "tokens", partial(recomputed, config, new_tokens),
               partial(cached, config, dtype, 1, new_tokens), limit,
               tolerance=0 if dtype == "fp32" else None)  # the tokens' sum: the same text


def recomputed(config: GPTConfig, new_tokens: int) -> Work:
    """The plain way."""
    model = plain.PlainGPT(config)
    model.load_state_dict(first_weights(config))
    prompt = torch.arange(8)[None]  # (1, 8)

    def work() -> Done:
        drawn = plain.sample(model, prompt, new_tokens)  # (1, 8 + new_tokens)
        return Done(new_tokens, float(drawn[:, 8:].sum()))

    return work


def cached(config: GPTConfig, dtype: ReadDtype, streams: int, new_tokens: int) -> Work:
    """As eval.sample does it."""
    keep_freed_memory()
    model = GPT(config).eval()
    model.load_state_dict(first_weights(config))
    ready_to_read(model, dtype, CPU, several=streams > 1)
    prompt = torch.arange(8).repeat(streams, 1)  # (streams, 8)
    how = SampleConfig(new_tokens, temperature=0)

    def work() -> Done:
        with autocast(CPU, choose_dtype(dtype, CPU)):
            drawn = torch.stack([*generate(model, prompt, how)])  # (new_tokens, streams)
        return Done(drawn.numel(), float(drawn.sum()))

    return work
