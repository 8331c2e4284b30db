"""Which of several runs is better: by how much, and what such a difference is worth."""

import math
from pathlib import Path

import numpy as np
import pytest

from eval.report import write_report
from eval.report.__main__ import Arguments, main
from eval.report.better import evaluation_noise, rank, student_t
from eval.report.charts import Entry
from eval.report.record import read_records
from eval.report.verdict import judge
from launch.errors import BadInput
from tests.test_eval_report import BATCH_TOKENS, SAME, Reader, row, val_rows, write_run

OWN = "my letters, 50,000 tokens"
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_ctx": 64}


def own_run(folder: Path, losses: dict[int, float], lr: float = 0.1, **config) -> Path:
    """A run of one's own: {step: validation loss}."""
    rows = [row(step, val_loss=loss, val_set=OWN) for step, loss in losses.items()]
    return write_run(folder, rows, {"model": SHAPE, "optim": {"lr": lr}} | config)


def ranking_of(runs: list[Path]):
    return rank([Entry(record, judge(record)) for record in read_records(runs)])


def test_a_better_run_by_the_scatter_of_seeds(tmp_path):
    """s^2 = (0.01^2 / 2 + 0.03^2 / 2) / 2, two degrees of freedom, means of two and of two runs."""
    runs = [own_run(tmp_path / name, {0: 10.8, 10: loss}, lr, seed=seed)
            for name, loss, lr, seed in [("a1", 4.30, 1, 1), ("a2", 4.31, 1, 2),
                                         ("b1", 4.00, 2, 1), ("b2", 4.03, 2, 2)]]
    ranking = ranking_of(runs)
    noise = 4.3027 * math.sqrt(0.0005 / 2)
    assert ranking.noise == [None, pytest.approx(noise, rel=1e-4)]
    assert ranking.headline == ("b1 (2 seeds) is better than a1 (2 seeds) by 0.2900, more than "
                                "noise (± 0.0680)")
    assert (ranking.better, ranking.source) == (True, "seeds")
    assert [setting.places for setting in ranking.settings] == [[2, 3], [0, 1]]
    assert [setting.differs for setting in ranking.settings] == ["optim.lr 2", "optim.lr 1"]
    assert "differ by 0.0158 within a setting" in ranking.notes[-1]


def test_three_settings_share_the_five_percent(tmp_path):
    """Three pairs, one degree of freedom: Student's t for 5 % / 3 is 38.19 (tan of the angle)."""
    runs = [own_run(tmp_path / name, {10: loss}, lr, seed=seed)
            for name, loss, lr, seed in [("a1", 4.00, 1, 1), ("a2", 4.02, 1, 2),
                                         ("b", 4.10, 2, 1), ("c", 4.20, 3, 1)]]
    ranking = ranking_of(runs)
    t = math.tan(math.pi / 2 * (1 - 0.05 / 3))
    noise = t * math.sqrt(0.0002) * math.sqrt(1 / 2 + 1)
    assert ranking.noise[1:] == [pytest.approx(noise), pytest.approx(noise)]
    assert ranking.headline.startswith("no difference that is more than noise: a1 (2 seeds) is "
                                       "lower than b by 0.0900, noise ± 0.66")
    assert not ranking.better


def test_runs_that_differ_in_the_seed_alone_have_a_mean(tmp_path):
    runs = [own_run(tmp_path / str(seed), {10: 4.0 + seed / 100}, seed=seed) for seed in (1, 2, 3)]
    assert ranking_of(runs).headline == ("these runs differ in the seed alone: mean 4.0200, "
                                         "standard deviation 0.0100")


def test_the_same_seed_twice_is_no_scatter(tmp_path):
    """It would be 0, and any difference more than noise."""
    runs = [own_run(tmp_path / "a", {10: 4.0}, seed=1), own_run(tmp_path / "b", {10: 4.0}, seed=1),
            own_run(tmp_path / "c", {10: 3.9}, lr=2, seed=1)]
    ranking = ranking_of(runs)
    assert len(ranking.settings) == 3
    assert (ranking.better, ranking.source) == (False, "")


def test_runs_without_a_config_are_settings_of_their_own(tmp_path):
    runs = [own_run(tmp_path / "a", {10: 4.0}), own_run(tmp_path / "b", {10: 3.9})]
    for run in runs:
        (run / "config.json").unlink()
    assert len(ranking_of(runs).settings) == 2


@pytest.mark.parametrize(("gap", "words"), [
    (0.02, "no difference that is more than noise: a is lower than b by 0.0100, noise ± 0.0388"),
    (0.50, "a is lower than b by 0.4900, more than the evaluations' scatter of ± 0.0388: whether "
           "another seed would change that can't be told"),
])
def test_one_run_each_is_judged_by_its_evaluations_and_never_called_better(tmp_path, gap, words):
    """Six evaluations at 2, 4, 8 ... steps, b above a by gap and 0.01 up and down in turn: each of
    the four inner ones is 0.02 from the middle between its neighbours, which scatters sqrt(1.5)
    times as much as one evaluation. They are worth 18 * 4 / 35 = 2 degrees of freedom: t 4.303."""
    steps = [2, 4, 8, 16, 32, 64]
    a = own_run(tmp_path / "a", {step: 5 - math.log(step) / 4 for step in steps})
    b = own_run(tmp_path / "b", {step: 5 - math.log(step) / 4 + gap + 0.01 * (-1) ** i
                                 for i, step in enumerate(steps)}, lr=2)
    ranking = ranking_of([a, b])
    noise = 4.3027 * 0.02 / math.sqrt(1.5)
    assert ranking.noise[1] == pytest.approx(noise, rel=1e-4)
    assert ranking.headline == words.replace("0.0388", f"{noise:.4f}")
    assert (ranking.better, ranking.source) == (False, "evaluations")
    assert "--seed" in ranking.notes[-1]


