"""What a run leaves on disk, and a folder of such runs as one table.

A record is a folder `<out>/<run_id>/`, written aside and renamed when whole:

- `run.json`: a manifest, which has the SHA-256 of other files (`files`) and of what it says itself
  (`checksum`). `dataset` has the `fingerprint` and the number of images in `train`, `validation`
  and `test`; `final` is the last row of the history; `images_per_second` leaves evaluation out;
  for `images_per_epoch`, `peak_memory` and `micro_batch` (newer records only) see `RunResult`.
- `history.csv`: the history of `RunResult`, one row per epoch.
- `predictions.npz`: `predictions`, uint8, shape (k, test images), after each of the last
  k = min(5, epochs) epochs; and `labels`, uint8, shape (test images,), or (0,) where they are
  unknown. Older records have only the last epoch's predictions, shape (test images,).
- `notebook.ipynb`: the executed notebook, where the run was part of a study; without a checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from nbutils.errors import InputError
from nbutils.machine import device_name, environment
from nbutils.paths import write_json
from nbutils.training.config import RunConfig

if TYPE_CHECKING:
    from nbutils.training.result import RunResult

SCHEMA_VERSION = 2
RECORD_FILES = ("history.csv", "predictions.npz")
REFERENCE_FILES, MANIFEST = ("runs.csv", *RECORD_FILES), "environment.json"


class Runs(NamedTuple):
    """All runs of a folder: `table` has one row per run, `history` one per run and epoch.

    `labels` are those of the test images, shape (test images,); `predictions` have what each run
    predicted after its last k epochs, shape (k, test images), by its id.
    """

    table: pd.DataFrame
    history: pd.DataFrame
    labels: np.ndarray
    predictions: dict[str, np.ndarray]
    environments: list[dict[str, Any]]

    @property
    def tidy(self) -> pd.DataFrame:
        """What `load_runs` returns."""
        return self.table.merge(self.history, on="run_id", validate="one_to_many")


def save_run(result: RunResult, out: str | Path) -> Path:
    """Write the record of a run to the folder `<out>/<run_id>/`, in place of an earlier one."""
    run_id = result.config.run_id
    partial, folder = Path(out, f".{run_id}.{uuid.uuid4().hex}"), Path(out, run_id)
    partial.mkdir(parents=True)
    try:
        result.history.to_csv(partial / "history.csv", index=False)
        np.savez_compressed(
            partial / "predictions.npz",
            predictions=result.late_predictions.numpy(),
            labels=result.data.test.labels.numpy().astype(np.uint8),
        )
        write_manifest(partial / "run.json", _content(result), RECORD_FILES)
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _content(result: RunResult) -> dict[str, Any]:
    config, data, last = result.config, result.data, result.history.iloc[-1]
    where = environment(device_name(result.device)) | {"cuda_graph": result.cuda_graph}
    splits = {name: len(getattr(data, name).images) for name in ("train", "validation", "test")}
    return {
        "run_id": config.run_id,
        "config": config.to_dict(),
        "dataset": {"name": data.name, "fingerprint": data.fingerprint, **splits},
        "images_per_epoch": result.images_per_epoch,
        "environment": where,
        "final": last.to_dict(),
        "images_per_second": result.images_per_epoch * config.epochs / last["seconds"],
        "peak_memory": result.peak_memory,
        "micro_batch": result.micro_batch,
        "schema_version": SCHEMA_VERSION,
    }


def read_record(folder: Path) -> dict[str, Any]:
    """What `run.json` in `folder` says; InputError names what is damaged."""
    try:
        content = read_manifest(folder / "run.json")
        version = content.get("schema_version")
        if version not in (1, SCHEMA_VERSION):
            raise InputError(f"its schema version is {version!r}, and only 1 and 2 can be read")
        if {*content["files"]} != {*RECORD_FILES}:
            raise InputError(f"run.json lists {', '.join(content['files']) or 'no files'}")
        run_id = RunConfig.from_dict(content["config"]).run_id
        if not folder.name == content["run_id"] == run_id:
            raise InputError(f"it belongs to the run {run_id}")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"the record {folder} is damaged: {error}") from error
    return content


def load_runs(folder: str | Path) -> pd.DataFrame:
    """All runs of a study's folder, or of a reference, as one tidy table.

    Returns:
        One row per run and epoch: `run_id`, the fields of `RunConfig`, `effective_batch_size`,
        `dataset_fingerprint`, `images_per_epoch`, `validation_images`, `test_images`,
        `images_per_second`, `peak_memory`, then the columns of the history.

    Raises:
        InputError: There are no runs, or it names those that are damaged or on different images.
    """
    return read_runs(folder).tidy


def read_runs(folder: str | Path) -> Runs:
    """All runs of a study's folder, or of a reference; errors as of `load_runs`."""
    folder = Path(folder)
    if not folder.is_dir():
        hint = f"; rename {aside} to it" if (aside := replaced(folder)).is_dir() else ""
        raise InputError(f"no folder {folder}{hint}")
    runs = _from_reference(folder) if (folder / "runs.csv").exists() else _from_records(folder)
    names = runs.table.groupby("dataset_fingerprint")["run_id"].agg(list)
    if len(names) > 1:
        mixed = "; ".join(f"{str(key)[:12]}: {', '.join(ids)}" for key, ids in names.items())
        raise InputError(f"{folder} mixes runs on different images: {mixed}")
    return runs


