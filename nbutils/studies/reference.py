"""Results kept in few small files: `export_runs`, and tables of other measurements.

A reference holds many runs: `runs.csv` (one row per run: its config, final metrics, timings),
`history.csv` (one row per run and epoch), `predictions.npz` (`labels`, and an array per run, named
by its id; shapes as in a record) and `environment.json` (where the runs were made, checksums of
the other files, and one over all that).

What a study measures otherwise than by runs is a folder of tables: `<name>.csv` each, and
`environment.json` as above.
"""

from __future__ import annotations

import hashlib
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
from nbutils.studies.files import (
    DESCRIPTION,
    describe,
    read_csv,
    read_description,
    replace_folder,
    replaced,
    sha256,
    write_json,
)
from nbutils.studies.record import REFERENCE_FILES, Runs, read_runs


def export_runs(folder: str | Path, reference: str | Path) -> None:
    """Add the runs of a study's folder to a reference, in place of earlier ones of the same id.

    A reference that takes more than one machine or evening to make grows that way. To begin
    anew, remove its folder first. Killed at any instant, or out of disk, it leaves the earlier
    reference or the new one; see `replace_folder`.

    Raises:
        InputError: As `load_runs`, or the reference holds runs on other images.
    """
    runs, reference = read_runs(folder), Path(reference).absolute()
    if replaced(reference).exists() and not reference.exists():
        os.rename(replaced(reference), reference)  # an export was killed between two renames
    last = runs.history.groupby("run_id").tail(1).drop(columns="epoch")
    table, history, predictions = runs.table.merge(last, on="run_id"), runs.history, {}
    environments: list[dict[str, Any]] = []
    if (reference / "runs.csv").exists():
        held = read_runs(reference)
        if set(held.table["dataset_fingerprint"]) != set(table["dataset_fingerprint"]):
            raise InputError(f"{folder} and {reference} hold runs on different images")
        kept = held.table[~held.table["run_id"].isin(table["run_id"])]
        earlier = held.history[held.history["run_id"].isin(kept["run_id"])]
        table, history = pd.concat([kept, table]), pd.concat([earlier, history])
        predictions = {run_id: held.predictions[run_id] for run_id in kept["run_id"]}
        environments = held.environments if len(kept) else []
    distinct = {json.dumps(e, sort_keys=True): e for e in [*environments, *runs.environments]}
    whole = Runs(
        table=table.sort_values("run_id"),
        history=history.sort_values(["run_id", "epoch"]),
        labels=runs.labels,
        predictions=dict(sorted((predictions | runs.predictions).items())),
        environments=list(distinct.values()),
    )
    _write_reference(whole, reference)


def _write_reference(runs: Runs, reference: Path) -> None:
    reference.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{reference.name}.", dir=reference.parent) as aside:
        partial = Path(aside) / reference.name
        if reference.exists():  # it may hold other files too
            shutil.copytree(reference, partial)
        partial.mkdir(exist_ok=True)
        runs.table.to_csv(partial / "runs.csv", index=False)
        runs.history.to_csv(partial / "history.csv", index=False)
        arrays: dict[str, Any] = {"labels": runs.labels, **runs.predictions}
        np.savez_compressed(partial / "predictions.npz", **arrays)
        files = {name: sha256(partial / name) for name in REFERENCE_FILES}
        write_json(partial / DESCRIPTION, describe(runs.environments, files))
        replace_folder(partial, reference)


def save_tables(tables: Mapping[str, pd.DataFrame], folder: str | Path, device: str) -> None:
    """Write tables of measurements, and where they were made.

    Args:
        tables: By name; their index is not kept.
        folder: Where they go; made where there is none. It may hold earlier tables of the same
            names only.
        device: What was measured: "cpu", or the name of the GPU.

    Raises:
        InputError: The folder holds other tables.
    """
    folder = Path(folder)
    if holds_tables(folder) and set(load_tables(folder)) != set(tables):
        raise InputError(f"{folder} holds other tables: {', '.join(load_tables(folder))}")
    content = {name: table.to_csv(index=False) for name, table in tables.items()}
    files = {f"{name}.csv": hashlib.sha256(t.encode()).hexdigest() for name, t in content.items()}
    _write_tables(folder, content, describe([environment(device)], files))


def load_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables that `save_tables` wrote, by name.

    Raises:
        InputError: There are none, or they were changed.
    """
    folder = Path(folder)
    try:
        files = read_description(folder)["files"]
    except InputError as error:
        raise InputError(f"{folder} holds no whole tables: {error}") from error
    return {file.removesuffix(".csv"): read_csv(folder / file) for file in files}


def holds_tables(folder: str | Path) -> bool:
    """Whether there are tables of measurements in `folder`, rather than runs."""
    return Path(folder, DESCRIPTION).exists() and not Path(folder, "runs.csv").exists()


def export_tables(folder: str | Path, reference: str | Path) -> None:
    """Copy tables of measurements to a reference, in place of what it held.

    Raises:
        InputError: As `load_tables`, or the reference holds something else.
    """
    folder, reference = Path(folder), Path(reference)
    content = {name: Path(folder, f"{name}.csv").read_text("utf-8") for name in load_tables(folder)}
    if (reference / "runs.csv").exists():
        raise InputError(f"{reference} holds runs, and {folder} tables")
    _write_tables(reference, content, json.loads((folder / DESCRIPTION).read_text("utf-8")))


def _write_tables(folder: Path, content: Mapping[str, str], description: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Killed before the end, it leaves no description, and so no tables that could be loaded.
    (folder / DESCRIPTION).unlink(missing_ok=True)
    for name, text in content.items():
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    write_json(folder / DESCRIPTION, description)
