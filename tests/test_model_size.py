"""The sizes that --plan reckons with are those of the networks that are trained.

    pytest tests/test_model_size.py
"""

import pytest

from model import network, size
from model.config import GPTConfig
from train_gpt2 import PRESETS

SHAPES = {name: preset.model for name, preset in PRESETS.items()} | {
    "one layer": GPTConfig(n_layer=1, n_head=1, n_embd=6, n_ctx=5, n_vocab=7),
    "a padded vocabulary": GPTConfig(n_layer=3, n_head=2, n_embd=10, n_ctx=9, n_vocab=129),
    "value embeddings": GPTConfig(arch="speedrun", n_layer=5, n_head=2, n_embd=8, n_ctx=4,
                                  value_embeddings=True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_arithmetic_is_the_count_of_the_network_itself(shape):
    config = SHAPES[shape]
    assert size.parameters(config) == network.parameter_count(config)
    assert size.flops_per_token(config) == network.flops_per_token(config)
