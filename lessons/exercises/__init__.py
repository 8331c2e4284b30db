"""Stubs to fill in: `python -m lessons.grade` says which are right."""
