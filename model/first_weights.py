"""The random numbers that a network begins with, drawn on all cores.

    draw_normal((matrix, 0.02), (another, 0.01))       # N(0, std) in each

A stream of random numbers is made by one core, one number after the other: 0.6 s for 124M of them,
8 s for 1558M. So each piece of PIECE numbers has a stream of its own. What is drawn depends on
PyTorch's seed alone, not on how many threads draw it.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

PIECE = 2**22  # numbers: ten pieces for GPT-2's embedding, some milliseconds each


def draw_normal(*matrices: tuple[Tensor, float]) -> None:
    """Fills each contiguous tensor of a CPU with N(0, std), by as many threads as PyTorch has.

    Inside model/network.py's NoFirstWeights it draws nothing.
    """
    tensors = [tensor.detach() for tensor, _ in matrices]  # a thread of its own records gradients
    if has_torch_function(tensors):  # as in torch.nn.init
        return handle_torch_function(draw_normal, tensors, *matrices)
    pieces = [(piece, std) for tensor, (_, std) in zip(tensors, matrices, strict=True)
              for piece in tensor.view(-1).split(PIECE)]
    # PyTorch's generator (a Mersenne Twister) takes 32 bits of a seed: neighbours are never equal.
    first_seed = int(torch.randint(2**32, ()))

    def draw(index: int) -> None:
        piece, std = pieces[index]
        stream = torch.Generator().manual_seed((first_seed + index) % 2**32)
        piece.normal_(0.0, std, generator=stream)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(draw, range(len(pieces))))
