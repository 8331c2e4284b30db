"""The pictures of --diagnose_every: right figures, one run or several, whatever the file holds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from eval.report import network, write_report
from eval.report.record import read_record

KINDS = ("attn.c_attn", "mlp.c_fc")


def diagnosis(step: int) -> dict:
    weights = {f"h.{block}.{kind}.weight": {"gradient_std": 1.0, "gradient_to_data": 0.1 * step,
                                            "log10_update_to_data": -3.0 + block}
               for block in range(2) for kind in KINDS}
    weights["wte.weight"] = {"gradient_std": 1.0, "gradient_to_data": None,
                             "log10_update_to_data": -2.5}
    return {"activation_std": [1.0 * step, 2.0 * step], "activation_mean": [0.0, 0.0],
            "gelu_off": [0.0, 0.1], "gradient_std": [1e-3, 2e-3], "weights": weights}


def make_run(folder: Path, *extra: dict) -> Path:
    folder.mkdir()
    rows = [{"step": step, "tokens": 10 * step, "train_loss": 5.0 - step} for step in range(1, 4)]
    rows[0]["diagnosis"], rows[2]["diagnosis"] = diagnosis(1), diagnosis(3)
    lines = [json.dumps(row) + "\n" for row in [*rows, *extra]]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_the_page_has_the_pictures_under_a_heading_of_their_own(tmp_path):
    page, _ = write_report([make_run(tmp_path / "run")])
    text = page.read_text()
    outside, inside = text.split("<h2>Inside the network</h2>")
    for name, (title, _) in network.CHARTS.items():
        assert (page.parent / f"{name}.png").stat().st_size > 1000
        assert title in inside
        assert title not in outside
    assert "block 0" in inside
    assert "attn.c_attn" in inside


def test_without_diagnoses_there_is_no_such_section(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 10, "train_loss": 4.0}\n')
    page, _ = write_report([run])
    assert "Inside the network" not in page.read_text()


def test_several_runs_get_a_line_each(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    for run in runs:
        config = {"resolved": {"val_set": "corpus.txt, 320 tokens"}}
        (run / "config.json").write_text(json.dumps(config))
    page, _ = write_report(runs)
    inside = page.read_text().split("<h2>Inside the network</h2>")[1]
    assert "block 0" not in inside
    assert "Updates: update to data" in inside


def test_figures_are_read_block_by_block(tmp_path):
    record = read_record(make_run(tmp_path / "run"))
    tokens, values = network.layer_table(record, "activation_std")
    assert tokens.tolist() == [10, 30]
    assert values.tolist() == [[1, 2], [3, 6]]
    tables = network.matrix_tables(record, "log10_update_to_data")
    assert tables.keys() == {*KINDS, "wte"}
    assert tables["attn.c_attn"][1].tolist() == [[-3, -2], [-3, -2]]
    assert np.isnan(network.matrix_tables(record, "gradient_to_data")["wte"][1]).all()


DAMAGED = [
    [], "text", {"activation_std": "no list"}, {"activation_std": [1.0, "x"]},
    {"activation_std": [1.0]}, {"activation_std": [[1], {}]}, {"weights": []},
    {"weights": {"h.0.attn.c_attn.weight": 3}}, {"weights": {"": {}}},
    {"weights": {"h": {"gradient_to_data": 10**400}}},
]


def test_damaged_diagnoses_are_left_out(tmp_path):
    rows = []
    for i, wrong in enumerate(DAMAGED):
        rows.append({"step": 4 + i, "tokens": 40 + i, "diagnosis": wrong})
    page, _ = write_report([make_run(tmp_path / "run", *rows)])
    assert "Inside the network" in page.read_text()
    record = read_record(tmp_path / "run")
    for wrong in DAMAGED:
        alone = replace(record, rows=[{"step": 1, "tokens": 10, "diagnosis": wrong}])
        network.layer_table(alone, "activation_std")
        network.matrix_tables(alone, "gradient_to_data")
    assert network.layer_table(record, "activation_std")[0].tolist() == [10, 30, 43, 45]
