"""Bad input on the command line: one line that names it, exit status 2, nothing has changed."""

import json

import pytest

from nbutils.__main__ import main

RUN = ["run", "batch-size"]

COMMANDS = [
    (["run", "batch-sise"], "no study 'batch-sise'; did you mean 'batch-size'?"),
    (["run", "nowhere.yaml"], "no study file nowhere.yaml"),
    ([*RUN, "--dataset", "kaggle:nowhere"], "no folder nowhere; it must hold"),
    ([*RUN, "--set", "epochs"], "it must read FIELD=VALUE"),
    ([*RUN, "--set", "=3"], "no setting ''"),
    ([*RUN, "--set", "epochs=1,"], "epochs = None, but it must be a whole number"),
    ([*RUN, "--set", "dataset=2020-13-45"], "no dataset '2020-13-45'"),
    ([*RUN, "--set", "dataset=mnist-5k,kmnist"], "share a dataset, and not have kmnist, mnist-5k"),
    (["run", "cost", "--set", "dataset=5"], "dataset = [5], but it must be of the kind of"),
    (["run", "cost", "--set", "batch_sizes=16,1.5"], "batch_sizes = [16, 1.5], but it must be of"),
    (["run", "cost", "--set", "repeats=1,2"], "repeats = [1, 2], but it must be of the kind of 3"),
    (["run", "cost", "--set", "epochs=2"], "--set has no 'epochs'"),
    ([*RUN, "--jobs", "2", "--scheduler", "tcp://x:1"], "--jobs is for runs here"),
    ([*RUN, "--jobs", "0"], "jobs = 0, but it must be a number > 0"),
    ([*RUN, "--time-limit", "nan"], "time_limit = nan, but it must be a number > 0"),
    ([*RUN, "--on-oom", "split", "--set", "norm=batch"], "on_oom = 'split', but"),
    ([*RUN, "--out", "here.toml"], "here.toml is not an empty folder and holds no study; choose"),
    ([*RUN, "--out", "full"], "full is not an empty folder and holds no study; choose another --"),
    ([*RUN, "--out", "other"], "other holds the study 'mine', not 'batch-size'"),
    ([*RUN, "--out", "torn"], "study.json is damaged: "),
    (["status", "nowhere"], "nowhere holds no study: it has no study.json"),
    (["export", "nowhere", "reference"], "no folder nowhere"),
    (["export", "full", "reference"], "no runs in full"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a file and folders of other kinds; must be as it was afterwards."""
    (tmp_path / "here.toml").touch()
    for name in ("full", "other", "torn"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    plan = {"name": "mine", "title": "Mine", "runs": [], "summary": "04_summary"}
    (tmp_path / "other" / "study.json").write_text(json.dumps(plan))
    (tmp_path / "torn" / "study.json").write_text(json.dumps(plan)[:20])
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    yield tmp_path
    assert snapshot(tmp_path) == before


def snapshot(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize(("arguments", "message"), COMMANDS, ids=lambda value: str(value)[:60])
def test_it_is_one_line_and_exit_status_2(here, capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
