"""Names that people bring along from elsewhere, and what they are called here."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

# OpenAI's models by the names that transformers and nanoGPT (--init_from) have for them.
MODELS = {
    "gpt2": "gpt2-124m",
    "gpt2-small": "gpt2-124m",
    "gpt2-medium": "gpt2-350m",
    "gpt2-large": "gpt2-774m",
    "gpt2-xl": "gpt2-1558m",
}

# The settings of nanoGPT's train.py that are called otherwise here.
NANOGPT = {
    "n_layer": "--model.n_layer",
    "n_head": "--model.n_head",
    "n_embd": "--model.n_embd",
    "block_size": "--model.n_ctx",
    "bias": "always on, as in GPT-2",
    "dropout": "--model.dropout",
    "batch_size": "--micro_batch",
    "gradient_accumulation_steps": "--batch_tokens, the tokens of a step over all ranks",
    "max_iters": "--steps",
    "lr_decay_iters": "--steps too: the rate falls until the last one",
    "learning_rate": "--optim.lr",
    "min_lr": "--optim.final_lr, as a fraction of --optim.lr",
    "decay_lr": "--optim.final_lr, where 1 keeps the rate",
    "warmup_iters": "--optim.warmup_steps",
    "weight_decay": "--optim.weight_decay",
    "beta1": "--optim.beta1",
    "beta2": "--optim.beta2",
    "grad_clip": "--optim.clip",
    "eval_interval": "--eval_every",
    "eval_iters": "--val_tokens, the size of the fixed validation set",
    "log_interval": "always 1: every step is logged",
    "always_save_checkpoint": "--save_every",
    "init_from": "--init CHECKPOINT (hf:gpt2 for OpenAI's); the same command again resumes",
    "dataset": "--data.dir for a folder of shards, --data.text for a text",
    "wandb_log": "--wandb online",
    "wandb_run_name": "--name",
    "device": "found by itself; CUDA_VISIBLE_DEVICES= makes it the CPU",
    "backend": "found by itself",
}

# The settings of its sample.py.
NANOGPT_SAMPLE = {
    "start": "--prompt",
    "num_samples": "--num",
    "max_new_tokens": "--max_tokens",
    "out_dir": "a run's folder, first on the line and without a flag",
}


def translate(names: Iterable[str], called: Mapping[str, str] = NANOGPT) -> str:
    """What flags of nanoGPT's are called here, all of them in one line; '' where there is none."""
    return "; ".join(f"--{name} is {called[name]}" for name in names if name in called)


def preset_meant(name: str, presets: Sequence[str]) -> str:
    """The preset that somebody may have meant, or ''."""
    if MODELS.get(name) in presets:
        return MODELS[name]
    holding = [preset for preset in presets if name.lower() in preset]
    close = holding or difflib.get_close_matches(name.lower(), presets, n=1, cutoff=0.4)
    return close[0] if close else ""
