"""The command line: [PRESET | config.json] [--flags].

A preset is an instance of the configuration; a config file is only flags written down, so its
errors read like a flag's. Flags win over the file, the file over the preset.
"""

import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from launch.errors import BadInput

C = TypeVar("C")
# Settings whose flags have no prefix (tyro.conf.OmitArgPrefixes).
BARE = ("compute", "saving", "evaluation", "tracker", "spikes", "watchdog", "planning")


def parse(config_class: type[C], presets: Mapping[str, C], argv: Sequence[str] | None = None) -> C:
    """The configuration that the command line asks for.

    Without a preset or file the defaults of `config_class` hold. Raises BadInput for an unknown
    preset or an unreadable file; a wrong flag ends the program with tyro's box and exit code 2.
    """
    flags = list(sys.argv[1:] if argv is None else argv)
    default = config_class()
    if flags and not flags[0].startswith("-"):
        source = flags.pop(0)
        if source in presets:
            default = presets[source]
        elif source.endswith(".json"):
            flags = _flags_of_file(Path(source)) + flags
        else:
            close = difflib.get_close_matches(source, presets, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}? " if close else ""
            raise BadInput(
                f"no preset is called {source!r}: {hint}There are {', '.join(presets)}; "
                "a configuration file ends in .json"
            )
    return tyro.cli(
        config_class,
        default=default,
        args=flags,
        config=(tyro.conf.FlagConversionOff,),  # booleans read --compile False, as in a file
        console_outputs=int(os.environ.get("RANK", "0")) == 0,
        prog="train_gpt2.py [PRESET | config.json]",
        description=f"Presets: {', '.join(presets)}.",
    )


def _flags_of_file(path: Path) -> list[str]:
    """A run's config.json, or the bare mapping inside it, as flags."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path} is no JSON: {error}") from None
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = content["config"]
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds no configuration: expected an object of settings")
    return as_flags(content)


def as_flags(settings: Mapping, prefix: str = "") -> list[str]:
    """{"model": {"n_layer": 2}} -> ["--model.n_layer", "2"]."""
    flags: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flags += as_flags(value, "" if key in BARE else f"{prefix}{key}.")
        else:
            flags += [f"--{prefix}{key}", str(value)]
    return flags


def at_least_1(settings: object, *names: str) -> None:
    """Raises BadInput for the first of these settings that is below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise BadInput(f"--{name} {getattr(settings, name)}: expected at least 1")
