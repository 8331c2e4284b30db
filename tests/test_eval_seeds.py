"""Runs of one setting, each of another seed: mean, deviation, and whether they beat a target."""

import json
import math
from pathlib import Path

import pytest

from eval.report.__main__ import Arguments, main
from eval.report.seeds import Seeds, describe, read_seeds
from launch import flags
from launch.errors import BadInput
from tests.test_eval_better import OWN, SHAPE, own_run
from tests.test_eval_report import SAME, row, write_run

# modded-nanogpt's records print their losses and scipy.stats.ttest_1samp(losses, 3.28,
# alternative="less").pvalue: those of 153.9 s and of 151.5 s, and a baseline of 132.6 s.
PUBLISHED = [
    ([3.2813, 3.2778, 3.2781, 3.2764, 3.2770, 3.2787, 3.2767, 3.2807, 3.2769, 3.2774], 0.0030),
    ([3.2786, 3.2798, 3.2762, 3.2781, 3.2778, 3.2801, 3.2774, 3.2772, 3.2777, 3.2789], 0.0005),
    ([3.2796, 3.2781, 3.2798, 3.2793], 0.06323),
]


def of(losses: list[float]) -> Seeds:
    return Seeds(list(range(len(losses))), losses, SAME)


def finished(folder: Path, loss: float, seed: int, lr: float = 0.1, **config) -> Path:
    return own_run(folder, {0: 10.8, 20: loss}, lr, seed=seed, **({"steps": 20} | config))


def lines_of(runs: list[Path], capsys, *more: str) -> list[str]:
    main(flags.parse(Arguments, ["--seeds", *map(str, runs), *more]))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("losses", "p"), PUBLISHED)
def test_p_values_are_the_published_ones(losses, p):
    """To the digits that were printed."""
    digits = 5 if p > 0.01 else 4
    assert round(of(losses).p_value(3.28), digits) == p


def test_p_values_of_two_and_of_three_runs_are_those_of_the_formula():
    """Student's distribution function for one and for two degrees of freedom is elementary: 1/2 +
    atan(t) / pi, and 1/2 + t / (2 sqrt(2 + t^2))."""
    two, three = of([3.0, 3.2]), of([3.0, 3.1, 3.3])
    for target in (2.9, 3.1, 3.5):
        t = (target - two.mean) / (math.sqrt(0.02) / math.sqrt(2))
        assert two.p_value(target) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-12)
        t = (target - three.mean) / (three.deviation / math.sqrt(3))
        expected = 0.5 - t / (2 * math.sqrt(2 + t**2))
        assert three.p_value(target) == pytest.approx(expected, abs=1e-12)


def test_equal_losses_leave_nothing_to_chance():
    assert of([3.2, 3.2]).p_value(3.28) == 0
    assert of([3.2, 3.2]).p_value(3.2) == 1
    assert "p < 1e-12" in describe(of([3.2, 3.2]), 0)[1]


def test_track_3s_rule_counts_the_runs(tmp_path):
    """Its first entries (pull requests 266 and 321): one run at 3.27523, twenty at 3.278856 and
    3.279254."""
    assert of([3.27523]).track_3(3.28) == pytest.approx(0.00477)
    assert of([3.278856] * 20).track_3(3.28) == pytest.approx(0.00511, abs=1e-5)
    assert describe(of([3.278856] * 20), 0)[2].endswith("0.0051, >= 0.004, met")
    assert describe(of([3.279254] * 20), 0)[2].endswith("0.0033, not met, 0.004 is asked")
    assert describe(of([3.278] * 4), 0)[2].endswith("0.0040, >= 0.004, met")


def test_finished_runs_are_summed_up_in_three_lines(tmp_path, capsys):
    runs = [write_run(tmp_path / str(seed), [row(9, val_loss=4.0, val_set=SAME),
                                             row(10, val_loss=loss, val_set=SAME)],
                      {"seed": seed, "steps": 10})
            for seed, loss in enumerate(PUBLISHED[1][0])]
    assert lines_of(runs, capsys) == [
        "10 seeds (0, 1, 2, 3, 4, 5, 6, 7, 8, 9): mean 3.2782, standard deviation 0.0012 "
        f"({SAME})",
        "below 3.28: p = 0.00048, Student's t-test, one-sided, 9 degrees of freedom",
        "modded-nanogpt's rule (track 3, 124M on FineWeb): (3.28 - mean) * sqrt(n) = 0.0058, "
        ">= 0.004, met"]
    assert not (runs[0] / "report").exists()


def test_other_data_has_no_target_but_the_one_that_is_given(tmp_path, capsys):
    runs = [finished(tmp_path / str(seed), 4.0 + seed / 100, seed) for seed in (1, 2)]
    assert lines_of(runs, capsys) == [
        f"2 seeds (1, 2): mean 4.0150, standard deviation 0.0071 ({OWN})",
        "no target is known for this validation set: --target LOSS"]
    assert lines_of(runs, capsys, "--target", "4.05")[1].startswith(
        "below 4.05: p = 0.045, Student's t-test, one-sided, 1 degree of freedom")


@pytest.mark.parametrize(("change", "line"), [
    (dict(lr=0.2), r"a and .*b differ in more than the seed: optim.lr 0.1 and 0.2$"),
    (dict(model=SHAPE | {"n_layer": 3}), "differ in more than the seed: model.n_layer 2 and 3$"),
    (dict(seed=1), "a and .*b have the same --seed 1: one more run of it tells nothing of chance"),
    (dict(steps=40), r"b isn't finished, .* step of 40: at step 20 of 40: running, or killed"),
])
def test_runs_that_are_no_seeds_of_one_setting_are_refused(change, line, tmp_path):
    runs = [finished(tmp_path / "a", 4.0, seed=1),
            finished(tmp_path / "b", **(dict(loss=4.1, seed=2) | change))]
    with pytest.raises(BadInput, match=line) as caught:
        read_seeds(runs)
    assert "\n" not in str(caught.value)


def test_other_commits_are_not_one_setting(tmp_path):
    runs = [finished(tmp_path / str(seed), 4.0, seed) for seed in (1, 2)]
    for run, code in zip(runs, ("a" * 40, "b" * 40), strict=True):
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"code": code}))
    with pytest.raises(BadInput, match="the seed: code aaaaaaa and bbbbbbb"):
        read_seeds(runs)


def test_one_run_and_a_run_that_says_nothing_of_itself_are_refused(tmp_path):
    run = finished(tmp_path / "a", 4.0, seed=1)
    with pytest.raises(BadInput, match="--seeds takes two runs or more: one has no deviation"):
        read_seeds([run])
    with pytest.raises(BadInput, match="a run is named twice"):
        read_seeds([run, run])
    bare = finished(tmp_path / "b", 4.0, seed=2)
    (bare / "config.json").unlink()
    with pytest.raises(BadInput, match="b says nothing of its seed and steps: looked for"):
        read_seeds([run, bare])


@pytest.mark.parametrize(("more", "line"), [
    (("--seeds", "--out", "x"), "--seeds prints lines and writes no page: leave out"),
    (("--seeds", "--target", "nan"), "--target nan: expected 0 to 100 nats"),
    (("--target", "3.28"), "--target is what the mean of --seeds RUN1 RUN2 ... is compared with"),
])
def test_flags_that_do_not_go_together_are_refused(more, line, tmp_path):
    runs = [str(finished(tmp_path / str(seed), 4.0, seed)) for seed in (1, 2)]
    with pytest.raises(BadInput, match=line):
        main(flags.parse(Arguments, [*runs, *more]))
