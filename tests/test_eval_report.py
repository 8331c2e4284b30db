"""The report: right verdicts on planted runs, nothing compared that can't be, a safe page."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from eval.report import plot_losses, write_report
from eval.report.__main__ import Arguments, main
from eval.report.curves import (
    BAND,
    BATCH_TOKENS,
    CURVES,
    EARLY_BAND,
    EARLY_UNTIL,
    TRAIN_NOISE,
    Points,
    interpolate,
    named_curve,
)
from eval.report.page import page
from eval.report.record import read_record, read_records
from eval.report.verdict import Verdict, judge
from launch.errors import BadInput
from tests.running import ROOT, environment

SAME = "fineweb sample-10BT, 10,485,760 tokens"
CURVE = CURVES["llmc-124m"]
CONFIG = {
    "steps": 18_865, "batch_tokens": BATCH_TOKENS, "init": "",
    "model": {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_ctx": 1024},
    "optim": {"lr": 6e-4, "warmup_steps": 700, "weight_decay": 0.1},
}


def write_run(folder: Path, rows: list, config: dict | None = None, tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    (folder / "config.json").write_text(json.dumps({"config": CONFIG | (config or {})}))
    return folder


def row(step: int, **values) -> dict:
    return {"step": step, "tokens": step * BATCH_TOKENS} | values


def val_rows(last: int, offset=lambda step: 0.0, every: int = 250, val_set: str = SAME) -> list:
    """llm.c's validation losses with the noise of another seed (sd 0.003: a fifth of the band)."""
    noise = np.random.RandomState(0).normal(0, 0.003, last // every + 1)
    steps = range(0, last + 1, every)
    losses = [float(interpolate(CURVE.val, np.array(step * BATCH_TOKENS))[0]) for step in steps]
    losses[0] = 10.98
    return [row(step, val_loss=loss + extra + offset(step), val_set=val_set)
            for step, loss, extra in zip(steps, losses, noise, strict=True)]


def verdict_on(tmp_path: Path, rows: list, against: str = "", **config) -> Verdict:
    return judge(read_record(write_run(tmp_path / "run", rows, config)), against)


def test_a_run_that_follows_the_curve_is_on_track(tmp_path):
    verdict = verdict_on(tmp_path, val_rows(12_000))
    assert (verdict.status, verdict.headline) == ("on track", "on track")
    newest = verdict.comparisons[0]
    assert (newest.step, newest.tokens) == (12_000, 12_000 * BATCH_TOKENS)
    assert newest.published == 3.3509  # the CSV's row at 6,291,456,000 tokens
    assert newest.noise == BAND
    assert verdict.notes == verdict.causes == []


def test_a_run_that_leaves_the_curve_is_off_from_that_step(tmp_path):
    rows = [*val_rows(12_000, lambda step: 0.1 * (step >= 7_000)),
            row(6_800, event="resumed on 4 ranks"), row(7_100, event="checkpoint failed: full")]
    verdict = verdict_on(tmp_path, rows)
    assert verdict.status == "off"
    difference = verdict.comparisons[0].difference
    assert difference == pytest.approx(0.1, abs=0.012)  # four standard deviations of the noise
    assert verdict.headline == f"off by {difference:+.4f}, first at step 7,000"
    assert "step 6,800: resumed on 4 ranks" in verdict.causes[0]
    assert "checkpoint failed" not in verdict.causes[0]


def test_a_run_that_came_back_is_on_track_and_says_where_it_was_off(tmp_path):
    verdict = verdict_on(tmp_path, val_rows(5_000, lambda step: 0.1 * (step in (2_000, 2_250))))
    assert verdict.status == "on track"
    assert "at step 2,000, 2,250" in verdict.notes[0]
    twice = val_rows(5_000, lambda step: 0.1 * (step in (2_000, 4_750, 5_000)))
    again = verdict_on(tmp_path, twice)
    assert "first at step 4,750" in again.headline


def test_a_run_below_the_curve_is_off_too(tmp_path):
    verdict = verdict_on(tmp_path, val_rows(5_000, lambda step: -0.1))
    assert re.match(r"off by -0\.\d+, lower than the published run, first at step 250",
                    verdict.headline)
    assert "shorter schedule" in verdict.causes[0]


def test_early_steps_are_judged_by_the_early_band_and_the_first_ones_not_at_all(tmp_path):
    assert verdict_on(tmp_path, val_rows(1_000, lambda step: 0.03)).status == "on track"
    assert verdict_on(tmp_path, val_rows(1_250, lambda step: 0.03)).status == "off"
    assert verdict_on(tmp_path, val_rows(0)).status == "too early"


def test_what_lies_past_the_curve_is_not_judged(tmp_path):
    verdict = verdict_on(tmp_path, [*val_rows(19_500), row(20_000, val_loss=9.0, val_set=SAME)])
    assert verdict.status == "on track"
    assert "curve ends at 10,255,073,280 tokens" in verdict.notes[0]


def test_settings_that_differ_are_named(tmp_path):
    optim = CONFIG["optim"] | {"lr": 1e-3}
    verdict = verdict_on(tmp_path, val_rows(1_000), steps=5_000, optim=optim)
    assert "lr 0.001 (0.0006)" in verdict.notes[0]
    assert "2.62 B tokens planned (10.3 B)" in verdict.notes[0]


def test_the_training_loss_is_compared_as_a_mean(tmp_path):
    """500 rows of 50 steps each: one mean. Their noise, 0.03 a step as llm.c's, is 0.004 in it."""
    steps = range(1, 2_001)
    noise = np.random.RandomState(0).normal(0, 0.03, len(steps))
    known, _ = interpolate(CURVE.train, np.maximum(50, np.array(steps)) * BATCH_TOKENS)
    rows = [row(s, train_loss=float(v + n)) for s, v, n in zip(steps, known, noise, strict=True)]
    write_run(tmp_path / "run", [*rows, row(2_000, val_loss=3.9, val_set=SAME)])
    train = judge(read_record(tmp_path / "run")).comparisons[1]
    assert (train.step, train.published) == (2_000, pytest.approx(3.8634, abs=0.05))
    assert abs(train.difference) < train.noise == pytest.approx(BAND + TRAIN_NOISE)
    edu = [r | {"val_set": "fineweb-edu 10BT, 10,485,760 tokens"} if "val_set" in r else r
           for r in [*rows, row(2_000, val_loss=3.9, val_set=SAME)]]
    assert verdict_on(tmp_path, edu).comparisons == []


@pytest.mark.parametrize("val_set", [
    "fineweb-edu sample-10BT, 10,485,760 tokens", "fineweb sample-100BT, 10,485,760 tokens",
    "fineweb sample-10BT, 1,048,576 tokens", "World English Bible, 46,080 tokens", "",
], ids=["edu", "other sample", "fewer tokens", "a text", "unnamed"])
def test_other_validation_sets_are_refused(tmp_path, val_set):
    rows = val_rows(1_000, val_set=val_set)
    assert verdict_on(tmp_path, rows).status == "not compared"
    with pytest.raises(BadInput, match="can't be compared with llmc-124m"):
        verdict_on(tmp_path, rows, "llmc-124m")


@pytest.mark.parametrize("name", ["fineweb sample-10BT", "fineweb 10BT", "fineweb10B"])
def test_names_of_the_curves_validation_set(tmp_path, name):
    rows = val_rows(1_000, val_set=f"{name}, 10,485,760 tokens")
    assert verdict_on(tmp_path, rows).status == "on track"


def test_local_files_count_only_where_the_user_says_so(tmp_path):
    rows = val_rows(1_000, val_set="fineweb from local files, 10,485,760 tokens")
    verdict = verdict_on(tmp_path, rows)
    assert verdict.status == "not compared"
    assert "--against llmc-124m" in verdict.headline
    named = verdict_on(tmp_path, rows, "llmc-124m")
    assert named.status == "on track"
    assert "taken at its word" in named.notes[0]


def test_another_shape_is_compared_with_what_is_named(tmp_path):
    model = CONFIG["model"] | {"n_layer": 6}
    assert verdict_on(tmp_path, val_rows(1_000), model=model).status == "not compared"
    verdict = verdict_on(tmp_path, val_rows(1_000), "llmc-124m", model=model)
    assert "n_layer 6 (12)" in verdict.notes[0]
    with pytest.raises(BadInput, match="there are llmc-124m, llmc-350m"):
        named_curve("llmc-125m")


def test_runs_on_different_data_are_refused(tmp_path):
    a = write_run(tmp_path / "a", val_rows(250))
    b = write_run(tmp_path / "b", val_rows(250, val_set="other, 10,485,760 tokens"))
    c = write_run(tmp_path / "c", [row(1, train_loss=5.0)])
    for pair in ([a, b], [a, c], [c, c], [a, a]):
        with pytest.raises(BadInput, match="different data|twice"):
            read_records(pair)
    again = write_run(tmp_path / "other" / "a", val_rows(500))
    assert [r.name for r in read_records([a, again])] == [str(a), str(again)]


def test_losses_of_an_earlier_validation_set_of_the_run_are_left_out(tmp_path):
    rows = [row(250, val_loss=9.0, val_set="fineweb 10BT, 1,024 tokens"), *val_rows(500)[2:]]
    record = read_record(write_run(tmp_path / "run", rows))
    assert record.series("val_loss").steps.tolist() == [500]


def test_the_curves_are_the_published_ones():
    ends = {"llmc-124m": (10_255_073_280, 3.2722), "llmc-350m": (31_457_280_000, 2.9282)}
    for key, curve in CURVES.items():
        assert (curve.val.tokens[-1], curve.val.values[-1]) == ends[key]
        assert curve.steps * curve.batch_tokens == ends[key][0]
        assert (np.diff(curve.val.tokens) > 0).all()


def between_points(phase: int) -> tuple[np.ndarray, ...]:
    """Every fifth point of the train curve, as far apart as the validation curve's: (tokens of the
    points between, their values, the interpolated ones, how wrong these may be, those of straight
    lines over tokens)."""
    tokens, values = CURVE.train
    coarse = Points(tokens[phase::5], values[phase::5])
    first = max(250 * BATCH_TOKENS, coarse.tokens[0])  # where a run is judged from
    inside = (tokens >= first) & (tokens <= coarse.tokens[-1])
    got, wrong = interpolate(coarse, tokens[inside])
    linear = np.interp(tokens[inside], coarse.tokens, coarse.values)
    return tokens[inside], values[inside], got, wrong, linear


@pytest.mark.parametrize("phase", range(5))
def test_interpolation_is_as_good_as_it_says(phase):
    """Within the stated error, the band, and the scatter of the points themselves."""
    tokens, values, got, wrong, _ = between_points(phase)
    band = np.where(tokens <= EARLY_UNTIL, EARLY_BAND, BAND)
    assert (np.abs(got - values) <= wrong + band + TRAIN_NOISE).all()


def test_lines_over_log_tokens_fit_better_than_lines_over_tokens():
    """Up to step 1,000, where it matters, over all five placements of the points: wrong by 0.025
    and 0.035 on average."""
    errors = []
    for phase in range(5):
        tokens, values, got, _, linear = between_points(phase)
        bends = tokens <= EARLY_UNTIL
        errors += np.abs([got - values, linear - values])[:, bends].T.tolist()
    log_error, linear_error = np.mean(errors, axis=0)
    assert log_error < 0.8 * linear_error


def test_interpolation_is_exact_at_points_and_knows_its_ends():
    got, wrong = interpolate(CURVE.val, np.array([0, 1, *CURVE.val.tokens[1:], 2e10]))
    assert np.isnan(got[[0, 1, -1]]).all()
    np.testing.assert_allclose(got[2:-1], CURVE.val.values[1:], rtol=1e-14)
    np.testing.assert_allclose(wrong[2:-1], 0, atol=1e-14)


def test_spikes_are_found_early_and_late_and_told_once(tmp_path):
    noise = np.random.RandomState(0).normal(0, 0.03, 400)
    rows = [row(s, train_loss=4 + float(noise[s]), grad_norm=0.3 + float(noise[s]) / 3)
            for s in range(400)]
    for step in (40, 300, 350):
        rows[step] |= {"grad_norm": 9.0, "train_loss": 6.0}
    rows.append(row(350, event="skipped step 350: gradient norm 9.00"))
    events = read_record(write_run(tmp_path / "run", rows)).events()
    assert [(event.step, event.kind) for event in events] == [
        (40, "spike"), (300, "spike"), (350, "spike")]
    assert events[2].text.startswith("skipped")


class Reader(HTMLParser):
    """Collects the tags, the attributes and the words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words += data


ATTACK = "<script>alert(1)</script><img src=x onerror=y> & \ud800"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report on every kind of row, and a name, an event and a sample that would be HTML."""
    rows = val_rows(2_000)
    for r in rows:
        r |= {"hellaswag_acc_norm": 0.26, "sample": ATTACK}
    rows += [row(s, train_loss=4.0, lr=1e-4, grad_norm=1.0, tokens_per_second=1e6, mfu=0.4)
             for s in range(1, 1_500)]
    rows.append(row(1_500, event=f"resumed on {ATTACK}"))
    return write_report([write_run(tmp_path_factory.mktemp("runs") / "<b>$x & _{", rows)])


def test_the_page_needs_nothing_from_outside_and_runs_nothing(report):
    path, entries = report
    text = path.read_text()
    found = Reader(text)
    assert path.parts[-3:] == ("<b>$x & _{", "report", "index.html")
    assert not found.tags & {"script", "img", "link", "iframe", "b", "base", "object"}
    names = {name for name, _ in found.attributes}
    assert not [name for name in names if name.startswith("on") or name == "src"]
    targets = [value for name, value in found.attributes if name in ("href", "xlink:href")]
    ids = [value for name, value in found.attributes if name == "id"]
    assert targets and all(target[0] == "#" and target[1:] in ids for target in targets)
    assert len(ids) == len(set(ids))
    assert "://" not in text
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    assert "<script>alert(1)</script><img src=x onerror=y> & ?" in found.words
    assert "on track" in found.words
    assert entries[0].verdict.status == "on track"


def test_every_picture_is_a_png_too(report):
    path, _ = report
    pictures = sorted(p.stem for p in path.parent.glob("*.png"))
    assert pictures == ["difference", "grad_norm", "hellaswag", "loss", "lr", "mfu",
                        "tokens_per_second"]
    assert all((path.parent / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in pictures)


def test_two_runs_on_one_page(tmp_path):
    a = write_run(tmp_path / "a", val_rows(2_000))
    b = write_run(tmp_path / "b", val_rows(2_000, lambda step: 0.25))
    path, entries = write_report([a, b])
    assert [entry.verdict.status for entry in entries] == ["on track", "off"]
    words = Reader(path.read_text()).words
    assert "a: on track" in words and "b: off by +0.2" in words


@pytest.mark.parametrize("rows", [
    [row(1, train_loss=5.0)],
    [row(0, val_loss=11.0, val_set=SAME)],
    [row(0, event="stopped by SIGTERM at step 0")],
    [row(1, lr=1e-4), row(2, train_loss=4.0, grad_norm=float("nan"))],
    [row(1, train_loss="5", lr=None, val_loss=[], val_set=3, sample=7, event={}), row(2, mfu=1e400),
     {"step": "x", "tokens": 1}, {"step": 1}, row(3, train_loss=10**400)],
], ids=["one row", "one evaluation", "an event alone", "NaN", "junk"])
def test_any_record_makes_a_page(tmp_path, rows):
    run = write_run(tmp_path / "run", rows, tail='{"step": 9, "tok')
    path, entries = write_report([run])
    assert page(entries, []).startswith("<!doctype html>")
    assert path.exists()
    assert plot_losses(run) == run / "report" / "loss.png"


def test_a_broken_config_is_no_obstacle(tmp_path):
    run = write_run(tmp_path / "run", val_rows(500))
    for text in ("{", "[]", '{"config": {"model": 3, "optim": [], "steps": "x"}, "hardware": 1}'):
        (run / "config.json").write_text(text)
        _, entries = write_report([run])
        assert entries[0].verdict.status == "not compared"


@pytest.mark.parametrize(("content", "words"), [
    (None, "is no run"), ("", "no row"), ("{}\n", "no row"), (b"\xff\xfe\xff", "can't read"),
], ids=["missing", "empty", "no steps", "no text"])
def test_no_run_is_one_line(tmp_path, content, words):
    if content is not None:
        file = tmp_path / "metrics.jsonl"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=words) as error:
        write_report([tmp_path])
    assert "\n" not in str(error.value)


def test_the_command_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", val_rows(500))
    done = subprocess.run([sys.executable, "-m", "eval.report", str(run), "--against", "llmc-125m"],
                          capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: no published curve is called 'llmc-125m'")
    main(Arguments(runs=(run,)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run: on track (validation loss ")
    assert lines[1] == str(run / "report" / "index.html")
