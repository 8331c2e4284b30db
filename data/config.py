"""The settings of data/, without PyTorch and NumPy (model/config.py says why)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data import shakespeare
from launch.errors import BadInput

VOCAB = 50257  # 256 bytes, 50,000 merges, EOT
DEFAULT_DIR = "fineweb10B"
Align = Literal["stream", "documents"]


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

    def check_present(self) -> None:
        """Raises BadInput where there is no such folder or text as the run is to read.

        What is wrong with them is for the modules that open them to say, and these import NumPy.
        """
        config = self.resolve()
        if config.dir and not Path(config.dir).is_dir():
            from data.shards import find_shards

            find_shards(Path(config.dir))
        for text in (config.text, config.val_text):
            path = Path(text)
            if text and text != shakespeare.WORD and (path.is_dir() or not path.exists()):
                from data.corpus import read_text

                read_text(path)

    def on_disk(self) -> "DataConfig":
        """resolve(), with the file of what --data.text names by a word; none before it's here."""
        if self.text != shakespeare.WORD:
            return self.resolve()
        path = shakespeare.find()
        return replace(self, text=str(path) if path else "", dir="")


def fit_micro_batch(batch_tokens: int, ranks: int, T: int, at_most: int) -> int:
    """Sequences a rank computes at once: the largest divisor of its share that is <= at_most.

    Raises BadInput where batch_tokens can't be shared out, naming the nearest that can.
    """
    share, rest = divmod(batch_tokens, ranks * T)
    if rest or share == 0:
        below, above = share * ranks * T, (share + 1) * ranks * T
        nearest = f"{below:,} or {above:,}" if below else f"{above:,}"
        raise BadInput(f"batch_tokens {batch_tokens:,} is not divisible by ranks x T = {ranks} x "
                       f"{T:,}: the nearest that is: {nearest}")
    if at_most < 1:
        raise BadInput(f"micro_batch {at_most} leaves nothing to compute: it is at least 1")
    size = min(at_most, share)
    while share % size:
        size -= 1
    return size
