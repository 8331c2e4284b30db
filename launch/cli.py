"""The command line: [PRESET | RUN | config.json] [--flags].

A preset is an instance of the configuration; a config file is only flags written down, so its
errors read like a flag's. Flags win over the file, the file over the preset. A run's folder is its
config.json, under the name and in the place that the folder has: the run goes on.
"""

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from launch import console, flags, hints
from launch.errors import BadInput, env_number

C = TypeVar("C")
MOST_STEPS = 99_999_999  # a checkpoint's name, step_00000500, has eight digits
# Settings whose flags have no prefix (tyro.conf.OmitArgPrefixes). "exam" and "guard" are what
# "evaluation", and "spikes" and "watchdog" together, were called in config.json before.
BARE = ("compute", "saving", "evaluation", "exam", "tracker", "spikes", "watchdog", "guard",
        "planning")
# Flags that begin so do something only where a choice has one of these values.
READ_WITH = [("optim.muon.", "optim.optimizer", ("muon",)),
             ("optim.decay_ratio", "optim.schedule", ("wsd",)),
             ("optim.final_lr", "optim.schedule", ("cosine", "wsd"))]


def parse(config_class: type[C], presets: Mapping[str, C], argv: Sequence[str] | None = None) -> C:
    """The configuration that the command line asks for.

    Without a preset or file the defaults of `config_class` hold. Raises BadInput for an unknown
    preset or an unreadable file; a wrong flag ends the program with tyro's box and exit code 2.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    words = list(given)  # what was typed, without a file's settings
    default = config_class()
    if given and not given[0].startswith("-"):
        source = given.pop(0)
        if source in presets:
            default = presets[source]
        elif source.endswith(".json"):
            given = _flags_of_file(Path(source)) + given
        elif _is_run(Path(source)):
            given = _flags_of_run(Path(source)) + given
        else:
            close = hints.preset_meant(source, list(presets))
            hint = f"did you mean {close}? " if close else ""
            presets_there = f"no preset is called {source!r}: {hint}there are {', '.join(presets)}"
            no_run = f"{source} is no run's folder, which holds config.json"
            if "/" in source:
                raise BadInput(f"{no_run}; and {presets_there}")
            raise BadInput(f"{presets_there}; and {no_run}, and no file that ends in .json")
    _refuse_names_of_others(given)
    settings = asdict(default)  # type: ignore[call-overload]
    config = flags.parse(
        config_class,
        given,
        switches=_switches(settings),
        default=default,
        prog="train_gpt2.py [PRESET | RUN | config.json]",
        description=f"Presets: {', '.join(presets)}.\nRUN: a run's folder; that run goes on.",
    )
    if not all(is_given(name, words) for name in _names(settings)):
        _refuse_idle(config, words)
    if config.minutes:  # type: ignore[attr-defined]
        _refuse_two_lengths(words)
    if is_given("steps", given) and not is_given("optim.warmup_steps", given):
        config = scale_warmup(config, default)
    warn_of_warmup(config)
    if is_given("model.n_ctx", given) and not is_given("micro_batch", given):
        note_micro_batch(config, default)
    return config


def _switches(settings: Mapping) -> set[str]:
    """The flags of these settings that are True or False."""
    pairs = [flag.removeprefix("--").split("=", 1) for flag in as_flags(settings)]
    return {name for name, value in pairs if value in ("True", "False")}


def _names(settings: Mapping) -> list[str]:
    """All their flags."""
    return [flags.name_of(flag.partition("=")[0]) for flag in as_flags(settings)]


def _refuse_names_of_others(given: Sequence[str]) -> None:
    """Raises BadInput with what nanoGPT's flags are called here, for all of them at once."""
    names = [flags.name_of(word.partition("=")[0]) for word in given]
    if line := hints.translate(names):
        raise BadInput(line)


