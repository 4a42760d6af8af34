"""What a run leaves on disk, and a folder of such runs as one table.

A record is a folder `<out>/<run_id>/`:

- `run.json`: the fields of `RunRecord`, and a checksum over them.
- `history.csv`: one row per epoch, columns `nbutils.training.result.HISTORY_COLUMNS`.
- `predictions.npz`: `predictions`, uint8, shape (k, test images), after each of the last
  k = min(5, epochs) epochs; and `labels`, uint8, shape (test images,), or (0,) where they are
  unknown. Older records have only the last epoch's predictions, shape (test images,).
- `notebook.ipynb`: the executed notebook, where the run was part of a study. Nothing reads it,
  so it has no checksum.

It is written to a temporary folder, whose name starts with a dot, and renamed when whole. Many runs
can be kept in few small files instead: see `nbutils.studies.reference`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nbutils.errors import InputError
from nbutils.machine import device_name, environment
from nbutils.studies.files import (
    checksum,
    read_arrays,
    read_csv,
    read_description,
    replace_folder,
    replaced,
    sha256,
)
from nbutils.training.config import RunConfig

if TYPE_CHECKING:
    from nbutils.training.result import RunResult

SCHEMA_VERSION = 2
RECORD_FILES = ("history.csv", "predictions.npz")
REFERENCE_FILES = ("runs.csv", "history.csv", "predictions.npz")


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` holds.

    Attributes:
        run_id: Name of the run and of its folder.
        config: All fields of `RunConfig`.
        dataset: `name`, `fingerprint` (SHA-256 of pixels and labels), and the number of images
            in `train`, `validation` and `test`.
        images_per_epoch: Training images that take part in the updates of an epoch.
        environment: Versions, processor, device, number of CPU threads, and `cuda_graph`.
        final: The last row of the history.
        images_per_second: Training images per second of training, without evaluation.
        peak_memory: Bytes; see `RunResult`.
        files: SHA-256 of `history.csv` and `predictions.npz`.
        schema_version: `SCHEMA_VERSION` of the code that wrote it.
        micro_batch: Images in one pass; see `RunResult`. None in older records.
    """

    run_id: str
    config: dict[str, Any]
    dataset: dict[str, Any]
    images_per_epoch: int
    environment: dict[str, Any]
    final: dict[str, float]
    images_per_second: float
    peak_memory: int
    files: dict[str, str]
    schema_version: int = SCHEMA_VERSION
    micro_batch: int | None = None


@dataclass(frozen=True)
class Runs:
    """All runs of a folder.

    Attributes:
        table: One row per run: its id, the fields of its config, and what its record measured.
        history: One row per run and epoch.
        labels: Of the test images, uint8.
        predictions: By run id, uint8, shape (k, test images); see the record's file.
        environments: Where the runs were made.
    """

    table: pd.DataFrame
    history: pd.DataFrame
    labels: np.ndarray
    predictions: dict[str, np.ndarray]
    environments: list[dict[str, Any]]


