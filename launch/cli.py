"""The command line: [PRESET | config.json] [--flags].

A preset is an instance of the configuration; a config file is only flags written down, so its
errors read like a flag's. Flags win over the file, the file over the preset.
"""

import difflib
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import tyro

from launch.errors import BadInput, env_number

C = TypeVar("C")
MOST_STEPS = 99_999_999  # a checkpoint's name, step_00000500, has eight digits
# Settings whose flags have no prefix (tyro.conf.OmitArgPrefixes). "exam" and "guard" are what
# "evaluation", and "spikes" and "watchdog" together, were called in config.json before.
BARE = ("compute", "saving", "evaluation", "exam", "tracker", "spikes", "watchdog", "guard",
        "planning")


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
    config = tyro.cli(
        config_class,
        default=default,
        args=flags,
        config=(tyro.conf.FlagConversionOff,),  # booleans read --compile False, as in a file
        console_outputs=env_number("RANK", 0) == 0,
        prog="train_gpt2.py [PRESET | config.json]",
        description=f"Presets: {', '.join(presets)}.",
    )
    if is_given("steps", flags) and not is_given("optim.warmup_steps", flags):
        config = scale_warmup(config, default)
    warn_of_warmup(config)
    return config


def is_given(name: str, flags: Sequence[str]) -> bool:
    """Whether a flag is among these, as --name VALUE or --name=VALUE (tyro takes - for _ too)."""
    names = [flag.partition("=")[0].replace("-", "_") for flag in flags]
    return f"__{name}" in names


def scale_warmup(config: Any, preset: Any) -> Any:
    """The run with the share of its steps for warm-up that the preset has: 19 of 500 where the
    preset warms up for 700 of 18,865."""
    within("steps", config.steps, 1, MOST_STEPS)
    share = preset.optim.warmup_steps / preset.steps
    return replace(config, optim=replace(config.optim, warmup_steps=round(share * config.steps)))


def warn_of_warmup(config: Any) -> None:
    """Says on rank 0 that the warm-up takes the whole run, where it does."""
    warmup, steps = config.optim.warmup_steps, config.steps
    if warmup >= steps and env_number("RANK", 0) == 0:
        print(f"warning: --optim.warmup_steps {warmup:,} is no shorter than the run, --steps "
              f"{steps:,}: the learning rate never gets past its warm-up", flush=True)


def _flags_of_file(path: Path) -> list[str]:
    """A run's config.json, or the bare mapping inside it, as flags."""
    try:
        content = json.loads(path.read_bytes())  # of bytes it skips a byte order mark
    except OSError as error:
        raise BadInput(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path} is no JSON: {error}") from None
    except RecursionError:
        raise BadInput(f"{path} holds no configuration: brackets in brackets without end") from None
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = content["config"]
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds no configuration: expected an object of settings")
    flags = as_flags(content)
    for flag in flags:
        if "\0" in flag:  # no name of a file can hold one, and a shell can't hand it over
            raise BadInput(f"{path} holds a zero character: {flag!r}")
    return flags


def as_flags(settings: Mapping, prefix: str = "") -> list[str]:
    """{"model": {"n_layer": 2}} -> ["--model.n_layer=2"]; so a value may begin with - too."""
    flags: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flags += as_flags(value, "" if key in BARE else f"{prefix}{key}.")
        else:
            flags.append(f"--{prefix}{key}={value}")
    return flags


def quoted(path: str | Path) -> str:
    """A path for a command that a user may paste: as a shell takes it, and never for a flag."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def within(flag: str, value: float, low: float, high: float = math.inf, unit: str = "") -> None:
    """Raises BadInput where a flag's number lies outside low to high, or is infinite or NaN."""
    if low <= value <= high and value < math.inf:
        return
    expected = f"at least {low:,}" if high == math.inf else f"{low:,} to {high:,}"
    raise BadInput(f"--{flag} {value}: expected {expected} {unit}".rstrip())
