"""What all ten lessons share: two texts, figures with bands, pictures.

    import sys
    sys.path.insert(0, "..")  # for a notebook, which runs in its own folder
    sys.path.insert(0, ".")  # for a program, which runs in the repository's root
    from lessons import course

    words = course.names()
    course.figure("loss by counting", loss, 2.4540, 2.4540, lecture="2.4540")
    course.picture(figure, "counts")  # runs/lessons/02/counts.png

Texts come from the folder that GPT2_TEST_DATA names, else from runs/lessons/data, else from their
public addresses, checked by hash. Without a network the text that this project carries stands in,
one line says so, and figures have bands of their own or none.
"""

import math
import os
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data import corpus
from data import shakespeare as shakespeare_text
from launch import console, files
from launch.errors import BadInput, Failed
from lessons.stand_in import BANDS

if TYPE_CHECKING:  # half of the lessons draw nothing, and it takes a second to import
    from matplotlib.figure import Figure

OUT = Path("runs/lessons")
Band = tuple[float, float]


class Text(NamedTuple):
    """A text that the lectures use."""

    file: str
    url: str
    sha256: str
    size: int  # bytes


NAMES = Text("names.txt", "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt",
             "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d", 228_145)
SHAKESPEARE = Text(shakespeare_text.DEFAULT_PATH.name, shakespeare_text.URL,
                   shakespeare_text.SHA256, shakespeare_text.SIZE)

figures: list[tuple[str, float]] = []  # what this lesson has reached so far
pictures: list[tuple[Path, str]] = []  # files, and what each shows in words
_stand_ins: set[str] = set()  # texts that could not be had


class Wrong(Exception):
    """A student's answer is wrong. One line: the number seen, the right one, the mistake."""


def names() -> list[str]:
    """32,033 names, a to z, 2 to 15 letters; or the different words of the embedded text."""
    text = _read(NAMES)
    if text is not None:
        return text.splitlines()
    words = re.findall(r"\b[a-z]{2,15}\b", " ".join(corpus.bible_chapters()).lower())
    return list(dict.fromkeys(words))


def shakespeare() -> str:
    """1,115,394 characters of Shakespeare's plays; or the first so many of the embedded text."""
    text = _read(SHAKESPEARE)
    if text is not None:
        return text
    return "\n\n".join(corpus.bible_chapters())[: SHAKESPEARE.size]


def embedded(text: Text | None = None) -> bool:
    """Whether the embedded text has stood in for this one (None: for any) that can't be had."""
    if text is None:
        return bool(_stand_ins)
    return text.file in _stand_ins


def figure(what: str, value: float, low: float, high: float, lecture: str = "",
           embedded: Band | None = None, text: Text | None = None) -> None:
    """Prints a number beside the band that it has to lie in; the lesson ends where it does not.

    low == high: exact, to as many digits as low is written with: 0.0625 has four, and a count, 7,
    has to be 7. lecture: what the lecture reached. embedded: the band where the embedded text
    stands in; None: the one in stand_in.py, or no judgement. text: the one that the number rests
    on, in a lesson of two texts, of which one may be missing; None: on all that the lesson has
    asked for. Raises SystemExit(1) with one line for a number outside, too good ones as well.
    """
    value = float(value)
    figures.append((what, value))
    embedded = embedded or _stand_in_band()
    said = [f"lecture {lecture}"] if lecture else []
    stands_in = bool(_stand_ins)
    if text is not None:
        stands_in = text.file in _stand_ins
    if stands_in:
        said.append("on the embedded text")
        low, high = embedded or (low, high)
    judged = bool(embedded) or not stands_in
    places = max(_places(low), _places(high))
    counted = isinstance(low, int) and isinstance(high, int)  # and not rounded to whole numbers
    shown = _digits(value, 0 if counted and value.is_integer() else max(places, 4))
    if low != high:
        right = f"band {low} .. {high}"
        inside = low <= value <= high
    elif counted:
        right = f"exactly {low}"
        inside = value == low
    else:
        shown, right = f"{value:.{places}f}", f"exactly {low:.{places}f}"
        inside = math.isfinite(value) and round(value, places) == round(low, places)
    said.append(right if judged else "no band")
    print(f"{what:<48} {shown:>12}  ({'; '.join(said)})", flush=True)
    if judged and not inside:
        raise SystemExit(f"{what}: {shown} is outside, {right}")


def always(what: str, value: float, low: float, high: float, lecture: str = "") -> None:
    """A figure that has one band, whether a text is the lecture's or stands in for it."""
    figure(what, value, low, high, lecture, embedded=(low, high))


def _stand_in_band() -> Band | None:
    """stand_in.py's band for the figure that comes last so far. An indented one hangs on the one
    above it: its name there is both."""
    name = figures[-1][0]
    above = [what for what, _ in figures if not what.startswith(" ")]
    if name.startswith(" ") and above:
        name = above[-1] + name
    return BANDS.get(_script().name[:2], {}).get(name)


def _script() -> Path:
    return Path(str(getattr(sys.modules["__main__"], "__file__", "notebook")))


def _places(number: float) -> int:
    """Digits behind the point of a number as it is written: 0.0625 has 4, 5e-9 has 9."""
    exponent = Decimal(repr(number)).as_tuple().exponent
    assert isinstance(exponent, int), "a band has two finite ends"
    return max(0, -exponent)


def _digits(value: float, places: int) -> str:
    if 0 < abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:.{places}f}"


def picture(drawing: "Figure", name: str) -> None:
    """Saves a matplotlib figure as runs/lessons/NN/NAME.png."""
    path = OUT / _script().name[:2] / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=110, bbox_inches="tight")
    words = [name]
    for axes in drawing.axes:
        words += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
    pictures.append((path, ", ".join(word for word in dict.fromkeys(words) if word)))
    print(f"picture: {path}", flush=True)


def _read(text: Text) -> str | None:
    """A text of the lectures. None, and a line that says so, where it can't be had."""
    folder = os.environ.get("GPT2_TEST_DATA")
    if folder and (path := Path(folder, text.file)).is_file():
        if files.sha256(path) != text.sha256:
            print(f"error: {path} is another file than {text.url}: its sha256 differs; take it out "
                  "of the folder that GPT2_TEST_DATA names", file=sys.stderr)
            raise SystemExit(BadInput.exit_code)
        return path.read_text()
    path = OUT / "data" / text.file
    try:
        if not path.is_file() or files.sha256(path) != text.sha256:
            if os.environ.get("HF_HUB_OFFLINE"):  # the one switch for "no network" that people set
                raise Failed(f"could not download {text.url}: HF_HUB_OFFLINE is set")
            files.download(text.url, path, text.sha256, text.size)
    except Failed as error:
        if text.file not in _stand_ins:
            _stand_ins.add(text.file)
            print(console.warning(f"{error}: the embedded text stands in, with other figures. "
                                  f"For those of the lecture put the file at {path}, or name its "
                                  "folder in GPT2_TEST_DATA", sys.stderr),
                  file=sys.stderr, flush=True)
        return None
    return path.read_text()
