"""The text that nanoGPT's first run reads: 40,000 lines of Shakespeare's plays, 1.1 MB.

    --data.text shakespeare

Downloaded once, to shakespeare/tinyshakespeare.txt; GPT2_TEST_DATA may name a folder that has it.
"""

import os
from pathlib import Path

from launch.errors import Failed
from launch.files import download, sha256

WORD = "shakespeare"  # what --data.text says
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SIZE = 1_115_394  # bytes, and characters
DEFAULT_PATH = Path("shakespeare/tinyshakespeare.txt")


def find() -> Path | None:
    """The text's file, if it is here."""
    given = Path(os.environ.get("GPT2_TEST_DATA", DEFAULT_PATH.parent), DEFAULT_PATH.name)
    for path in (given, DEFAULT_PATH):
        if path.is_file() and sha256(path) == SHA256:
            return path
    return None


def fetch() -> Path:
    """The text's file, downloaded if need be. Raises Failed where it can't be had."""
    path = find()
    if path:
        return path
    try:
        download(URL, DEFAULT_PATH, SHA256, SIZE)
    except Failed as error:
        raise Failed(f"{error}. Without a network: put that file at {DEFAULT_PATH}, or train on "
                     "another text, --data.text FILE") from None
    return DEFAULT_PATH