def _refuse_idle(config: Any, words: Sequence[str]) -> None:
    """Raises BadInput for a typed flag that only another choice than the run's would read. Not to
    be asked of a script that writes all flags down."""
    for word in words:
        name = flags.name_of(word.partition("=")[0])
        for prefix, choice, values in READ_WITH:
            taken = attrgetter(choice)(config)
            if name.startswith(prefix) and taken not in values:
                raise BadInput(f"--{name} is read with --{choice} {' or '.join(values)}, and this "
                               f"run has {taken}: leave it out, or choose that")


def _refuse_two_lengths(words: Sequence[str]) -> None:
    """Raises BadInput where --minutes isn't all that was typed of the run's length."""
    for name in ("steps", "optim.warmup_steps"):
        if is_given(name, words):
            raise BadInput(f"--minutes plans the steps, and the preset's share of them for the "
                           f"warm-up: leave out --{name}, or --minutes")


def is_given(name: str, given: Sequence[str]) -> bool:
    """Whether a flag is among these, as --name VALUE or --name=VALUE (tyro takes - for _ too)."""
    return name in [flags.name_of(word.partition("=")[0]) for word in given]


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
        print(console.warning(
            f"--optim.warmup_steps {warmup:,} is no shorter than the run, --steps {steps:,}: the "
            "learning rate never gets past its warm-up"), flush=True)


def note_micro_batch(config: Any, preset: Any) -> None:
    """Says on rank 0 that the preset's micro-batch was made for another context, and what of this
    one is as much work for a GPU at once."""
    now, before = config.model.n_ctx, preset.model.n_ctx
    same_work = preset.micro_batch * before // max(now, 1)
    if now == before or same_work == 0 or env_number("RANK", 0) > 0:
        return
    print(f"note: --micro_batch {preset.micro_batch} is the preset's, for sequences of {before:,} "
          f"tokens; of {now:,}, --micro_batch {same_work} is as much for a GPU at once", flush=True)


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
    given = as_flags(content)
    for flag in given:
        if "\0" in flag:  # no name of a file can hold one, and a shell can't hand it over
            raise BadInput(f"{path} holds a zero character: {flag!r}")
    return given


def _is_run(folder: Path) -> bool:
    """Whether a run lies there. Raises BadInput for one of its checkpoints."""
    if (folder / "manifest.json").exists() and (folder / "model.safetensors").exists():
        raise BadInput(f"{folder} is a checkpoint: `train_gpt2.py RUN` goes on with a whole run, "
                       f"--init {folder} starts a new one from these weights")
    return (folder / "config.json").exists() and (folder / "metrics.jsonl").exists()


def _flags_of_run(folder: Path) -> list[str]:
    """A run's own settings, under the name and in the place that its folder has now."""
    if folder.name in ("", ".."):
        folder = folder.resolve()
    saved = _flags_of_file(folder / "config.json")
    if "--resume=never" in saved:  # it was a new run then
        saved.append("--resume=auto")
    return [*saved, f"--name={folder.name}", f"--out_dir={folder.parent}"]


def as_flags(settings: Mapping, prefix: str = "") -> list[str]:
    """{"model": {"n_layer": 2}} -> ["--model.n_layer=2"]; so a value may begin with - too."""
    written: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            written += as_flags(value, "" if key in BARE else f"{prefix}{key}.")
        else:
            written.append(f"--{prefix}{key}={value}")
    return written


def quoted(path: str | Path) -> str:
    """A path for a command that a user may paste: as a shell takes it, and never for a flag."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def quoted_flag(flag: str, value: str) -> str:
    """--flag VALUE for a command that a user may paste, whatever the value begins with."""
    words = [f"--{flag}", value]
    if value.startswith("-"):  # or it would be taken for a flag itself
        words = ["=".join(words)]
    return shlex.join(words)


def within(flag: str, value: float, low: float, high: float = math.inf, unit: str = "") -> None:
    """Raises BadInput where a flag's number lies outside low to high, or is infinite or NaN."""
    if low <= value <= high and value < math.inf:
        return
    expected = f"at least {low:,}" if high == math.inf else f"{low:,} to {high:,}"
    raise BadInput(f"--{flag} {value}: expected {expected} {unit}".rstrip())
