"""What a run reads: a folder of shards, a text, conversations, or the embedded corpus.

    data = open_data(DataConfig(text="input.txt"))     # data.train, data.val: Streams of tokens

Files are opened, not read: a shard's tokens come from the disk as they are asked for. A text is
tokenised anew each time.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from data import corpus, shakespeare
from data.chars import char_tokens, tokenizer_of
from data.chat import chat_rows
from data.shard_file import Shard
from data.shards import open_folder
from data.stream import Align, Stream
from data.tokenizer import GPT2, VOCAB, Tokenizer
from launch.console import print0, warning
from launch.errors import BadInput
from launch.world import World

DEFAULT_DIR = "fineweb10B"
EMBEDDED = "World English Bible"


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from: a folder of shards, a text, or the embedded corpus."""

    dir: str | None = None
    """Folder of shards (default fineweb10B); an empty string means the embedded corpus."""
    text: str = ""
    """A text file to train on instead; every 20th block of it is held out for validation. Or the
    word shakespeare: nanoGPT's text, downloaded once."""
    vocab: Literal["gpt2", "char"] = "gpt2"
    """What a token is: GPT-2's byte pairs, or a character of the text (its last tenth held out)."""
    val_text: str = ""
    """A text file to validate on; then nothing of what is trained on is held out."""
    chat: str = ""
    """A JSONL file of conversations to fine-tune on instead (data/chat.py); it takes --init."""
    split_text: bool = True
    """In a text, <|endoftext|> ends a document. False: it's text like any other."""
    align: Align = "stream"
    """Where training sequences begin: at every T-th token, or at the starts of documents."""

    def check(self, n_vocab: int, init: str) -> None:
        """Raises BadInput for what doesn't go with a model's vocabulary, or its first weights."""
        if n_vocab != VOCAB and self.vocab == "gpt2":
            raise BadInput(f"--model.n_vocab is {VOCAB}, the tokenizer's")
        if self.chat and not init:
            raise BadInput("--data.chat fine-tunes a trained model: --init hf:gpt2, or a run")

    def resolve(self) -> "DataConfig":
        """The same with its default filled in. Raises BadInput where two sources are given."""
        if self.chat and (self.text or self.dir or self.vocab == "char" or self.align != "stream"):
            raise BadInput("--data.chat has conversations in GPT-2's tokens, one a row: leave out "
                           "--data.dir, --data.text, --data.vocab and --data.align")
        if self.text and self.dir:
            raise BadInput(f"--data.dir {self.dir} and --data.text {self.text} are both given: "
                           "leave one of them out (over a config.json that holds both: "
                           "--data.dir '' or --data.text '')")
        if self.vocab == "char" and (self.dir or self.dir is None and not self.text):
            raise BadInput(f"--data.vocab char reads a text, and {self.dir or DEFAULT_DIR} is a "
                           "folder of tokens: --data.text FILE (or: --data.text shakespeare)")
        if self.vocab == "char" and self.align == "documents":
            raise BadInput("--data.align documents: a text by character has no documents; leave "
                           "it out, or take --data.vocab gpt2")
        if self.vocab == "char" and self.val_text:
            raise BadInput("--data.val_text with --data.vocab char: the last tenth of a text by "
                           "character is held out; leave one of them out")
        if self.chat and self.val_text:
            raise BadInput("--data.val_text with --data.chat: some of the conversations are held "
                           "out; leave one of them out")
        if self.dir is None:
            return replace(self, dir="" if self.text or self.chat else DEFAULT_DIR)
        return self


    def on_disk(self) -> "DataConfig":
        """resolve(), with the file of what --data.text names by a word; none before it's here."""
        if self.text != shakespeare.WORD:
            return self.resolve()
        path = shakespeare.find()
        return replace(self, text=str(path) if path else "", dir="")


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
    world.require_same("the data", " and ".join(data.fingerprints().values()))
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
