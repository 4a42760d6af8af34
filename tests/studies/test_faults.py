"""Killed at every step, out of disk at every step: what a study leaves and how it goes on.

A process is forked that runs a study, small and without notebooks. An audit hook counts what it
does to the study's folder and, at one of these steps, kills it or tells it that the disk is full.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import part

from nbutils import InputError, RunConfig, data, load_runs, save_run, study, train, training
from nbutils.studies.record import export_runs
from nbutils.studies.study import PlannedRun, Study, run_status, run_study

EPOCHS = 2
STEPS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "fcntl.flock")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Inline(Executor):
    """Runs a task at once, in this process."""

    def submit(self, task, *arguments):
        future = Future()
        try:
            future.set_result(task(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def tiny_study(few_digits, monkeypatch, tmp_path):
    """Two runs of two epochs over 60 images; epochs begun are counted in a file."""
    tiny = replace(
        few_digits,
        train=part(few_digits.train, 60),
        validation=part(few_digits.validation, 20),
        test=part(few_digits.test, 20),
    )
    log = tmp_path / "epochs.log"
    begin_epoch = training.Run.begin_epoch

    def counted(run):
        with open(log, "a") as file:
            file.write("x")
        begin_epoch(run)

    def execute(notebook, output, parameters):
        settings = {k: v for k, v in parameters.items() if k not in ("out", "on_oom")}
        result = train(RunConfig(**settings), tiny, log_folder=parameters["out"], progress=False)
        output.write_text("{}")
        save_run(result, parameters["out"])

    monkeypatch.setattr(training.Run, "begin_epoch", counted)
    monkeypatch.setattr(study, "execute_notebook", execute)
    monkeypatch.setattr(study, "_check_parameters", lambda *_: RunConfig.field_names())
    monkeypatch.setattr(study, "_sum_up", lambda *_: {})
    monkeypatch.setattr(data, "load_dataset", lambda name: tiny)
    config = RunConfig(batch_size=30, epochs=EPOCHS, device="cpu", norm="none")
    runs = tuple(PlannedRun("02", replace(config, seed=seed)) for seed in range(2))
    return Study("tiny", "Tiny", runs, "04_summary"), log


def forked(mine, out, step, act):
    """Run the study in a fork; see `forked_body`."""
    return forked_body(lambda: run_study(mine, out, executor=Inline()), out, step, act)


def forked_body(body, folder, step, act):
    """Run `body` in a fork whose `step`-th step in `folder` and later ones meet `act`.

    Returns:
        Whether it came to that step; what `body` returned, None if it was killed.
    """
    result = folder.with_name("result.json")
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        count, reached = 0, False

        def hook(event, arguments):
            nonlocal count, reached
            if event in STEPS and str(arguments[0]).startswith(str(folder)):
                count += 1
                if count >= step:
                    reached = True
                    act(event, arguments)

        sys.addaudithook(hook)
        try:
            outcome = body()
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        result.write_text(json.dumps([reached, outcome]))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True, None
    return json.loads(result.read_text())


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def full(event, arguments):
    writes = event == "open" and arguments[2] & WRITING
    if event == "os.mkdir" or writes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))


def content(out):
    """All that a study's records say, but for the clock and the peak of memory."""
    assert sorted(path.name for path in out.iterdir() if not path.is_dir()) == [
        ".lock",
        "study.json",
    ]
    runs = load_runs(out)
    predictions = {}
    for run_id in sorted(path.name for path in out.iterdir() if path.is_dir()):
        files = sorted(path.name for path in (out / run_id).iterdir())
        assert files == ["history.csv", "notebook.ipynb", "predictions.npz", "run.json"]
        with np.load(out / run_id / "predictions.npz") as arrays:
            predictions[run_id] = arrays["predictions"].tolist()
    clock = ["seconds", "images_per_second", "peak_memory"]
    return runs.drop(columns=clock).to_csv(), predictions


@pytest.fixture
def expected(tiny_study, tmp_path):
    mine, log = tiny_study
    assert run_study(mine, tmp_path / "whole", executor=Inline()) == {}
    log.unlink()
    return content(tmp_path / "whole")


def test_killed_at_every_step_nothing_is_lost_and_nothing_done_twice(
    tiny_study, expected, tmp_path, capsys
):
    mine, log = tiny_study
    step, reached = 1, True
    while reached:
        log.unlink(missing_ok=True)
        out = tmp_path / f"out-{step}"
        reached, outcome = forked(mine, out, step, kill)
        assert outcome in (None, {})
        for text in run_status(out).values() if (out / "study.json").exists() else ():
            assert text.startswith(("waiting", "started", "done"))
        assert run_study(mine, out, executor=Inline()) == {}
        assert content(out) == expected
        assert len(log.read_text()) <= len(mine.runs) * EPOCHS + 1  # the epoch under way
        step += 1
    assert step > 50  # instants


