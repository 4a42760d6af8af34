"""What a run leaves on disk: `save_run`, `load_runs`. The only code that knows the format.

A record is a folder `<out>/<run_id>/`:

- `run.json`: the fields of `RunRecord`, and a checksum over them.
- `history.csv`: a row an epoch, columns `nbutils.training.HISTORY_COLUMNS`.
- `predictions.npz`: `predictions` and `labels`, uint8, one a test image, in file order; no
  `labels` where they are unknown.
- `notebook.ipynb`: the notebook as executed, where the run was part of a study.

It is written to a temporary folder, whose name starts with a dot, and renamed when whole.

A reference is a folder that holds many runs in few small files: `runs.csv` (a row a run),
`history.csv` (a row a run and epoch), `predictions.npz` (`labels`, and an array a run, named by
its id) and `environment.json` (where the runs were made, and checksums of the other files).

What a study measures otherwise than by runs is a folder of tables: `<name>.csv` each, and
`environment.json` as above.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nbutils.config import InputError, RunConfig

if TYPE_CHECKING:
    from nbutils.training import RunResult

SCHEMA_VERSION = 1
REFERENCE_FOLDER = Path(__file__).resolve().parents[1] / "notebooks" / "reference"
REFERENCE_FILES = ("runs.csv", "history.csv", "predictions.npz")
PACKAGES = ("torch", "torchvision", "numpy", "pandas", "papermill", "jupyterlab")


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` holds.

    Attributes:
        run_id: Name of the run and of its folder.
        config: All fields of `RunConfig`.
        dataset: `name`, `fingerprint` (SHA-256 of pixels and labels), and the number of images
            in `train`, `validation` and `test`.
        images_per_epoch: Training images that take part in an epoch's updates.
        environment: Versions, processor, device, and the number of CPU threads.
        final: The last row of the history.
        images_per_second: Training images per second of training, evaluation not counted.
        peak_memory: Bytes; see `RunResult`.
        files: SHA-256 of `history.csv` and `predictions.npz`.
        schema_version: `SCHEMA_VERSION` of the code that wrote it.
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


def save_run(result: RunResult, out: str | Path) -> Path:
    """Write the record of a run to `<out>/<run_id>/`, in place of an earlier one of the same run.

    Returns:
        The record's folder.
    """
    out = Path(out)
    run_id = result.config.run_id
    partial = out / f".{run_id}.{uuid.uuid4().hex}"
    partial.mkdir(parents=True)
    try:
        result.history.to_csv(partial / "history.csv", index=False)
        np.savez_compressed(
            partial / "predictions.npz",
            predictions=result.predictions.numpy(),
            labels=result.data.test.labels.numpy().astype(np.uint8),
        )
        images = result.images_per_epoch * result.config.epochs
        record = RunRecord(
            run_id=run_id,
            config=result.config.to_dict(),
            dataset={
                "name": result.data.name,
                "fingerprint": result.data.fingerprint,
                "train": len(result.data.train.labels),
                "validation": len(result.data.validation.labels),
                "test": len(result.data.test.images),
            },
            images_per_epoch=result.images_per_epoch,
            environment=_environment(result),
            final={str(k): v for k, v in result.history.iloc[-1].to_dict().items()},
            images_per_second=images / result.history["seconds"].iloc[-1],
            peak_memory=result.peak_memory,
            files={name: _sha256(partial / name) for name in ("history.csv", "predictions.npz")},
        )
        content = dataclasses.asdict(record)
        content["checksum"] = _checksum(content)
        (partial / "run.json").write_text(json.dumps(content, indent=1) + "\n")
        publish(partial, out / run_id)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out / run_id


def publish(partial: Path, folder: Path) -> None:
    """Give a whole record its name, in place of an earlier one."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        os.rename(folder, aside)
        os.rename(partial, folder)
        shutil.rmtree(aside)
    else:
        os.rename(partial, folder)


