"""Results kept in few small files: `export`, and tables of other measurements.

A reference holds many runs: `runs.csv` (one row per run: its config, final metrics, timings),
`history.csv` (one row per run and epoch), `predictions.npz` (`labels`, and an array per run, named
by its id; shapes as in a record) and `environment.json`: a manifest that says where the runs were
made. What a study measures otherwise is a folder of `<name>.csv` and such a manifest.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nbutils.errors import InputError
from nbutils.machine import environment
from nbutils.studies import record


def export(folder: str | Path, reference: str | Path) -> None:
    """Add what a study left to a reference: its tables; or its runs, in place of earlier ones.

    Killed at any instant, or out of disk, an export of runs leaves the earlier reference or the
    new one; see `replace_folder`. Errors as of `load_runs` or `load_tables`.
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
    if record.replaced(reference).exists() and not reference.exists():
        os.rename(record.replaced(reference), reference)  # an export was killed between two renames
    parts = [runs]
    if (reference / "runs.csv").exists():
        held = record.read_runs(reference)
        if set(held.table["dataset_fingerprint"]) != set(runs.table["dataset_fingerprint"]):
            raise InputError(f"{folder} and {reference} hold runs on different images")
        if held.predictions.keys() - runs.predictions.keys():
            parts = [held, runs]
    table = pd.concat([part.table for part in parts]).drop_duplicates("run_id", keep="last")
    history, key = pd.concat([part.history for part in parts]), ["run_id", "epoch"]
    history = history.drop_duplicates(key, keep="last").sort_values(key)
    final = history.groupby("run_id").tail(1).drop(columns="epoch")
    table = table.sort_values("run_id").merge(final, on="run_id")
    late = {name: array for part in parts for name, array in part.predictions.items()}
    places = [place for part in parts for place in part.environments]
    distinct = {json.dumps(place, sort_keys=True): place for place in places}
    arrays: dict[str, Any] = {"labels": runs.labels, **dict(sorted(late.items()))}
    reference.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{reference.name}.", dir=reference.parent) as aside:
        partial = Path(aside) / reference.name
        if reference.exists():  # it may hold other files too
            shutil.copytree(reference, partial)
        partial.mkdir(exist_ok=True)
        table.to_csv(partial / "runs.csv", index=False)
        history.to_csv(partial / "history.csv", index=False)
        np.savez_compressed(partial / "predictions.npz", **arrays)
        content = {"environments": list(distinct.values())}
        record.write_manifest(partial / record.MANIFEST, content, record.REFERENCE_FILES)
        record.replace_folder(partial, reference)


def save_tables(tables: Mapping[str, pd.DataFrame], folder: str | Path, device: str) -> None:
    """Write tables by name, without their index, measured on "cpu" or the GPU of that name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    content = {"environments": [environment(device)]}
    record.write_manifest(folder / record.MANIFEST, content, [f"{name}.csv" for name in tables])


def load_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables that `save_tables` wrote, by name; InputError if they are not there or changed."""
    try:
        names = record.read_manifest(Path(folder, record.MANIFEST))["files"]
    except InputError as error:
        raise InputError(f"{folder} holds no whole tables: {error}") from error
    return {name.removesuffix(".csv"): record.read_csv(Path(folder, name)) for name in names}
