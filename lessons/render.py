"""Runs lessons, and renders each as an offline page: text beside code, and below what came out.

    python -m lessons.render           # all ten, one after the other: make lessons
    python -m lessons.render 3         # one

Writes runs/lessons/NN.html and runs/lessons/index.html. A lesson that doesn't reach its figures
ends there, its page says so, and the next one is run. Exit code 0, or 1 where one did not.
"""

import ast
import base64
import contextlib
import html
import io
import re
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from types import ModuleType
from typing import Annotated

import tyro
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from launch import flags
from launch.errors import BadInput, run_command
from launch.files import atomic_write
from lessons import course

HERE = Path(__file__).parent
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1>
"""


@dataclass(frozen=True)
class Arguments:
    """Runs lessons and renders each as a page."""

    lessons: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Numbers of lessons; all ten by default."""


def cells(source: str) -> Iterator[tuple[str, str, str]]:
    """(heading, prose, code) of the docstring, and of each `# %% heading` with the comment that
    follows it. Lines stand before the code, empty ones, so that it keeps its line numbers."""
    marks = [m.start() for m in re.finditer(r"^# %%", source, re.MULTILINE)]
    for begin, end in pairwise([0, *marks, len(source)]):
        above, lines = source.count("\n", 0, begin), source[begin:end].split("\n")
        if begin == 0:
            heading, _, prose = (ast.get_docstring(ast.parse(source)) or "").partition("\n")
            count = ast.parse(source).body[0].end_lineno or 0
        else:
            heading, count = lines[0][4:].strip(), 1
            while count < len(lines) and lines[count].startswith("#"):
                count += 1
            prose = "\n".join(line[1:].removeprefix(" ") for line in lines[1:count])
        code = "\n" * (above + count) + "\n".join(lines[count:]).rstrip()
        yield heading.removesuffix("."), prose, code


def text_html(prose: str) -> str:
    """Paragraphs; indented lines stay as they are, and `names` are code."""
    parts = []
    for kind, lines in groupby(prose.split("\n"), lambda line: (line[:2] == "  ", not line)):
        text = html.escape(textwrap.dedent("\n".join(lines)), quote=False)
        text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
        parts.append(f"<pre>{text}</pre>" if kind[0] else f"<p>{text}</p>" if text else "")
    return "".join(parts)


def cell_html(heading: str, prose: str, code: str, said: str,
              pictures: list[tuple[Path, str]]) -> str:
    """A row: text left, code and what came out right (above each other on a narrow screen)."""
    right = highlight(code, PythonLexer(), HtmlFormatter(cssclass="code")) if code.strip() else ""
    said = re.sub(r"^picture: .*\n", "", said, flags=re.MULTILINE)  # it stands below
    if said:
        right += f'<pre class="said">{html.escape(said)}</pre>'
    for path, words in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        right += f'<img alt="{html.escape(words)}" src="data:image/png;base64,{data}">'
    title = f"<h2>{html.escape(heading)}</h2>" if heading else ""
    kind = "" if right else ' class="alone"'
    return f"<section{kind}><div>{title}{text_html(prose)}</div><div>{right}</div></section>\n"


def run_and_render(path: Path) -> bool:
    """Runs a lesson cell by cell, as the program __main__, and writes its page. Whether it reached
    its figures."""
    sys.argv, start, problem = [str(path)], time.monotonic(), ""
    program = sys.modules["__main__"] = ModuleType("__main__")
    program.__file__ = str(path)
    (title, intro, _), *rest = cells(path.read_text())
    body = cell_html("", intro, "", "", [])
    for heading, prose, code in rest:
        said, drawn, ended_by = io.StringIO(), len(course.pictures), ""
        if not problem:
            try:
                with contextlib.redirect_stdout(said):
                    exec(compile(code, str(path), "exec"), program.__dict__)
            except SystemExit as end:
                ended_by = str(end.code) if end.code else ""
            except Exception:
                ended_by = traceback.format_exc(limit=-2)
            problem = ended_by
        print(said.getvalue(), end="", flush=True)
        body += cell_html(heading, prose, code, said.getvalue() + ended_by, course.pictures[drawn:])
    state = "stopped short of its figures" if problem else "reached its figures"
    body += f'<p class="state">{state}, {time.monotonic() - start:.0f} s</p>\n'
    write_page(f"{path.name[:2]}.html", title, '<p><a href="index.html">all lessons</a></p>' + body)
    if problem:
        print(problem, file=sys.stderr)
    return not problem


def write_page(name: str, title: str, body: str) -> None:
    style = (HERE / "page.css").read_text() + HtmlFormatter(style="default").get_style_defs(".code")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".code")
    style += f"\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"
    page = HEAD.format(title=html.escape(title), style=style) + body + "</body></html>\n"
    atomic_write(course.OUT / name, page)


def write_index(paths: list[Path]) -> None:
    """Links to the pages that are there, each with how its lesson ended."""
    items = ""
    for path in paths:
        page = course.OUT / f"{path.name[:2]}.html"
        title, _, _ = next(cells(path.read_text()))
        state = "not run yet"
        if page.is_file():
            (state,) = re.findall(r'<p class="state">(.*)</p>', page.read_text())
            title = f'<a href="{page.name}">{html.escape(title)}</a>'
        items += f"<li>{title}<br><small>{state}</small></li>\n"
    write_page("index.html", "Ten lessons", f"<ul>\n{items}</ul>\n")


def main(arguments: Arguments) -> int:
    paths = sorted(HERE.glob("[0-9][0-9]_*.py"))
    numbers = [number.zfill(2) for number in arguments.lessons]
    chosen = [path for path in paths if not numbers or path.name[:2] in numbers]
    if missing := set(numbers) - {path.name[:2] for path in chosen}:
        raise BadInput(f"there is no lesson {', '.join(missing)}: 1 to {len(paths)}")
    if len(chosen) == 1:
        reached = [run_and_render(chosen[0])]
    else:  # each in a process of its own, with the seeds and modules of its own
        reached = []
        for path in chosen:
            print(f"\n{path.stem}", flush=True)
            done = subprocess.run([sys.executable, "-m", "lessons.render", path.name[:2]])
            reached.append(done.returncode == 0)
    write_index(paths)
    print(f"pages: {course.OUT / 'index.html'}")
    return 0 if all(reached) else 1


if __name__ == "__main__":
    run_command(lambda: main(flags.parse(Arguments)))
