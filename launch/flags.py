"""Flags as all commands here have them.

    main(flags.parse(Arguments))    # a dataclass
    flags.parse(main)               # or a function, which is called with them
    flags.parse_subcommand({"verify": verify, "info": info})    # one of several functions

Underscores in help, as in README (dashes are understood too). A switch takes no value, --json, or
the one that a configuration file writes, --json True.
"""

import inspect
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from launch.errors import env_number

T = TypeVar("T")
BOOLEANS = {"true": "True", "false": "False"}
REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _boolean(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """How help shows a switch: its value may be left out."""
    if info.type is not bool:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="[{True,False}]",
        choices=("True", "False"),
        instance_from_str=lambda words: words[0] == "True",
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def parse(
    command: Callable[..., T], arguments: Sequence[str] | None = None,
    switches: Collection[str] | None = None, **options: Any,
) -> T:
    """What `command`, a class or a function, makes of the command line. A wrong flag ends the
    program with tyro's box, from rank 0, and exit code 2.

    switches: the names of flags that are True or False; by default those of command's own
    parameters. options: of tyro.cli.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if switches is None:
        switches = switches_of(command)
    return tyro.cli(command, args=spell_out(given, switches), **(_as_all_commands() | options))


def parse_subcommand(
    commands: Mapping[str, Callable[..., Any]], arguments: Sequence[str] | None = None
) -> None:
    """Calls the function whose name comes first on the command line, with the flags behind it.
    A wrong name or flag ends the program as in parse()."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    switches = set[str]().union(*map(switches_of, commands.values()))
    tyro.extras.subcommand_cli_from_dict(
        dict(commands), args=spell_out(given, switches), **_as_all_commands()
    )


def _as_all_commands() -> dict[str, Any]:
    """Options of tyro that every command here has."""
    return {
        "prog": program(),
        "use_underscores": True,
        "config": (tyro.conf.FlagConversionOff,),  # or --json True would be refused
        "registry": REGISTRY,
        "console_outputs": env_number("RANK", 0) == 0,
    }


def switches_of(command: Callable[..., Any]) -> set[str]:
    """The names of a command's parameters that are True or False."""
    parameters = inspect.signature(command).parameters.values()
    return {one.name for one in parameters if isinstance(one.default, bool)}


def spell_out(given: Sequence[str], switches: Collection[str]) -> list[str]:
    """--json -> --json True, where no value follows."""
    spelled = []
    for i, word in enumerate(given):
        previous = given[i - 1] if i > 0 else ""
        if name_of(previous) in switches and word.lower() in BOOLEANS:
            word = BOOLEANS[word.lower()]
        spelled.append(word)
        following = given[i + 1] if i + 1 < len(given) else ""
        if name_of(word) in switches and following.lower() not in BOOLEANS:
            spelled.append("True")
    return spelled


def name_of(word: str) -> str:
    """--out-dir -> out_dir; '' for what is no flag, or a flag and its value in one, --a=b."""
    if not word.startswith("--") or "=" in word:
        return ""
    return word.removeprefix("--").replace("-", "_")


def program() -> str:
    """What was typed: `python -m eval.sample`, or a script's name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def unquoted(default: str) -> str:
    """A default with an apostrophe as people write it, and not as a shell wants it. For
    tyro.conf.arg(help_behavior_hint=unquoted)."""
    return f'(default: "{" ".join(shlex.split(default))}")'