def read_record(folder: Path) -> RunRecord:
    """The record in `folder`, every checksum verified.

    Raises:
        InputError: It is damaged; the message names it and what is wrong.
    """
    try:
        content = json.loads((folder / "run.json").read_text())
        checksum = content.pop("checksum")
        if content.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"its schema version is {content.get('schema_version')!r}, not {SCHEMA_VERSION}"
            )
        if checksum != _checksum(content):
            raise InputError("run.json was changed")
        record = RunRecord(**content)
        config = RunConfig.from_dict(record.config)
        if not folder.name == record.run_id == config.run_id:
            raise InputError(f"it belongs to the run {config.run_id}")
        for name, known in record.files.items():
            if _sha256(folder / name) != known:
                raise InputError(f"{name} was changed")
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise InputError(f"the record {folder} is damaged: {missing} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the record {folder} is damaged: {error}") from error
    return record


def load_runs(folder: str | Path) -> pd.DataFrame:
    """All runs of a study's folder, or of a reference, as one tidy table.

    Returns:
        A row a run and epoch: `run_id`, the fields of `RunConfig`, `effective_batch_size`,
        `dataset_fingerprint`, `images_per_epoch`, `validation_images`, `test_images`,
        `images_per_second`, `peak_memory`, then the history's columns.

    Raises:
        InputError: There are no runs, or some are damaged, or they used different images; the
            message names them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    if (folder / "runs.csv").exists():
        runs, history = _read_reference(folder)
    else:
        runs, history = _read_records(folder)
    names = runs.groupby("dataset_fingerprint")["run_id"].agg(list)
    if len(names) > 1:
        mixed = "; ".join(f"{str(key)[:12]}: {', '.join(ids)}" for key, ids in names.items())
        raise InputError(f"{folder} mixes runs on different images: {mixed}")
    return runs.merge(history, on="run_id", validate="one_to_many")


def load_predictions(folder: str | Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Labels of the test images, and each run's predictions of them by run id; all uint8.

    Where the labels are unknown, there are none: shape (0,).

    Raises:
        InputError: As `load_runs`.
    """
    folder = Path(folder)
    if (folder / "runs.csv").exists():
        _read_reference(folder)
        with np.load(folder / "predictions.npz") as arrays:
            predictions = dict(arrays)
        return predictions.pop("labels"), predictions
    predictions = {}
    for record in _read_all(folder):
        with np.load(folder / record.run_id / "predictions.npz") as arrays:
            predictions[record.run_id] = arrays["predictions"]
            labels = arrays["labels"]
    return labels, predictions


def export_runs(folder: str | Path, reference: str | Path) -> None:
    """Add the runs of a study's folder to a reference, in place of earlier ones of the same id.

    A reference that takes more than one machine or evening to make grows that way. To begin
    anew, remove its folder first.

    Raises:
        InputError: As `load_runs`, or the reference holds runs on other images.
    """
    folder, reference = Path(folder), Path(reference)
    load_runs(folder)
    runs, history = _read_records(folder)
    runs = runs.merge(history.groupby("run_id").tail(1).drop(columns="epoch"), on="run_id")
    labels, predictions = load_predictions(folder)
    environments = [record.environment for record in _read_all(folder)]
    if (reference / "runs.csv").exists():
        _, earlier = _read_reference(reference)
        before = _read_csv(reference / "runs.csv")
        if set(before["dataset_fingerprint"]) != set(runs["dataset_fingerprint"]):
            raise InputError(f"{folder} and {reference} hold runs on different images")
        kept = before[~before["run_id"].isin(runs["run_id"])]
        history = pd.concat([earlier[earlier["run_id"].isin(kept["run_id"])], history])
        runs = pd.concat([kept, runs])
        _, held = load_predictions(reference)
        predictions = {run_id: held[run_id] for run_id in kept["run_id"]} | predictions
        if len(kept):
            known = json.loads((reference / "environment.json").read_text())["environments"]
            environments = [*known, *environments]
    reference.mkdir(parents=True, exist_ok=True)
    runs.sort_values("run_id").to_csv(reference / "runs.csv", index=False)
    history.sort_values(["run_id", "epoch"]).to_csv(reference / "history.csv", index=False)
    in_order = dict(sorted(predictions.items()))
    np.savez_compressed(reference / "predictions.npz", labels=labels, **in_order)  # type: ignore[arg-type]
    distinct = {json.dumps(environment): environment for environment in environments}
    files = {name: _sha256(reference / name) for name in REFERENCE_FILES}
    content = {"environments": list(distinct.values()), "files": files}
    (reference / "environment.json").write_text(json.dumps(content, indent=1) + "\n")


