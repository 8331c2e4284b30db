"""Commands out of the pages that people read, each given to the parser of the program it names.

    for command in commands((ROOT / "README.md").read_text(), "README.md"):
        check(command)                      # AssertionError for what the program would refuse

A command is a line of a ```sh block, or a span of code in the text that begins with a program. What
a shell makes of it (comments, &&, pipes, variables, continued lines) is taken apart first. Programs
of this project parse their own flags, but don't run; of others it is checked that the files and the
extras exist which they are told to take.
"""

import argparse
import configparser
import contextlib
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import tyro
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

import train_gpt2
from launch import cli
from launch.errors import BadInput
from tests.running import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md",
         ROOT / "lessons" / "README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
VARIABLE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)
VENVS = (".venv/bin/", "build/gpu-check/venv/bin/")  # make's
# Modules that read sys.argv themselves, and how many arguments they take at most.
BARE_ARGUMENTS = {"kernels.selfcheck": 0, "tests.baseline_sampling": 2, "tests.measure_data": 2,
                  "tests.gpucheck.venv": 1, "tests.reduced": 1}
# Others' programs: what they do, none of which is ours to check.
OTHERS = {"cp", "echo", "grep", "jupyter", "rm", "scancel", "source", "tail", "tensorboard", "vllm"}
# sbatch's own flags that the pages use.
SBATCH = {"--array", "--nodes"}


class Command(NamedTuple):
    """One command of a page."""

    page: str
    words: list[str]  # as a shell hands them over
    variables: dict[str, str]  # that stand before it

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


class Parsed(Exception):
    """A program has understood its arguments, and would begin its work."""


def blocks(text: str, language: str) -> list[str]:
    """The contents of a page's ``` blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str, page: str) -> list[Command]:
    """Every command of a page or a part of it: those of its blocks, then those in its text."""
    found: list[Command] = []
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").split("\n"):
            found += split_line(line, page)
    for span in spans(text):
        if is_command(span):
            found += split_line(span, page)
    return found


def spans(text: str) -> list[str]:
    """The spans of code in a page, its blocks left out."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose)]


def is_command(span: str) -> bool:
    """Whether a span of code is a command: a program of ours with an argument, or make's."""
    words = span.split()
    while words and VARIABLE.fullmatch(words[0]):
        words = words[1:]
    return len(words) > 1 and program_of(words[0]) in CHECKS


def program_of(word: str) -> str:
    """What is started, whichever environment it is taken from."""
    for venv in VENVS:
        word = word.removeprefix(venv)
    return word


def split_line(line: str, page: str) -> Iterator[Command]:
    """The commands of one line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"  # split at blanks and punctuation alone
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in ("|", "&&", ";", "||"):
            words.append(word)
            continue
        if ">" in words:
            words = words[: words.index(">")]
        variables = {}
        while words and (match := VARIABLE.fullmatch(words[0])):
            variables[match[1]] = match[2]
            words = words[1:]
        if words:
            yield Command(page, words, variables)
        words = []


def check(command: Command) -> None:
    """Raises AssertionError where the program would refuse the command."""
    for name in command.variables:
        assert is_known_variable(name), f"{command}: nobody reads {name}"
    program, *arguments = command.words
    program = program_of(program)
    if program in OTHERS:
        return
    assert program in CHECKS, f"{command}: no program that tests/pages.py knows"
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            CHECKS[program](arguments)
    except Parsed:
        pass
    except SystemExit as leaving:
        assert leaving.code == 0, f"{command}\n{said.getvalue()}"  # 0: --help
    except (AssertionError, BadInput, ModuleNotFoundError) as problem:
        raise AssertionError(f"{command}\n{problem}") from None


def is_known_variable(name: str) -> bool:
    """Whether torchrun, pip, or a file of this project that is no page reads this variable."""
    if name.startswith("PET_"):
        return name.removeprefix("PET_").lower() in vars(torchrun_defaults())
    return name.startswith("PIP_") or re.search(rf"\b{name}\b", sources()) is not None


@functools.cache
def torchrun_defaults() -> argparse.Namespace:
    return get_args_parser().parse_args(["script.py"])


@functools.cache
def sources() -> str:
    """All that this project's programs and scripts say."""
    listed = subprocess.run(["git", "ls-files", "*.py", "launch/*", "Makefile", ".ci/run"],
                            cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    named = [name for name in listed if not name.startswith("tests/test_")]  # which try wrong ones
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in named)


# ---- the programs ----

def check_python(arguments: list[str]) -> None:
    """python FILE ..., python -m MODULE ..."""
    if arguments[0] == "-m":
        check_module(arguments[1], arguments[2:])
    elif arguments[0].startswith("lessons/"):
        assert (ROOT / arguments[0]).is_file(), f"{arguments[0]} is not here"
        assert set(arguments[1:]) <= {"--full"}, arguments
    else:
        assert arguments[0] == "train_gpt2.py", f"python {arguments[0]}: no program"
        check_training(arguments[1:])