def test_evaluation_noise_takes_away_what_changes_slowly():
    tokens = np.array([100, 150, 300, 700, 800, 1500])
    slowly = 0.3 - 0.2 * np.log(tokens)
    assert evaluation_noise(tokens, slowly, 0.05) == pytest.approx(0, abs=1e-12)
    assert evaluation_noise(tokens[:3], slowly[:3], 0.05) is None


def test_evaluation_noise_covers_what_it_says():
    """Noise of one standard deviation, 1,000 times: beyond it lie 5 %, give or take 3 standard
    errors of 0.7 % and what the rounding of degrees of freedom makes up for."""
    draw = np.random.RandomState(0)
    tokens = np.arange(10, 22)
    beyond = 0
    for _ in range(1000):
        differences = draw.normal(0, 1, len(tokens) + 1)
        beyond += abs(differences[-1]) > evaluation_noise(tokens, differences[:-1], 0.05)
    assert 0.02 < beyond / 1000 < 0.08


def test_too_few_evaluations_tell_no_noise(tmp_path):
    runs = [own_run(tmp_path / "a", {0: 9.0, 10: 5.0, 20: 4.0}),
            own_run(tmp_path / "b", {0: 9.0, 10: 5.0, 20: 4.1}, lr=2)]
    ranking = ranking_of(runs)
    assert ranking.headline == "a is lower than b by 0.1000: whether that is noise can't be told"
    assert "2 evaluations in common where four are needed" in ranking.notes[-1]


def test_published_seeds_judge_runs_of_that_size_on_that_data(tmp_path):
    a = write_run(tmp_path / "a", val_rows(2_000))
    b = write_run(tmp_path / "b", val_rows(2_000, lambda step: 0.02), {"seed": 2, "init": "x"})
    c = write_run(tmp_path / "c", val_rows(2_000, lambda step: 0.01), {"seed": 2, "init": "x"})
    ranking = ranking_of([a, b])
    assert ranking.headline == "a is better than b by 0.0200, more than noise (± 0.0150)"
    assert ranking.source == "published"
    assert not ranking_of([a, c]).better


def test_runs_are_compared_where_all_have_an_evaluation(tmp_path):
    a = own_run(tmp_path / "a", {10: 5.0, 20: 4.5, 40: 4.0}, steps=40)
    b = own_run(tmp_path / "b", {10: 5.1, 20: 4.4}, steps=20)
    ranking = ranking_of([a, b])
    assert ranking.headline.startswith("b is lower than a by 0.1000")
    assert f"after {20 * BATCH_TOKENS:,} tokens" in ranking.notes[0]
    assert ranking.notes[1] == "Later evaluations are not shared by all runs: b ended there."
    assert "has run 50 % of its steps and the farthest 100 %" in ranking.notes[2]


def test_untrained_models_are_not_compared(tmp_path):
    a = own_run(tmp_path / "a", {0: 10.8, 10: 5.0})
    b = own_run(tmp_path / "b", {0: 10.9, 15: 5.0})
    ranking = ranking_of([a, b])
    assert ranking.headline.startswith("not compared with each other")
    assert ranking.settings == []


def test_students_quantiles_are_the_tables():
    """Abramowitz and Stegun, table 26.10."""
    for freedom, t in [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (30, 2.042)]:
        assert student_t(0.05, freedom) == pytest.approx(t, abs=6e-4)
    assert student_t(0.01, 4) == pytest.approx(4.604, abs=6e-4)


def test_own_runs_get_one_quiet_line_and_no_box(tmp_path, capsys):
    runs = [own_run(tmp_path / name, {10: 4.0, 20: 3.9}, lr)
            for lr, name in enumerate(("a", "b", "c", "<d>"))]
    main(Arguments(runs=tuple(runs)))
    printed = capsys.readouterr().out
    assert printed.count("Not compared with a published curve: none is of its shape") == 1
    page = (runs[0] / "report" / "index.html").read_text()
    assert page.count('class="verdict') == page.count('class="verdict ranking even"') == 1
    assert Reader(page).words.count("Not compared with a published curve") == 1
    assert "<d>" not in page and "&lt;d&gt;" in page


def test_only_those_that_are_not_compared_are_named(tmp_path):
    a = write_run(tmp_path / "a", val_rows(2_000))
    b = write_run(tmp_path / "b", val_rows(2_000), {"model": SHAPE})
    path, _ = write_report([a, b])
    words = Reader(path.read_text()).words
    assert "b: not compared with a published curve" in words
    assert "a: on track" in words


def test_the_page_goes_where_out_says(tmp_path, capsys):
    run = write_run(tmp_path / "run", [row(10, val_loss=4.0, val_set=SAME)])
    main(Arguments(runs=(run,), out=tmp_path / "new" / "folder"))
    path = tmp_path / "new" / "folder" / "index.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    assert path.exists() and path.with_name("loss.png").exists()
    assert not (run / "report").exists()


@pytest.mark.parametrize("name", ["page.html", "file"])
def test_out_is_a_folder(tmp_path, name):
    run = write_run(tmp_path / "run", [row(10, val_loss=4.0, val_set=SAME)])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="is no folder: the page will be index.html"):
        write_report([run], out=tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
