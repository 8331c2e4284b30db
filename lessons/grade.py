"""Grades what a student has filled into lessons/exercises.

    python -m lessons.grade        # all ten
    python -m lessons.grade 03     # one
"""

import importlib
import sys

from lessons.course import Wrong


def grade(number: str, answers: str = "exercises") -> list[str]:
    """One line for each exercise of a lesson: right, or which mistake gives the number seen."""
    module = importlib.import_module(f"lessons.{answers}.e{number}")
    checks = importlib.import_module(f"lessons.checks.c{number}").CHECKS
    lines = []
    for name, check in checks.items():
        try:
            check(getattr(module, name))
            lines.append(f"{number} {name}: right")
        except NotImplementedError:
            lines.append(f"{number} {name}: to do")
        except Wrong as wrong:
            lines.append(f"{number} {name}: {wrong}")
    return lines


if __name__ == "__main__":
    for number in sys.argv[1:]:
        print("\n".join(grade(number.zfill(2))))