def save_run(result: RunResult, out: str | Path) -> Path:
    """Write the record of a run to `<out>/<run_id>/`, in place of an earlier one of the same run.

    Returns:
        The record's folder.
    """
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
        files = {name: sha256(partial / name) for name in RECORD_FILES}
        content = dataclasses.asdict(_record_of(result, files))
        content["checksum"] = checksum(content)
        (partial / "run.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _record_of(result: RunResult, files: dict[str, str]) -> RunRecord:
    data = result.data
    images = result.images_per_epoch * result.config.epochs
    where = environment(device_name(result.device)) | {"cuda_graph": result.cuda_graph}
    return RunRecord(
        run_id=result.config.run_id,
        config=result.config.to_dict(),
        dataset={
            "name": data.name,
            "fingerprint": data.fingerprint,
            "train": len(data.train.labels),
            "validation": len(data.validation.labels),
            "test": len(data.test.images),
        },
        images_per_epoch=result.images_per_epoch,
        environment=where,
        final={str(name): value for name, value in result.history.iloc[-1].to_dict().items()},
        images_per_second=images / result.history["seconds"].iloc[-1],
        peak_memory=result.peak_memory,
        files=files,
        micro_batch=result.micro_batch,
    )


def read_record(folder: Path) -> RunRecord:
    """The record in `folder`; all checksums are verified.

    Raises:
        InputError: It is damaged; the message names it and what is wrong.
    """
    try:
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        digest = content.pop("checksum")
        if content.get("schema_version") not in (1, SCHEMA_VERSION):
            version = content.get("schema_version")
            raise InputError(f"its schema version is {version!r}, and only 1 and 2 can be read")
        if digest != checksum(content):
            raise InputError("run.json was changed")
        record = RunRecord(**content)
        run_id = RunConfig.from_dict(record.config).run_id
        if not folder.name == record.run_id == run_id:
            raise InputError(f"it belongs to the run {run_id}")
        for name in RECORD_FILES:
            if sha256(folder / name) != record.files[name]:
                raise InputError(f"{name} was changed")
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise InputError(f"the record {folder} is damaged: {missing} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the record {folder} is damaged: {error}") from error
    return record


def load_runs(folder: str | Path) -> pd.DataFrame:
    """All runs of a study's folder, or of a reference, as one tidy table.

    Returns:
        One row per run and epoch: `run_id`, the fields of `RunConfig`, `effective_batch_size`,
        `dataset_fingerprint`, `images_per_epoch`, `validation_images`, `test_images`,
        `images_per_second`, `peak_memory`, then the columns of the history.

    Raises:
        InputError: There are no runs, or some are damaged, or they used different images; the
            message names them.
    """
    runs = read_runs(folder)
    final = runs.table.columns.intersection(runs.history.columns).drop("run_id")
    table = runs.table.drop(columns=final)
    return table.merge(runs.history, on="run_id", validate="one_to_many")


def load_predictions(folder: str | Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Labels of the test images, and the final predictions of each run by its id.

    Returns:
        uint8, shape (test images,), all of them; labels of shape (0,) where they are unknown.

    Raises:
        InputError: As `load_runs`.
    """
    labels, predictions = load_late_predictions(folder)
    return labels, {run_id: late[-1] for run_id, late in predictions.items()}


def load_late_predictions(folder: str | Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As `load_predictions`, but the predictions after each of the last k epochs of a run.

    Returns:
        Predictions of shape (k, test images), the final ones last: k = min(5, epochs), or 1 in
        older records.
    """
    runs = read_runs(folder)
    return runs.labels, runs.predictions


def read_runs(folder: str | Path) -> Runs:
    """All runs of a study's folder, or of a reference.

    Raises:
        InputError: As `load_runs`.
    """
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
    records = _read_records(folder)
    histories = {r.run_id: read_csv(folder / r.run_id / "history.csv") for r in records}
    history = pd.concat(histories, names=["run_id"]).reset_index("run_id").reset_index(drop=True)
    arrays = {r.run_id: read_arrays(folder / r.run_id / "predictions.npz") for r in records}
    return Runs(
        table=pd.DataFrame([_row(record) for record in records]),
        history=history,
        labels=arrays[records[0].run_id]["labels"],
        predictions={name: np.atleast_2d(held["predictions"]) for name, held in arrays.items()},
        environments=[record.environment for record in records],
    )


def _from_reference(folder: Path) -> Runs:
    try:
        content = read_description(folder)
        if set(content["files"]) != set(REFERENCE_FILES):
            raise InputError(f"environment.json lists {', '.join(content['files'])}")
    except InputError as error:
        raise InputError(f"the reference {folder} is damaged: {error}") from error
    arrays = read_arrays(folder / "predictions.npz")
    return Runs(
        table=read_csv(folder / "runs.csv"),
        history=read_csv(folder / "history.csv"),
        labels=arrays.pop("labels"),
        predictions={run_id: np.atleast_2d(late) for run_id, late in arrays.items()},
        environments=content["environments"],
    )


def _read_records(folder: Path) -> list[RunRecord]:
    """All records in `folder`, by run id; hidden folders are work in progress."""
    records, damaged = [], []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            try:
                records.append(read_record(path))
            except InputError as error:
                damaged.append(str(error))
    if damaged:
        raise InputError("\n".join(damaged))
    if not records:
        raise InputError(f"no runs in {folder}")
    return records


def _row(record: RunRecord) -> dict[str, Any]:
    config = RunConfig.from_dict(record.config)
    return {
        "run_id": record.run_id,
        **config.to_dict(),
        "effective_batch_size": config.effective_batch_size,
        "dataset_fingerprint": record.dataset["fingerprint"],
        "images_per_epoch": record.images_per_epoch,
        "validation_images": record.dataset["validation"],
        "test_images": record.dataset["test"],
        "images_per_second": record.images_per_second,
        "peak_memory": record.peak_memory,
    }
