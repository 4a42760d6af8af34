"""What trainings and records say, for tests that compare them; and an object that does harm."""

import os

import pandas as pd
import torch

from nbutils.studies.record import read_runs

CLOCK = ["seconds", "images_per_second", "peak_memory"]
"""Columns of runs that are not the same twice."""


def history(result):
    return result.history.drop(columns="seconds")


def assert_same_result(result, other):
    """Bitwise, all but times."""
    pd.testing.assert_frame_equal(history(result), history(other), check_exact=True)
    assert torch.equal(result.late_predictions, other.late_predictions)
    ours, theirs = result.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def records_of(folder, without=()):
    """All that is read from the records of a folder, or from a reference, but some columns."""
    runs = read_runs(folder)
    arrays = {run_id: late.tolist() for run_id, late in runs.predictions.items()}
    return runs.tidy.drop(columns=[*without]).to_csv(), runs.labels.tolist(), arrays


def study_of(out):
    """What the records of a finished study say, except for times and memory."""
    assert [path.name for path in out.glob(".*")] == [".lock"]
    for record in out.glob("*/"):
        files = sorted(path.name for path in record.iterdir())
        assert files == ["history.csv", "notebook.ipynb", "predictions.npz", "run.json"]
    return records_of(out, without=CLOCK)


class Evil:
    """Unpickled, it makes the folder `executed`."""

    def __reduce__(self):
        return os.mkdir, ("executed",)
