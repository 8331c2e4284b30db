"""The smoke run of the oldest and the newest PyTorch: what it asks, and what it says.

pytest tests/test_versions.py
"""

import configparser
import subprocess
import sys

import pytest

from launch.errors import BadInput, Failed
from tests import versions
from tests.nullgpu import venv


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that were run, in an environment that is taken for set up."""
    run = []

    def fake(command, **_):
        run.append(command)
        return subprocess.CompletedProcess(command, int("pytest" in command), stdout="1 failed\n")

    monkeypatch.setattr(versions, "FOLDERS", dict.fromkeys(versions.TORCH, tmp_path))
    monkeypatch.setattr(versions, "environment", lambda which: which)
    monkeypatch.setattr(versions.subprocess, "run", fake)
    return run


def test_the_oldest_is_the_lower_bound_of_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(venv.ROOT / "setup.cfg")
    (bound,) = [line for line in setup["options"]["install_requires"].splitlines()
                if line.startswith("torch>=")]
    assert versions.TORCH["oldest"] == bound.removeprefix("torch>=") + ".0"


def test_what_fails_is_named_with_what_it_printed(commands, capsys):
    assert versions.main(["oldest"]) == 1
    said = capsys.readouterr().out
    assert "torch 2.11.0, demo: passed" in said
    assert "torch 2.11.0, tests: failed (exit code 1)" in said and "1 failed" in said
    assert [command[0] for command in commands] == ["oldest"] * 3


def test_both_are_run_and_every_test_file_is_there(commands):
    versions.main([])
    assert [command[0] for command in commands] == ["oldest"] * 3 + ["newest"] * 3
    for name in commands[1]:
        if name.startswith("tests/"):
            assert (venv.ROOT / name).is_file()


def test_versions_that_exclude_one_another_are_no_reason_to_leave_one_out(monkeypatch):
    """So torch 2.11 was left out in CI, whose pins had a setuptools that it doesn't go with."""
    pip = "print('torch 2.11.0 depends on setuptools<82'); exit('ERROR: ResolutionImpossible')"
    monkeypatch.setattr(versions, "environment",
                        lambda which: venv.run([sys.executable, "-c", pip]))
    with pytest.raises(Failed, match="exclude one another: .*ResolutionImpossible"):
        versions.main(["oldest", "--where-possible"])
    pinned = (venv.ROOT / "constraints.txt").read_text()
    assert "\nsetuptools==" in pinned and "\nsetuptools==" not in venv.constraints()


def test_where_one_cannot_be_set_up_it_says_why(monkeypatch, capsys):
    def impossible(which):
        raise BadInput("a CUDA build of torch wants 12 GiB of disk")

    monkeypatch.setattr(versions, "environment", impossible)
    assert versions.main(["oldest", "--where-possible"]) == 0
    assert capsys.readouterr().out == (
        "torch 2.11.0 is left out: a CUDA build of torch wants 12 GiB of disk\n")
    with pytest.raises(BadInput, match="12 GiB of disk"):
        versions.main(["oldest"])
    with pytest.raises(BadInput, match="no version 'older': oldest, newest"):
        versions.main(["older"])
