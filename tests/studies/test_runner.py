"""Which runs are made, kept, refused and summed up. Notebooks are functions here, see `quick`."""

import os
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
from nbclient.exceptions import CellTimeoutError

from nbutils import InputError, load_runs
from nbutils.studies import notebook as notebooks
from nbutils.studies import runner
from nbutils.studies.status import attempt, run_status, take_over


def ids(study):
    return [run.run_id for run in study.runs]


def test_a_study_is_made_once_and_summed_up_only_when_a_record_is_newer(quick, tmp_path):
    study, out = quick.study(0, 1), tmp_path / "out"
    assert quick.run(study, out) == {}
    assert quick.executed == ["02_train_batch_size"] * 2 + ["04_summary"]
    assert load_runs(out)["seed"].tolist() == [0, 0, 1, 1]
    assert all(text.startswith("done: test accuracy") for text in run_status(out).values())

    assert quick.run(study, out) == {}
    assert len(quick.executed) == 3
    later = (out / "summary.ipynb").stat().st_mtime + 5
    os.utime(out / ids(study)[0] / "run.json", (later, later))
    assert quick.run(study, out) == {}
    assert quick.executed[3:] == ["04_summary"]
    # More seeds are added to those in the folder.
    assert quick.run(quick.study(0, 2), out) == {}
    assert quick.executed[4:] == ["02_train_batch_size", "04_summary"]
    assert list(run_status(out)) == ids(quick.study(0, 1, 2))


TIMEOUT = "A cell timed out, after 5 seconds."
CAUSES = {
    "MemoryError: no room": MemoryError("no\nroom"),
    f"CellTimeoutError: {TIMEOUT}": CellTimeoutError(f"{TIMEOUT}\nHere is a preview of it:\n..."),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_when_a_run_fails_the_others_go_on_and_it_is_tried_again(quick, tmp_path, cause):
    study, out = quick.study(0, 1), tmp_path / "out"
    bad, good = ids(study)

    def fail(parameters):
        if parameters["seed"] == 0:
            raise CAUSES[cause]

    quick.before.append(fail)
    assert quick.run(study, out) == {bad: cause}
    status = run_status(out)
    assert status[bad] == f"failed: {cause}"
    assert status[good].startswith("done")
    assert "04_summary" not in quick.executed
    quick.before.clear()
    assert quick.run(study, out) == {}
    assert quick.executed == ["02_train_batch_size"] * 3 + ["04_summary"]
    assert not (out / ".work").exists()


def test_a_record_that_is_missing_or_made_on_other_images_is_a_failure(
    quick, tmp_path, monkeypatch
):
    study, out = quick.study(0), tmp_path / "out"
    quick.before.append(lambda parameters: parameters.update(out=str(tmp_path / "elsewhere")))
    (reason,) = quick.run(study, out).values()
    assert "saved no record of" in reason
    quick.before.clear()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_check_runnable", lambda *_: "f" * 64)
        (reason,) = quick.run(study, out).values()
    assert "was made on other images than 'mnist-5k' has now" in reason
    assert run_status(out) == {ids(study)[0]: f"failed: {reason}"}
    assert quick.run(study, out) == {}


def test_what_a_folder_holds_is_refused_by_name_and_kept(quick, tmp_path):
    study, out = quick.study(0), tmp_path / "out"
    quick.run(study, out)
    run_id, history = ids(study)[0], out / ids(study)[0] / "history.csv"
    for other, message in (
        (quick.study(0, epochs=3), "holds the study 'tiny' with epochs = 2, not 3; choose another"),
        (quick.study(1, dataset="kmnist"), "'mnist-5k', not 'kmnist'; choose another --out"),
    ):
        with pytest.raises(InputError, match=message):
            quick.run(other, out)
    whole = history.read_bytes()
    history.write_text("epoch\n")
    assert run_status(out)[run_id].startswith("damaged: ")
    with pytest.raises(InputError, match=f"{run_id} is damaged: history.csv was changed"):
        quick.run(quick.study(0, 1), out)
    assert history.read_text() == "epoch\n"
    history.write_bytes(whole)
    (out / run_id).rename(out / "best")
    with pytest.raises(InputError, match="best is not a run of this study; move it elsewhere"):
        quick.run(study, out)
    assert quick.executed == ["02_train_batch_size", "04_summary"]


def test_a_smaller_study_leaves_the_unfinished_runs_of_others(quick, tmp_path):
    out = tmp_path / "out"

    def interrupt(parameters):
        (Path(parameters["out"]) / "progress.csv").write_bytes(b"epoch\n\xff\n")  # not even text
        raise KeyboardInterrupt

    quick.before.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        quick.run(quick.study(0, 1), out)
    quick.before.clear()
    started = ids(quick.study(0))[0]
    assert quick.run(quick.study(1), out) == {}
    assert run_status(out)[started] == "started: epoch 1/2"
    assert quick.run(quick.study(0), out) == {}
    assert not (out / ".work").exists()


def test_what_an_earlier_attempt_still_writes_does_not_reach_the_next(quick, tmp_path):
    """As a kernel does that outlives its command, or the worker that a scheduler gave up."""
    study, out = quick.study(0), tmp_path / "out"
    old = []

    def write_as_the_first_attempt(parameters):
        old.append(Path(parameters["out"]))
        if len(old) == 1:
            raise OSError("lost")
        assert not old[0].exists()
        stray = old[0] / ids(study)[0]  # what `save_run` of the first attempt does
        stray.mkdir(parents=True)
        (stray / "run.json").write_text("wrong")

    quick.before.append(write_as_the_first_attempt)
    assert list(quick.run(study, out).values()) == ["OSError: lost"]
    assert [attempt(out, study.runs[0])] == old
    assert quick.run(study, out) == {}
    assert len(load_runs(out)) == 2
    assert not (out / ".work").exists()


def test_an_interruption_takes_their_folders_from_runs_elsewhere(quick, tmp_path, monkeypatch):
    """So a run on another machine ends at its next epoch, when it finds its folder gone."""
    study, out = quick.study(0), tmp_path / "out"

    class Elsewhere(Executor):
        def submit(self, task, run):
            self.given = take_over(out, run)
            return Future()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    executor = Elsewhere()
    monkeypatch.setattr(runner, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run_study(study, out, executor=executor)
    assert executor.given.name == "1"
    assert not executor.given.exists()


def test_a_failed_summary_is_told_and_tried_again(quick, tmp_path, monkeypatch):
    study, out, execute = quick.study(0), tmp_path / "out", notebooks.execute_notebook

    def fail(notebook, output, parameters, **options):
        if notebook == "04_summary":
            output.write_text("half")
            raise ValueError("no figure")
        execute(notebook, output, parameters, **options)

    with monkeypatch.context() as patch:
        patch.setattr(notebooks, "execute_notebook", fail)
        assert quick.run(study, out) == {"04_summary": "ValueError: no figure"}
    assert run_status(out)["04_summary"] == "failed: ValueError: no figure"
    assert not (out / "summary.ipynb").exists()
    assert quick.run(study, out) == {}
    assert (out / "summary.ipynb").exists()


def test_a_device_is_looked_for_only_where_the_runs_are_made(quick, tmp_path):
    study = quick.study(0, device="cuda:77")
    with pytest.raises(InputError, match="device = 'cuda:77', but this machine has"):
        runner.run_study(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (reason,) = quick.run(study, tmp_path / "out").values()
    assert "device = 'cuda:77', but" in reason


def test_a_folder_that_cannot_be_written_is_named(quick, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory: .*file/out"):
        quick.run(quick.study(0), tmp_path / "file" / "out")
