"""The commands as a user gives them, in processes of their own."""

import subprocess
import sys

import pytest

from nbutils import load_runs
from nbutils.__main__ import main
from nbutils.paths import NOTEBOOKS


def command(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def study_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "two.yaml"
    path.write_text(
        "runs: [{notebook: 03_train_accumulation, grid: {accumulation_steps: [1, 3]}}]\n"
        "fixed: {epochs: 1, batch_size: 1200}\n"
        "summary: 04_summary\n"
    )
    return path


def test_a_study_from_command_to_figure(study_file, tmp_path):
    out = tmp_path / "runs"
    run = command("nbutils", "run", study_file, "--out", out, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "2/2 runs done" in run.stderr
    assert "3 x 1200 = 3600" in run.stdout
    for name in ("accuracy-vs-epoch.png", "accuracy-vs-epoch.svg", "summary.ipynb"):
        assert (out / name).stat().st_size > 10_000
        assert str(out / name) in run.stdout
    runs = load_runs(out)
    assert sorted(runs["accumulation_steps"]) == [1, 3]
    assert all((out / run_id / "notebook.ipynb").exists() for run_id in runs["run_id"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]

    made = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    again = command("nbutils", "run", study_file, "--out", out)
    assert again.returncode == 0, again.stderr
    assert "runs done" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*")} == made

    status = command("nbutils", "status", out)
    assert status.returncode == 0
    assert status.stdout.count("done: test accuracy") == 2

    export = command("nbutils", "export", out, tmp_path / "reference")
    assert export.returncode == 0
    assert load_runs(tmp_path / "reference")["run_id"].nunique() == 2


def test_mnist_without_files_and_network_is_refused(tmp_path, monkeypatch, capsys):
    from torchvision import datasets

    def fail(_):
        raise RuntimeError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBUTILS_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(datasets.MNIST, "download", fail)
    assert main(["run", "batch-size", "--dataset", "mnist"]) == 2
    assert "Two ways out" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_numbers_with_an_exponent_are_numbers():
    from nbutils.__main__ import _override

    assert _override("learning_rate=1e-3,0.01") == ("learning_rate", [0.001, 0.01])
    assert _override("seed=0,1") == ("seed", [0, 1])
    assert _override("augment=true") == ("augment", [True])
    assert _override("norm=none,ghost") == ("norm", ["none", "ghost"])


def test_papermill_by_itself_refuses_an_unknown_parameter(tmp_path):
    notebook = NOTEBOOKS / "02_train_batch_size.ipynb"
    run = command("papermill", notebook, "out.ipynb", "-p", "batchsize", "512", cwd=tmp_path)
    assert run.returncode != 0
    assert "this notebook has no parameter 'batchsize'; did you mean 'batch_size'?" in run.stderr
