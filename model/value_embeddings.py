"""Embeddings of their own for the values of every other layer: an option of the speedrun's network.

After modded-nanogpt, record 14: 1,750 steps became 1,530, and 463 M parameters more; here at 124M
they are six tables of 38.6 M. Checkpoints call them value_embeddings.LAYER.weight.
"""

from torch import Tensor, nn

from model.gpt2 import GPTConfig


class ValueEmbeddings(nn.ModuleDict):
    """A table (Vp, C) for each of the layers 1, 3, 5, ...; none where the option is off."""

    def __init__(self, config: GPTConfig) -> None:
        layers = range(1, config.n_layer, 2) if config.value_embeddings else ()
        super().__init__({str(layer): nn.Embedding(config.padded_vocab, config.n_embd)
                          for layer in layers})

    def of_layer(self, layer: int, idx: Tensor) -> Tensor | None:
        """What is added to a layer's values. (B, T) tokens -> (B, T, C), or None: it has none."""
        if str(layer) not in self:
            return None
        return self[str(layer)](idx)
