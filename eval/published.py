"""What OpenAI's own models reach: figures to put beside a score. (llm.c's runs: eval/report/.)"""

from typing import Any, NamedTuple


class Size(NamedTuple):
    """What OpenAI's models of one size reach. The first four figures: llm.c dev/vislog.ipynb."""

    name: str
    hellaswag: float  # GPT-2's acc_norm, completion style
    gpt3_hellaswag: float  # GPT-3's, of the nearest size that its paper has
    fineweb_loss: float  # GPT-2's, on the first 10,485,760 tokens of FineWeb's sample-10BT
    core: float  # GPT-2's, over DCLM's 22 tasks: nanochat dev/estimate_gpt3_core.ipynb


SIZES: dict[Any, Size] = {  # by (n_layer, n_embd)
    (12, 768): Size("124M", 0.294463, 0.337, 3.424958, 0.1139),
    (24, 1024): Size("350M", 0.375224, 0.436, 3.083089, 0.1849),
    (36, 1280): Size("774M", 0.431986, 0.510, 3.000580, 0.2146),
    (48, 1600): Size("1558M", 0.488946, 0.547, 2.831273, 0.2565),
}