def check_training(arguments: list[str]) -> None:
    """The flags of train_gpt2.py. A run need not exist: the preset stands for it."""
    if arguments and re.fullmatch(r"runs/[\w-]+(/config\.json)?", arguments[0]):
        arguments = ["demo", *arguments[1:]]
    cli.parse(train_gpt2.TrainConfig, train_gpt2.PRESETS, arguments).check()


def check_module(module: str, arguments: list[str]) -> None:
    """python -m MODULE: the module's own parser reads the arguments, then Parsed is raised."""
    if module == "pytest":
        return check_pytest(arguments)
    spec = find_spec(module) or find_spec(f"{module}.__main__")
    assert spec and spec.origin, f"no module {module}"
    if spec.submodule_search_locations:
        spec = find_spec(f"{module}.__main__")
        assert spec and spec.origin, f"{module} can't be run"
    if module in BARE_ARGUMENTS:
        assert len(arguments) <= BARE_ARGUMENTS[module], arguments
        return None
    with (
        mock.patch.object(tyro, "cli", parse_only(tyro.cli)),
        mock.patch.object(tyro.extras, "subcommand_cli_from_dict", parse_only_subcommands),
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_only(PARSE_ARGS)),
        mock.patch.object(sys, "argv", [module, *arguments]),
    ):
        runpy.run_path(spec.origin, run_name="__main__")
    raise AssertionError(f"{module} reads no arguments: add it to BARE_ARGUMENTS")


PARSE_ARGS = argparse.ArgumentParser.parse_args
SUBCOMMANDS = tyro.extras.subcommand_cli_from_dict


def parse_only(parse: Callable) -> Callable:
    """The same parser, which raises Parsed in the place of what would follow."""

    def parser(target: Any, *rest: Any, **settings: Any) -> Any:
        if callable(target) and not isinstance(target, type):
            target = without_body(target)
        parse(target, *rest, **settings)
        raise Parsed

    return parser


def parse_only_subcommands(functions: dict[str, Callable], **settings: Any) -> None:
    SUBCOMMANDS({name: without_body(body) for name, body in functions.items()}, **settings)


def without_body(function: Callable) -> Callable:
    """A function with the same signature, annotations and docstring, that raises Parsed."""

    @functools.wraps(function)
    def stub(*_: Any, **__: Any) -> None:
        raise Parsed

    return stub


def check_torchrun(arguments: list[str]) -> None:
    """torchrun's own flags, then the program's."""
    args = get_args_parser().parse_args(arguments)
    if args.module:
        check_module(args.training_script, args.training_script_args)
    else:
        check_python([args.training_script, *args.training_script_args])


def check_bash(arguments: list[str]) -> None:
    """bash launch/slurm.sbatch [sbatch's flags --] the run's."""
    script, *rest = arguments
    assert script == "launch/slurm.sbatch", f"bash {script}"
    if "--" in rest:
        dashes = rest.index("--")
        for option in rest[:dashes]:
            assert option.partition("=")[0] in SBATCH, f"no flag of sbatch: {option}"
        rest = rest[dashes + 1 :]
    if rest:
        check_training([word.replace("%a", "1") for word in rest])


def check_make(arguments: list[str]) -> None:
    """make itself reads its arguments; what it would run is read as any other command."""
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        python = line.startswith(tuple(f"{venv}python" for venv in VENVS))
        if python and " -m venv " not in line and " pip " not in line:
            for command in split_line(line, "Makefile"):
                check(command)


def check_pip(arguments: list[str]) -> None:
    """pip install: extras that setup.cfg has, a file of constraints that is here."""
    assert arguments[0] == "install", arguments
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    words = iter(arguments[1:])
    for word in words:
        if word == "-c":
            assert (ROOT / next(words)).is_file(), arguments
        elif word.startswith("."):
            for extra in re.findall(r"\w+", word):
                assert extra in config["options.extras_require"], f"no extra {extra}"
        elif not word.startswith("-"):
            Requirement(word)


def check_pytest(arguments: list[str]) -> None:
    """pytest: paths that are here, a marker that is registered; -k and the rest are pytest's."""
    for word in arguments:
        path = word.partition("::")[0]
        assert not path.startswith("tests") or list(ROOT.glob(path)), f"{path} is not here"
    if "-m" in arguments:
        marker = arguments[arguments.index("-m") + 1]
        assert f"\n    {marker}:" in (ROOT / "setup.cfg").read_text(), f"no marker {marker}"


def check_files(arguments: list[str]) -> None:
    """docker, kubectl, sky: the files of launch/ that they are told to take, and a run's flags."""
    for word in arguments:
        assert not word.startswith("launch/") or (ROOT / word).is_file(), f"{word} is not here"
        if word.startswith("ARGS="):
            check_training(shlex.split(word.removeprefix("ARGS=")))


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "python": check_python, "torchrun": check_torchrun, "launch/torchrun.sh": check_training,
    "bash": check_bash, "make": check_make, "pip": check_pip, "pytest": check_pytest,
    "docker": check_files, "kubectl": check_files, "sky": check_files,
}
