"""How many tokens a shard takes, chosen from the source before anything is tokenised."""

from launch.errors import BadInput

BYTES_PER_TOKEN = 4.0  # FineWeb has 4.5 to 4.7; the disk that is needed is rounded up
FULL_SHARD = 100_000_000  # tokens, as in llm.c's dev/data/fineweb.py
SHARDS = 20  # a smaller source has about as many, so a twentieth of it is for validation
GUESSED_BYTES = 1 << 23  # of text; less is tokenised in a second
SEQUENCE = 1025  # tokens that GPT-2's context of 1,024 takes to be judged once
# llm.c and build-nanogpt stop on a shard that is shorter than B * T tokens of all processes and
# one more; in their runs that is at most 64 sequences of 1,024 tokens on each of 8 GPUs.
READER_TOKENS = 64 * 1024 * 8 + 1


def choose_shard_tokens(text_bytes: int) -> int:
    """Tokens of a shard for a source of about so many bytes of text, in two digits.

    100,000,000 for 2 * 10^9 tokens or more, a twentieth for less; but at least one of GPT-2's
    sequences, or a quarter of the source where that is less.
    """
    tokens = int(text_bytes / BYTES_PER_TOKEN)
    share = int(float(f"{tokens // SHARDS:.1e}"))
    return min(FULL_SHARD, max(1, share, min(SEQUENCE, tokens // 4)))


def shortest_last_shard(shard_tokens: int) -> int:
    """Tokens below which the rest of a stream is no shard but the end of the one before it."""
    return min(READER_TOKENS, shard_tokens)


def refuse_too_large(val_tokens: int, text_bytes: int) -> None:
    """Raises BadInput if the validation shard would surely take the whole source.

    A token is one byte at least, and four of most texts: that is the room for a wrong guess. What
    is read at once is not guessed about.
    """
    if GUESSED_BYTES < text_bytes <= val_tokens:
        raise BadInput(nothing_left(f"all of about {text_bytes:,} bytes of text", text_bytes))


def nothing_left(what: str, text_bytes: int) -> str:
    """The line for a source that fits into its validation shard."""
    return (f"{what} would be in the validation shard, and nothing is left to train on: "
            f"--shard_tokens {choose_shard_tokens(text_bytes):,} suits this source, and is chosen "
            "where neither --shard_tokens nor --val_tokens is given")
