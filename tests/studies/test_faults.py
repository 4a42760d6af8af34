"""Killed at every step, out of disk at every step: what is left, and how it goes on.

A process is forked in which an audit hook counts what is done to a folder. At one of these steps
the hook kills the process, or says from there on that the disk is full.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from outcomes import study_of

from nbutils import InputError, RunConfig, load_runs, save_run, train
from nbutils.studies.reference import export
from nbutils.studies.status import run_status
from nbutils.training import train as training

STEPS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "fcntl.flock")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

sample_and_all = pytest.mark.parametrize(
    "stride", [17, pytest.param(1, marks=pytest.mark.slow)], ids=["sample", "all"]
)


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(event, arguments):
    writes = event == "open" and arguments[2] & WRITING
    if event == "os.mkdir" or writes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))


def faulty(body, folder, step, act):
    """Run `body` in a fork; its `step`-th step in `folder` and later ones meet `act`.

    Returns:
        Whether it came to that step; what `body` returned or raised, None if it was killed.
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


@pytest.fixture
def study(quick, tmp_path, monkeypatch):
    """Two runs of two epochs. A character is added to `epochs.log` when an epoch begins."""
    log, windows = tmp_path / "epochs.log", training.windows

    def counted(*arguments, **options):
        with open(log, "a") as file:
            file.write("x")
        return windows(*arguments, **options)

    monkeypatch.setattr(training, "windows", counted)
    return quick.study(0, 1)


@pytest.fixture
def expected(study, quick, tmp_path):
    assert quick.run(study, tmp_path / "whole") == {}
    (tmp_path / "epochs.log").unlink()
    return study_of(tmp_path / "whole")


@sample_and_all
@pytest.mark.parametrize("act", [kill, fill_disk])
def test_stopped_at_any_step_nothing_is_lost_or_done_twice(
    study, quick, expected, tmp_path, act, stride
):
    log, step, reached, failed = tmp_path / "epochs.log", 1, True, 0
    while reached:
        log.unlink(missing_ok=True)
        out = tmp_path / f"out-{step}"
        reached, outcome = faulty(lambda out=out: quick.run(study, out), out, step, act)
        if outcome:  # an error before the first run, or the causes of failed runs
            causes = [outcome] if isinstance(outcome, str) else outcome.values()
            assert all("No space left on device" in cause for cause in causes)
            failed += 1
        assert quick.run(study, out) == {}
        assert study_of(out) == expected
        if log.exists():  # at most the epoch under way again, of each run that failed
            assert len(log.read_text()) <= 2 * 2 + (1 if act is kill else 2)
        step += stride
    assert step > 60
    assert failed >= 3 if act is fill_disk else failed == 0


def test_the_cause_is_noted_on_a_disk_that_is_really_full(study, quick, expected, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here: that takes root")
    try:
        out = disk / "out"
        failures = quick.run(study, out)  # a checkpoint does not fit
        assert len(failures) == 2
        assert all("No space left on device" in cause for cause in failures.values())
        assert run_status(out) == {name: f"failed: {cause}" for name, cause in failures.items()}
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert quick.run(study, out) == {}
        assert study_of(out) == expected
    finally:
        subprocess.run(["umount", disk], check=True)


@sample_and_all
@pytest.mark.parametrize("act", [kill, fill_disk])
def test_an_export_stopped_at_any_step_leaves_the_earlier_reference_or_the_new_one(
    few_digits, tmp_path, act, stride
):
    result = train(RunConfig(batch_size=100, epochs=1, device="cpu"), few_digits, progress=False)
    save_run(result, tmp_path / "runs-0")
    save_run(replace(result, config=replace(result.config, seed=1)), tmp_path / "runs-1")
    first, both = tmp_path / "first", tmp_path / "both"
    export(tmp_path / "runs-0", first)
    shutil.copytree(first, both)
    export(tmp_path / "runs-1", both)
    references, reference = tmp_path / "references", tmp_path / "references" / "mine"
    step, reached, aside = 1, True, 0
    while reached:
        shutil.rmtree(references, ignore_errors=True)
        shutil.copytree(first, reference)
        (reference / "notes.txt").write_text("mine")
        again = lambda: export(tmp_path / "runs-1", reference)  # noqa: E731
        reached, _ = faulty(again, references, step, act)
        if reference.exists():
            assert len(load_runs(reference)) in (1, 2)
        else:
            aside += 1
            with pytest.raises(InputError, match=r"no folder .*; rename .*\.mine\.replaced to it"):
                load_runs(reference)
        again()
        pd.testing.assert_frame_equal(load_runs(reference), load_runs(both))
        assert (reference / "notes.txt").read_text() == "mine"
        step += stride
    assert step > 10
    assert aside == (act is kill) or stride > 1
