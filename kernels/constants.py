"""Numbers that the operators share with the rooms above, which plan, pack and score by them."""

from typing import Literal

# Who computes the operators: kernels/operators.py, and for the fastest kernels/race.py.
Choice = Literal["auto", "fastest", "triton", "torch"]

IGNORE = -100  # a target that is no target (torch.nn.functional.cross_entropy's ignore_index)

# Up to this length the T x T scores fit into the caches of a CPU core, and matmul + softmax
# beats PyTorch's blocked SDPA (12 % of a whole GPT-2 124M step at T = 256).
SHORT = 256

# Logits that the loss holds at once, whatever the number of tokens. On a CPU 2^25: 128 MiB in fp32.
# On a GPU 2^28: 512 MiB in bf16, and 5,120 of GPT-2's rows, enough to fill it in each product. Half
# as much would read and write the fp32 dW (154 MB at 124M) twice as often.
CHUNK_ELEMENTS = 2**25
GPU_CHUNK_ELEMENTS = 2**28

# The widest C of a block whose backward pass is by hand (model/fused_block.py): LayerNorm's keeps
# three sums of a row's length in registers there.
FUSED_WIDTH = 2048

# Blocks that FSDP2 gathers and scatters at once (model/parallel.py). Its hooks take the host longer
# than the blocks themselves: at 1558M, 8 sequences, a micro-step without exchange takes 0.73 times
# the CPU time of one block at a time. Of 8 GPUs it costs each 57 MiB there, and 175 at 1 sequence
# (all counted and timed on a stand-in for a GPU).
FSDP_BLOCKS = 2

CACHED_ELEMENTS = 16 * 50304  # 16 of GPT-2's rows, whose fp32 copy (3 MiB) stays in a CPU's cache

# A token's weight in a draw is a whole number of these, 1 / 2^40 of the likeliest's: their sums are
# exact in int64 for up to 2^22 tokens, in whatever order they are added, on whatever device.
DRAW_UNITS = 2**40