def test_killed_again_and_again_it_ends_the_same(tiny_study, expected, tmp_path, capsys):
    mine, _ = tiny_study
    out = tmp_path / "out"
    kills, reached = 0, True
    while reached:
        reached, _ = forked(mine, out, 30, kill)
        kills += reached
        assert kills < 50, "it does not come forward"
    assert kills >= 4
    assert content(out) == expected


def test_a_disk_that_is_full_from_any_step_on_fails_the_runs_and_loses_nothing(
    tiny_study, expected, tmp_path, capsys
):
    mine, _ = tiny_study
    step, reached, failed = 1, True, 0
    while reached:
        out = tmp_path / f"out-{step}"
        reached, outcome = forked(mine, out, step, full)
        assert outcome is not None
        if isinstance(outcome, str):
            assert "No space left on device" in outcome  # before the first run
        else:
            assert all("No space left on device" in cause for cause in outcome.values())
            failed += bool(outcome)
        assert run_study(mine, out, executor=Inline()) == {}
        assert content(out) == expected
        step += 5  # steps differ little here
    assert failed >= 5


def test_saving_over_a_record_and_killed_there_is_one_or_is_named(few_digits, tmp_path):
    config = RunConfig(batch_size=100, epochs=1, device="cpu")
    result = train(config, few_digits, progress=False)
    folder, step, reached, named = tmp_path / "runs", 1, True, 0
    while reached:
        save_run(result, folder)
        reached, _ = forked_body(lambda: str(save_run(result, folder)), folder, step, kill)
        if not (folder / config.run_id).exists():
            with pytest.raises(InputError, match=f"{config.run_id} is damaged: it was being repla"):
                load_runs(folder)
            (folder / f".{config.run_id}.replaced").rename(folder / config.run_id)
            named += 1
        loaded = load_runs(folder)
        pd.testing.assert_frame_equal(loaded[list(result.history)], result.history)
        step += 1
    assert named == 1


@pytest.mark.parametrize("act", [kill, full])
def test_an_export_stopped_at_any_step_leaves_the_earlier_reference_or_the_new_one(
    few_digits, tmp_path, act
):
    for seed in range(2):
        config = RunConfig(batch_size=100, epochs=1, device="cpu", seed=seed)
        save_run(train(config, few_digits, progress=False), tmp_path / f"runs-{seed}")
    references = tmp_path / "references"
    reference, first = references / "mine", tmp_path / "first"
    export_runs(tmp_path / "runs-0", first)
    export_runs(tmp_path / "runs-0", tmp_path / "both")
    export_runs(tmp_path / "runs-1", tmp_path / "both")
    before, after = load_runs(first), load_runs(tmp_path / "both")
    step, reached, aside = 1, True, 0
    while reached:
        shutil.rmtree(references, ignore_errors=True)
        shutil.copytree(first, reference)
        (reference / "notes.txt").write_text("mine")
        export = lambda: export_runs(tmp_path / "runs-1", reference)  # noqa: E731
        reached, _ = forked_body(export, references, step, act)
        if reference.exists():
            assert len(load_runs(reference)) in (len(before), len(after))
        else:
            aside += 1
            with pytest.raises(InputError, match=r"it was being replaced: name .*\.mine\.replaced"):
                load_runs(reference)
        export()
        pd.testing.assert_frame_equal(load_runs(reference), after)
        assert (reference / "notes.txt").read_text() == "mine"
        step += 1
    assert step > 10
    assert aside == (act is kill)


def test_a_real_disk_that_is_full(tiny_study, expected, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here: that takes root")
    try:
        mine, _ = tiny_study
        out = disk / "out"
        failures = run_study(mine, out, executor=Inline())  # a checkpoint does not fit
        assert set(failures) == {run.config.run_id for run in mine.runs}
        assert all("No space left on device" in cause for cause in failures.values())
        statuses = run_status(out)
        assert statuses == {run_id: f"failed: {cause}" for run_id, cause in failures.items()}
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert run_study(mine, out, executor=Inline()) == {}
        assert content(out) == expected
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written_is_named(tiny_study, tmp_path, monkeypatch):
    mine, _ = tiny_study

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"out cannot be written: Permission denied"):
        run_study(mine, tmp_path / "out", executor=Inline())
