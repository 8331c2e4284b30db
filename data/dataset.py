"""What a run reads: a folder of shards, a text, conversations, or the embedded corpus.

    data = open_data(DataConfig(text="input.txt"))     # data.train, data.val: Streams of tokens

Files are opened, not read: a shard's tokens come from the disk as they are asked for. A text is
tokenised anew each time.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import corpus, shakespeare
from data.chars import char_tokens, tokenizer_of
from data.chat import chat_rows
from data.config import DataConfig
from data.shard_file import Shard
from data.shards import open_folder
from data.stream import Stream
from data.tokenizer import GPT2, Tokenizer
from launch.console import print0, warning
from launch.world import World

EMBEDDED = "World English Bible"


@dataclass(frozen=True)
class Data:
    """What a run reads: the training stream, the validation stream, what the loss on the latter is
    called, and what their tokens stand for."""

    train: Stream
    val: Stream
    name: str
    tokenizer: Tokenizer = GPT2
    chat: bool = False  # conversations

    def fingerprints(self) -> dict[str, str]:
        """What a run must go on with: of lengths and tokens, not of file names."""
        return {"training data": fingerprint(self.train, self.tokenizer.characters),
                "validation data": fingerprint(self.val)}


def fingerprint(stream: Stream, characters: str = "") -> str:
    """Names a stream's tokens by their number and a hash of each shard's length and first and last
    1,024 tokens. How sequences are cut belongs to it, and the characters that tokens stand for: a
    run can't go on with others."""
    digest = hashlib.sha256()
    for shard in stream.shards:
        digest.update(str(len(shard.tokens)).encode())
        ends = [shard.tokens[:1024], shard.tokens[-1024:]]
        if stream.align == "rows":  # in memory: all of it
            ends = [shard.tokens[:]]
        for tokens in ends:
            digest.update(tokens.tobytes())
    aligned = {"stream": "", "documents": ", cut at documents",
               "rows": ", a conversation a row"}[stream.align]
    of_characters = ""
    if characters:
        digest.update(characters.encode())
        of_characters = f", each one of {len(characters)} characters"
    return f"{len(stream):,} tokens ({digest.hexdigest()[:16]}){aligned}{of_characters}"


def open_on_all_ranks(config: DataConfig, T: int, world: World) -> Data:
    """open_data() on every rank, after rank 0 has downloaded what --data.text names by a word. What
    fails on one rank is raised on all; where ranks see other tokens, the odd one is named."""
    if config.text == shakespeare.WORD:
        world.broadcast_from_rank0(shakespeare.fetch)
    with world.fail_together():
        data = open_data(config, T)
    world.require_same({"the data": " and ".join(data.fingerprints().values())})
    return data


def open_data(config: DataConfig, T: int = 0) -> Data:
    """Opens what the configuration names. Raises BadInput where it can't be used.

    T: the length of a sequence, which only conversations ask for.
    """
    config = config.resolve()
    if config.chat:
        path = Path(config.chat)
        rows, val_rows = chat_rows(path, T)
        return Data(Stream([Shard(path, rows.reshape(-1))], "rows"),
                    Stream([Shard(path, val_rows.reshape(-1))], "rows"), path.name, chat=True)
    if config.val_text:
        train = Stream(all_training_shards(config), config.align)
        path = Path(config.val_text)
        return Data(train, Stream([Shard(path, validation_text(config))]), path.name)
    if config.dir:
        train_shards, val_shards, name = open_folder(Path(config.dir))
        return Data(Stream(train_shards, config.align), Stream(val_shards), name)
    path = text_path(config)
    if config.vocab == "char":
        return open_characters(path if config.text else None)
    if config.text:
        tokens, held_out = corpus.text_file(path, config.split_text)
    else:
        tokens, held_out = corpus.embedded()
    train = Stream([Shard(path, tokens)], config.align)
    return Data(train, Stream([Shard(path, held_out)]), path.name)


def text_path(config: DataConfig) -> Path:
    """The file of --data.text; a name for the embedded corpus without one."""
    if config.text == shakespeare.WORD:
        return shakespeare.fetch()
    return Path(config.text or EMBEDDED)


def all_training_shards(config: DataConfig) -> list[Shard]:
    """What is trained on where a text of its own is for validation: all there is of a text or of
    the embedded corpus, and a folder's train shards (its validation shards stay unused)."""
    if config.dir:
        return open_folder(Path(config.dir), kinds=("train",))[0]
    path = text_path(config)
    if config.text:
        return [Shard(path, corpus.whole_text(path, config.split_text))]
    return [Shard(path, corpus.embedded_whole())]


def validation_text(config: DataConfig) -> np.ndarray:
    """The tokens of --data.val_text, uint16; a warning where the text trained on holds it all."""
    path = Path(config.val_text)
    tokens = corpus.whole_text(path, config.split_text)
    if config.text and corpus.read_text(path).strip() in corpus.read_text(text_path(config)):
        print0(warning(f"--data.val_text {path} is part of --data.text {config.text}, so that the "
                       "validation loss is of text that was trained on: leave --data.val_text out "
                       "to hold some of it back"))
    return tokens


def open_characters(path: Path | None) -> Data:
    """A text by its characters; the embedded corpus without a path. Raises BadInput."""
    if path is None:
        path, text = Path("World English Bible"), "\n\n".join(corpus.bible_chapters())
    else:
        text = corpus.read_text(path)
    train, val, characters = char_tokens(text, path)
    return Data(Stream([Shard(path, train)]), Stream([Shard(path, val)]),
                f"{path.name} by character", tokenizer_of(characters))
