"""Jobs for --plan: of any shape, and of the presets."""

from dataclasses import asdict, fields, replace

from launch.plan.job import Job
from model.gpt2 import GPTConfig
from model.network import flops_per_token, parameter_count
from train_gpt2 import PRESETS


def job_of(model: GPTConfig, **changes) -> Job:
    numbers = dict(batch_tokens=2**19, micro_batch=64, steps=1) | changes
    known = {f.name for f in fields(Job)}
    shape = {name: value for name, value in asdict(model).items() if name in known}
    if model.arch == "speedrun":
        numbers["tables"] = 2 + model.value_embeddings * (model.n_layer // 2)
    return Job(**shape, parameters=parameter_count(model),
               flops_per_token=flops_per_token(model), **numbers)


def preset(name: str, **changes) -> Job:
    config = PRESETS[name]
    numbers = parameter_count(config.model), flops_per_token(config.model)
    return replace(Job.of(asdict(config), *numbers), **changes)