def save_tables(tables: Mapping[str, pd.DataFrame], folder: str | Path, device: str) -> None:
    """Write tables of measurements, and where they were made.

    Args:
        tables: By name; their index is not kept.
        folder: Where they go; made where there is none. Tables of other names are refused there.
        device: What was measured: "cpu", or the name of the GPU.

    Raises:
        InputError: The folder holds other tables.
    """
    folder = Path(folder)
    if holds_tables(folder) and set(load_tables(folder)) != set(tables):
        raise InputError(f"{folder} holds other tables: {', '.join(load_tables(folder))}")
    content = {name: table.to_csv(index=False) for name, table in tables.items()}
    files = {f"{name}.csv": hashlib.sha256(t.encode()).hexdigest() for name, t in content.items()}
    _write_tables(folder, content, {"environments": [machine(device)], "files": files})


def load_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables that `save_tables` wrote, by name.

    Raises:
        InputError: There are none, or they were changed.
    """
    folder = Path(folder)
    try:
        known = json.loads((folder / "environment.json").read_text())["files"]
        names = [_table_name(file) for file in known]
        changed = [file for file in known if _sha256(folder / file) != known[file]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} holds no whole tables: {error}") from error
    if changed:
        raise InputError(f"the tables in {folder} are damaged: {', '.join(changed)} was changed")
    return {name: _read_csv(folder / f"{name}.csv") for name in names}


def holds_tables(folder: str | Path) -> bool:
    """Whether there are tables of measurements in `folder`, rather than runs."""
    folder = Path(folder)
    return (folder / "environment.json").exists() and not (folder / "runs.csv").exists()


def export_tables(folder: str | Path, reference: str | Path) -> None:
    """Copy tables of measurements to a reference, in place of what it held.

    Raises:
        InputError: As `load_tables`, or the reference holds something else.
    """
    folder, reference = Path(folder), Path(reference)
    content = {name: (folder / f"{name}.csv").read_text() for name in load_tables(folder)}
    if (reference / "runs.csv").exists():
        raise InputError(f"{reference} holds runs, and {folder} tables")
    _write_tables(reference, content, json.loads((folder / "environment.json").read_text()))


def _write_tables(folder: Path, content: Mapping[str, str], description: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / f"{name}.csv").write_text(text)
    (folder / "environment.json").write_text(json.dumps(description, indent=1) + "\n")


def _table_name(file: str) -> str:
    if Path(file).name != file or not file.endswith(".csv"):
        raise ValueError(f"{file!r} is not the name of a table")
    return file.removesuffix(".csv")


def _read_all(folder: Path) -> list[RunRecord]:
    """Every record in `folder`, by run id; hidden folders are work in progress."""
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


def _read_records(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    records = _read_all(folder)
    runs = pd.DataFrame([_run_row(record) for record in records])
    histories = {r.run_id: _read_csv(folder / r.run_id / "history.csv") for r in records}
    history = pd.concat(histories, names=["run_id"]).reset_index("run_id").reset_index(drop=True)
    return runs, history


def _run_row(record: RunRecord) -> dict[str, Any]:
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


def _read_reference(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    try:
        known = json.loads((folder / "environment.json").read_text())["files"]
        changed = [name for name in REFERENCE_FILES if _sha256(folder / name) != known[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the reference {folder} is damaged: {error}") from error
    if changed:
        raise InputError(f"the reference {folder} is damaged: {', '.join(changed)} was changed")
    runs, history = _read_csv(folder / "runs.csv"), _read_csv(folder / "history.csv")
    return runs.drop(columns=[c for c in history.columns if c != "run_id" and c in runs]), history


def _read_csv(path: Path) -> pd.DataFrame:
    # Only an empty field is missing: "none" is a kind of normalisation.
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def _environment(result: RunResult) -> dict[str, Any]:
    import torch

    on_cuda = result.device.type == "cuda"
    device = torch.cuda.get_device_name(result.device) if on_cuda else result.device.type
    return machine(device) | {"engine": result.engine}


def machine(device: str) -> dict[str, Any]:
    """Versions and hardware, for a record; `device` is what did the work."""
    import torch

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "device": device,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def processor() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
