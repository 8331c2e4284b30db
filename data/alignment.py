"""Where sequences begin that are aligned with documents (--data.align documents).

A document begins with the token EOT. Here E is EOT, and letters name the documents; T = 4:

    position   0                   1
               0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7
    tokens     E a a a a a E b E c c c c c E d d d
    inputs     [ 0   ]     [ 1   ] [ 2   ]
    targets      [ 0   ]     [ 1   ] [ 2   ]

  - Sequence 0 begins with document a. It ends inside of a, where 2 more tokens of a are left. That
    is less than T, so they are left out.
  - Sequence 1 begins with document b, which is shorter than T, and takes the beginning of document
    c with it: attention sees both, as in GPT-2's own training, and nothing is masked. 4 tokens of
    c are left behind it, which is T or more, so
  - sequence 2 goes on inside of c. It ends where d begins.
  - Document d begins a sequence of T inputs at 14, but its last target would be at 18, behind the
    end of the data.

So document_sequences gives [0, 6, 10]. No token is an input twice, every sequence sees the
beginning of its document but in documents longer than T, and what is left out are ends of
documents, less than T tokens each: 18 % of the tokens of 1,400 documents of FineWeb at T = 1024
(43 % if the next sequence always began at the next document).
"""

from collections.abc import Iterator

import numpy as np

from data.shard_file import blocks
from data.stream import Stream
from data.tokenizer import EOT
from launch.errors import BadInput


def document_sequences(stream: Stream, T: int) -> np.ndarray:
    """(sequences,) int64: the positions in the stream where aligned sequences begin.

    The shards are read once, and 8 bytes are kept for each sequence. Raises BadInput where no
    sequence fits.
    """
    found = [np.empty(0, dtype=np.int64)]
    waiting = np.empty(0, dtype=np.int64)  # the document to go on with: where it ends isn't known
    for begins in _document_starts(stream):
        begins = np.append(waiting, begins)
        starts, waiting = _sequences_between(begins, T)
        found.append(starts)
    sequences = np.concatenate(found)
    sequences = sequences[sequences + T < len(stream)]  # the last target is a token too
    if len(sequences) == 0:
        raise BadInput(f"--data.align documents: no document (token {EOT}) begins a sequence of "
                       f"{T + 1:,} tokens in the training data")
    return sequences


def _document_starts(stream: Stream) -> Iterator[np.ndarray]:
    """The positions of EOT, shard by shard, and last the end of the stream."""
    for shard, shard_start in zip(stream.shards, stream.shard_starts, strict=False):
        found = [start + np.flatnonzero(tokens == EOT) for start, tokens in blocks(shard.tokens)]
        yield shard_start + np.concatenate(found)
    yield np.array([len(stream)])


def _sequences_between(begins: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """The sequences from the first of these beginnings on, as far as the beginnings are known.

    Returns (starts of the sequences, the one beginning to go on with when more are known).
    """
    # Sequences run on from a beginning until less than T tokens are left before another one, and
    # there they start anew: at the first beginning that lies T or more behind. Which that is:
    following = np.searchsorted(begins, begins + T)  # (begins,) an index; len(begins): unknown yet
    jump = following.tolist()
    used, i = [], 0  # used: indices of the beginnings at which sequences start anew
    while i < len(begins) and jump[i] < len(begins):
        used.append(i)
        i = jump[i]
    # From begins[u] on there is room for so many sequences before the next used beginning.
    counts = (begins[following[used]] - begins[used]) // T  # (used,)
    first = np.repeat(begins[used], counts)  # (sequences,) the beginning that each runs on from
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, 2, ...
    return first + T * number, begins[i : i + 1]
