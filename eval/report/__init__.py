"""A run as a page: a verdict against a published curve, pictures, events, samples.

    python -m eval.report runs/gpt2-124m                      # runs/gpt2-124m/report/index.html
    python -m eval.report runs/a runs/b --out compared        # which is better; compared/index.html
    python -m eval.report --seeds runs/a runs/b               # one setting: mean, p-value; no page

The page is one file that needs no network, and the pictures lie beside it as PNG. The published
curve is the one of the run's own shape where the validation sets are the same (curves.py), or the
one that --against names: llmc-124m, llmc-350m. Several runs are compared with each other too; runs
on different data are refused.

    record.py     what a run has written
    curves.py     llm.c's published losses
    verdict.py    the one against the other; causes.py: why a run leaves a curve
    better.py     which of several runs is better, and whether by more than noise
    seeds.py      runs of one setting: mean, deviation, and whether they beat a target
    charts.py     what each picture shows; pictures.py: PNG and SVG
    page.py       all of it as HTML

The judges beside this folder (hellaswag, tasks, ...) never import it.
"""

from eval.report.page import write_report
from eval.report.pictures import plot_losses

__all__ = ["plot_losses", "write_report"]
