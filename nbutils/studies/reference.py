"""Results kept in few small files: `export`, and tables of other measurements.

A reference holds many runs: `runs.csv` (one row per run: its config, final metrics, timings),
`history.csv` (one row per run and epoch), `predictions.npz` (`labels`, and an array per run, named
by its id; shapes as in a record) and `environment.json`: a manifest that says where the runs were
made. What a study measures otherwise is a folder of `<name>.csv` and such a manifest.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from nbutils.errors import InputError
from nbutils.machine import environment
from nbutils.studies import record


def export(folder: str | Path, reference: str | Path) -> None:
    """Add what a study left to a reference: its tables; or its runs, in place of earlier ones.

    Killed at any instant, or out of disk, an export of runs leaves the earlier reference or the
    new one; see `replacing`. Errors as of `load_runs` or `load_tables`.
    """
    folder, reference = Path(folder), Path(reference).absolute()
    if not (folder / record.MANIFEST).exists() or (folder / "runs.csv").exists():
        _export_runs(folder, reference)
        return
    names = [f"{name}.csv" for name in load_tables(folder)]
    if (reference / "runs.csv").exists():
        raise InputError(f"{reference} holds runs, and {folder} tables")
    reference.mkdir(parents=True, exist_ok=True)
    for name in (*names, record.MANIFEST):
        shutil.copyfile(folder / name, reference / name)


def _export_runs(folder: Path, reference: Path) -> None:
    runs = record.read_runs(folder)
    with record.replacing(reference) as new:
        if reference.exists():  # it may hold other files too
            shutil.copytree(reference, new, dirs_exist_ok=True)
        if (reference / "runs.csv").exists():
            held = record.read_runs(reference)
            images = [set(part.tidy["dataset_fingerprint"]) for part in (held, runs)]
            if images[0] != images[1]:
                raise InputError(f"{folder} and {reference} hold runs on different images")
            if held.predictions.keys() - runs.predictions.keys():
                runs = record.combine([held, runs], reference)
        files = {
            "runs": runs.tidy.groupby("run_id").tail(1).drop(columns="epoch"),
            "history": runs.tidy[["run_id", *runs.tidy.loc[:, "epoch":]]],
            "predictions": {"labels": runs.labels, **runs.predictions},
        }
        record.write_files(new / record.MANIFEST, {"environments": runs.environments}, files)


def save_tables(tables: Mapping[str, pd.DataFrame], folder: str | Path, device: str) -> None:
    """Write tables by name, without their index, measured on "cpu" or the GPU of that name."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    content = {"environments": [environment(device)]}
    record.write_files(Path(folder, record.MANIFEST), content, tables)


def load_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables that `save_tables` wrote, by name; InputError if they are not there or changed."""
    with record.naming_damage(Path(folder)):
        return record.read_files(Path(folder, record.MANIFEST))["files"]
