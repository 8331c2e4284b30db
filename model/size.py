"""How large the networks are, by arithmetic: what --plan needs to know, without PyTorch.

    parameters(GPTConfig())          # 124,439,808
    flops_per_token(GPTConfig())     # 854,438,400

A run counts its own model (model/network.py). tests/test_model_size.py holds both to be equal.
"""

from model.config import GPTConfig


def parameters(config: GPTConfig) -> int:
    """Parameters, without padding rows of the vocabulary."""
    L, C = config.n_layer, config.n_embd
    if config.arch == "speedrun":  # no biases, gains and positions; of each block, two numbers
        tables = 2  # embedding and head
        if config.value_embeddings:
            tables += L // 2
        return tables * config.n_vocab * C + _matrices(config) + 2 * L
    vectors = 13 * C  # of a block: biases of 3C, C, 4C and C, and two LayerNorms of 2C
    return (config.n_vocab + config.n_ctx) * C + _matrices(config) + L * vectors + 2 * C


def flops_per_token(config: GPTConfig) -> int:
    """Matrix-product FLOPs of forward and backward for one token: model/network.py explains it."""
    L, C, T = config.n_layer, config.n_embd, config.n_ctx
    return 6 * (_matrices(config) + config.n_vocab * C) + 12 * L * C * T


def _matrices(config: GPTConfig) -> int:
    """Numbers in the blocks' matrices: C x 3C, C x C, C x 4C and 4C x C in each."""
    return 12 * config.n_layer * config.n_embd**2