def _from_records(folder: Path) -> Runs:
    records, damaged = {}, []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):  # else work in progress
            try:
                records[path.name] = read_record(path)
            except InputError as error:
                damaged.append(str(error))
    if damaged or not records:
        raise InputError("\n".join(damaged) or f"no runs in {folder}")
    histories = {run_id: read_csv(folder / run_id / "history.csv") for run_id in records}
    arrays = {run_id: read_arrays(folder / run_id / "predictions.npz") for run_id in records}
    return Runs(
        table=pd.DataFrame([_row(record) for record in records.values()]),
        history=pd.concat(histories, names=["run_id"]).reset_index("run_id").reset_index(drop=True),
        labels=next(iter(arrays.values()))["labels"],
        predictions={name: np.atleast_2d(held["predictions"]) for name, held in arrays.items()},
        environments=[record["environment"] for record in records.values()],
    )


def _row(record: dict[str, Any]) -> dict[str, Any]:
    config = RunConfig.from_dict(record["config"])  # which knows settings that came later
    return {
        "run_id": record["run_id"],
        **config.to_dict(),
        "effective_batch_size": config.effective_batch_size,
        "dataset_fingerprint": record["dataset"]["fingerprint"],
        "images_per_epoch": record["images_per_epoch"],
        "validation_images": record["dataset"]["validation"],
        "test_images": record["dataset"]["test"],
        "images_per_second": record["images_per_second"],
        "peak_memory": record["peak_memory"],
    }


def _from_reference(folder: Path) -> Runs:
    try:
        content = read_manifest(folder / MANIFEST)
        if {*content["files"]} != {*REFERENCE_FILES}:
            raise InputError(f"{MANIFEST} lists {', '.join(content['files'])}")
    except InputError as error:
        raise InputError(f"the reference {folder} is damaged: {error}") from error
    history, table = read_csv(folder / "history.csv"), read_csv(folder / "runs.csv")
    final = table.columns.intersection(history.columns).drop("run_id")
    settings = RunConfig().to_dict()
    later = {name: value for name, value in settings.items() if name not in table}
    columns = dict.fromkeys(["run_id", *settings, *table.columns.drop(final)])
    arrays = read_arrays(folder / "predictions.npz")
    return Runs(
        table=table.assign(**later)[list(columns)],
        history=history,
        labels=arrays.pop("labels"),
        predictions={run_id: np.atleast_2d(late) for run_id, late in arrays.items()},
        environments=content["environments"],
    )


def write_manifest(path: Path, content: Mapping[str, Any], files: Iterable[str]) -> None:
    """Write a manifest of `files`, which lie beside it."""
    signed = {**content, "files": {name: _sha256(path.with_name(name)) for name in files}}
    write_json(path, signed | {"checksum": _checksum(signed)})


def read_manifest(path: Path) -> dict[str, Any]:
    """What a manifest says, its checksums verified; InputError says what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        older = content.keys() == {"environments", "files"}  # a reference, before checksums
        if content.pop("checksum", None) != _checksum(content) and not older:
            raise InputError(f"{path.name} was changed")
        for name, expected in content["files"].items():
            if _sha256(path.with_name(name)) != expected:
                raise InputError(f"{name} was changed")
    except FileNotFoundError as error:
        raise InputError(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(str(error)) from error
    return content


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; killed between two renames, it leaves the earlier as `replaced`."""
    aside = replaced(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    os.rename(new, folder)
    shutil.rmtree(aside, ignore_errors=True)


def replaced(folder: Path) -> Path:
    """Where `replace_folder` puts the earlier folder until the new one has its name."""
    return folder.with_name(f".{folder.name}.replaced")


def read_csv(path: Path) -> pd.DataFrame:
    """A table. Only an empty field is missing: "none" is a kind of normalisation."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file, by name; ValueError for objects, which could run code."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
