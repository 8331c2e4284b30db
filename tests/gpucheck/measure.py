"""Parts that measure in their own process, on one GPU.

Each takes the check's settings and a folder of its own, and returns what it measured by name.
"""

import time
from pathlib import Path
from typing import Any

import torch

from eval.likelihood import Request, negative_loglikelihoods
from kernels import bench, operators, roofline, selfcheck
from kernels.cards import by_name
from kernels.passes import triton_passes
from launch.world import World, autocast, choose_dtype, init_distributed
from model import fused_block
from model.config import ComputeConfig, OptimConfig
from model.generate import SampleConfig, generate, store_in
from model.gpt2 import GPT
from model.network import use_operators
from model.saving import Saver
from model.train_state import TrainState
from model.training import build_train_state
from tests.bench.hellaswag import questions
from tests.bench.training import step_of, tokens
from tests.gpucheck.settings import Settings
from tests.nullgpu.largest import largest
from tests.running import Silent

CUDA = torch.device("cuda")
SQUARE = 8192  # rows and columns of the product whose rate is the card's best
COPY = 2**30  # bytes read, and as many written
TOKENS = 512  # drawn, of which the first are not timed: a graph is captured
QUESTIONS = 2048


def kernel_errors(settings: Settings, folder: Path) -> dict[str, Any]:
    """The largest errors of the kernels against fp64 on this card, and of a block by hand."""
    shape = settings.model
    ops = operators.choose("triton", CUDA, shape.n_embd // shape.n_head)
    worst, faults = selfcheck.compare(ops, CUDA, shape.n_embd // shape.n_head)
    shown, block_faults = fused_block.check(triton_passes(), CUDA, shape.n_embd, shape.n_head)
    judge = selfcheck.checked_judge(CUDA)[1]
    faults += [fault for fault in (*block_faults.split("; "), judge) if fault]
    if faults:  # perhaps NaN: then the largest error is none
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        return {"fault": f"{faults[0]}{more}", "faults": faults}
    return {"bf16": worst["bfloat16"], "fp32": worst["float32"], "block by hand": shown}


def rates(settings: Settings, folder: Path) -> dict[str, Any]:
    """What the card reaches: FLOP/s of one large product and of attention, forward and backward
    with the causal half counted, and bytes/s of a copy. --plan takes these."""
    size = 512 if settings.quick else SQUARE
    a, b = (torch.randn(size, size, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    product = bench.median(lambda: a @ b) / 1e3
    copied = COPY // 1024 if settings.quick else COPY
    source = torch.empty(copied, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    copy = bench.median(lambda: target.copy_(source)) / 1e3
    s = shape_of(settings)
    ops = operators.choose("auto", CUDA, s.C // s.H)
    qkv = torch.randn(s.B, s.T, 3 * s.C, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    both = bench.forward_backward(lambda qkv: ops.attention(qkv, s.H), [qkv])
    flops = 3.5 * roofline.work("attention_forward", s).flops  # as kernels.bench counts them
    return {"matmul_flops": 2 * size**3 / product,
            "attention_flops": flops / (bench.median(both) / 1e3),
            "memory_bandwidth": 2 * copied / copy}


def shape_of(settings: Settings) -> roofline.Shape:
    """A micro-batch, as the kernels' own bench has it."""
    model = settings.model
    return roofline.Shape(settings.batch, model.n_ctx, model.n_embd, model.n_head,
                          roofline.GPT2.V)


def kernel_times(settings: Settings, folder: Path) -> dict[str, Any]:
    """As python -m kernels.bench: every operator beside PyTorch's own. What torch.compile makes of
    them is left out, for it takes minutes to."""
    s = shape_of(settings)
    ops = operators.choose("triton", CUDA, s.C // s.H)
    card = by_name(torch.cuda.get_device_name())
    timings = bench.measure(ops, s, left_out=("torch.compile",))
    return {"rows": [bench.as_row(timing, card) for timing in timings]}


def state_of(settings: Settings) -> tuple[TrainState, World, str]:
    """A new model with its optimizer, as training has it."""
    world = init_distributed()
    dtype = choose_dtype("auto", world.device)
    state, _ = build_train_state(
        settings.model, OptimConfig(), ComputeConfig(), dtype, 1337, "", None, world,
        micro_batch=settings.batch)
    return state, world, dtype


def one_step(state: TrainState, settings: Settings, batch: int) -> None:
    """Forward to update, on `batch` sequences."""
    inputs, targets = tokens(settings.model, batch, settings.model.n_ctx)  # (B, T) each
    step_of(state, inputs.to(CUDA), targets.to(CUDA))()


def largest_batch(settings: Settings, folder: Path) -> dict[str, Any]:
    """The largest micro-batch whose steps the card holds: tried."""
    state, _, _ = state_of(settings)
    most = 4 * settings.batch if settings.quick else 2**16

    def fits(batch: int) -> bool:
        if batch > most:
            return False
        full = False
        try:
            for _ in range(2):  # the first makes AdamW's moments
                one_step(state, settings, batch)
        except torch.OutOfMemoryError:
            full = True  # by now the failed step's tensors are nobody's
        state.model.zero_grad()
        torch.cuda.empty_cache()
        return not full

    return {"sequences": largest(fits, 4 * settings.batch)}


def model_to_ask(settings: Settings) -> tuple[GPT, World, str]:
    """A model with its first weights, as eval.sample and eval.hellaswag have one."""
    world = init_distributed()
    dtype = choose_dtype("auto", world.device)
    torch.manual_seed(1337)
    model = GPT(settings.model)
    weights = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    store_in(model, weights)
    ops, _ = selfcheck.checked("auto", CUDA, settings.model.n_embd // settings.model.n_head,
                               weights, speedrun=False, training=False)
    use_operators(model, ops)
    return model.to(CUDA).eval().requires_grad_(False), world, dtype


def sampling(settings: Settings, folder: Path) -> dict[str, Any]:
    """Tokens/s of one text, once its graph is captured."""
    model, world, dtype = model_to_ask(settings)
    count = min(TOKENS, settings.model.n_ctx - 8)
    drawn, untimed, began = 0, count // 4, 0.0
    with autocast(world.device, dtype):
        for _ in generate(model, torch.arange(8, device=CUDA)[None], SampleConfig(count)):
            drawn += 1
            if drawn == untimed:
                began = time.perf_counter()
    return {"tokens_per_second": (drawn - untimed) / (time.perf_counter() - began)}


def hellaswag(settings: Settings, folder: Path) -> dict[str, Any]:
    """Questions/s, of made-up ones that are as long as HellaSwag's: tests/bench/hellaswag.py."""
    model, world, dtype = model_to_ask(settings)
    asked: list[Request] = questions(settings.model, 32 if settings.quick else QUESTIONS)
    with autocast(world.device, dtype):
        negative_loglikelihoods(model, asked[: len(asked) // 4], world)  # compiles
        began = time.perf_counter()
        negative_loglikelihoods(model, asked, world)
    seconds = time.perf_counter() - began
    read = sum(len(context) + sum(len(ending) - 1 for ending in endings)
               for context, endings in asked)
    return {"questions_per_second": len(asked) / seconds, "tokens_a_question": read / len(asked)}


def saving(settings: Settings, folder: Path) -> dict[str, Any]:
    """Seconds that training stands still for a checkpoint: for the first, which takes pinned
    memory, and for one of those after it."""
    state, world, _ = state_of(settings)
    one_step(state, settings, 1)
    tracker = Silent()
    tracker.world = world
    (folder / "config.json").write_text("{}")
    saver = Saver(folder, state, tracker, keep=1)  # type: ignore[arg-type]
    stalls = []
    for step in (1, 2):
        began = time.perf_counter()
        saver.save(step, {"step": step, "tokens": 0}, wait=False)
        stalls.append(time.perf_counter() - began)
        saver.wait()
    if saver.newest_step != 2:
        saver.report_finished(2)
        raise RuntimeError("the checkpoint was not written: see above")
    size = sum(layout.size for layout in saver.layouts.values())
    return {"first_stall": stalls[0], "stall": stalls[1], "bytes": size}
