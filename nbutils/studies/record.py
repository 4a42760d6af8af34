"""What a run leaves on disk: `save_run`, `load_runs`. The only code that knows the format.

A record is a folder `<out>/<run_id>/`:

- `run.json`: the fields of `RunRecord`, and a checksum over them.
- `history.csv`: a row an epoch, columns `nbutils.training.train.HISTORY_COLUMNS`.
- `predictions.npz`: `predictions` and `labels`, uint8, one a test image, in file order; no
  `labels` where they are unknown.
- `notebook.ipynb`: the notebook as executed, where the run was part of a study. Nothing reads it,
  so it alone is under no checksum.

It is written to a temporary folder, whose name starts with a dot, and renamed when whole.

A reference is a folder that holds many runs in few small files: `runs.csv` (a row a run),
`history.csv` (a row a run and epoch), `predictions.npz` (`labels`, and an array a run, named by
its id) and `environment.json` (where the runs were made, checksums of the other files, and one
over all that; older references lack the last).

What a study measures otherwise than by runs is a folder of tables: `<name>.csv` each, and
`environment.json` as above.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nbutils.errors import InputError
from nbutils.machine import device_name, environment
from nbutils.paths import write_atomically
from nbutils.training.config import RunConfig

if TYPE_CHECKING:
    from nbutils.training.train import RunResult

SCHEMA_VERSION = 1
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
        images_per_epoch: Training images that take part in an epoch's updates.
        environment: Versions, processor, device, and the number of CPU threads.
        final: The last row of the history.
        images_per_second: Training images per second of training, evaluation not counted.
        peak_memory: Bytes; see `RunResult`.
        files: SHA-256 of `history.csv` and `predictions.npz`.
        schema_version: `SCHEMA_VERSION` of the code that wrote it.
        micro_batch: Images in one forward/backward pass, which may be fewer than the config's
            `batch_size`; see `RunResult`. None in older records.
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
            files={name: _sha256(partial / name) for name in RECORD_FILES},
            micro_batch=result.micro_batch,
        )
        content = dataclasses.asdict(record)
        content["checksum"] = _checksum(content)
        (partial / "run.json").write_text(json.dumps(content, indent=1) + "\n")
        publish(partial, out / run_id)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out / run_id


def publish(partial: Path, folder: Path) -> None:
    """Give a whole record or reference its name, in place of an earlier one.

    Two renames cannot be one: a process that is killed between them leaves the earlier one
    beside, as `.NAME.replaced`, and `load_runs` refuses the folder until one of them is named.
    """
    replaced = _replaced(folder)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(folder, replaced)
    os.rename(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


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
        for name in RECORD_FILES:
            if _sha256(folder / name) != record.files[name]:
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
        A row a run and epoch: `run_id`, the fields of `RunConfig`, `effective_batch_size`,
        `dataset_fingerprint`, `images_per_epoch`, `validation_images`, `test_images`,
        `images_per_second`, `peak_memory`, then the history's columns.

    Raises:
        InputError: There are no runs, or some are damaged, or they used different images; the
            message names them.
    """
    folder = _existing(folder)
    if (folder / "runs.csv").exists():
        _verify_reference(folder)
        runs, history = _reference_tables(folder)
        runs = runs.drop(columns=[c for c in history.columns if c != "run_id" and c in runs])
    else:
        runs, history = _record_tables(folder, _read_all(folder))
    _check_same_images(folder, runs)
    return runs.merge(history, on="run_id", validate="one_to_many")


def load_predictions(folder: str | Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Labels of the test images, and each run's predictions of them by run id; all uint8.

    Where the labels are unknown, there are none: shape (0,).

    Raises:
        InputError: As `load_runs`.
    """
    folder = _existing(folder)
    if (folder / "runs.csv").exists():
        _verify_reference(folder)
        return _reference_predictions(folder)
    records = _read_all(folder)
    _check_same_images(folder, pd.DataFrame([_run_row(record) for record in records]))
    return _record_predictions(folder, records)


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        aside = _replaced(folder)
        hint = f"; it was being replaced: name {aside} so" if aside.is_dir() else ""
        raise InputError(f"no folder {folder}{hint}")
    return folder


def export_runs(folder: str | Path, reference: str | Path) -> None:
    """Add the runs of a study's folder to a reference, in place of earlier ones of the same id.

    A reference that takes more than one machine or evening to make grows that way. To begin
    anew, remove its folder first. Killed at any instant, or out of disk, it leaves the earlier
    reference or the new one; see `publish`.

    Raises:
        InputError: As `load_runs`, or the reference holds runs on other images.
    """
    folder, reference = _existing(folder), Path(reference).absolute()
    if _replaced(reference).exists() and not reference.exists():
        os.rename(_replaced(reference), reference)  # an export was killed between two renames
    records = _read_all(folder)
    runs, history = _record_tables(folder, records)
    _check_same_images(folder, runs)
    runs = runs.merge(history.groupby("run_id").tail(1).drop(columns="epoch"), on="run_id")
    labels, predictions = _record_predictions(folder, records)
    environments = [record.environment for record in records]
    if (reference / "runs.csv").exists():
        known = _verify_reference(reference)["environments"]
        before, earlier = _reference_tables(reference)
        if set(before["dataset_fingerprint"]) != set(runs["dataset_fingerprint"]):
            raise InputError(f"{folder} and {reference} hold runs on different images")
        kept = before[~before["run_id"].isin(runs["run_id"])]
        history = pd.concat([earlier[earlier["run_id"].isin(kept["run_id"])], history])
        runs = pd.concat([kept, runs])
        _, held = _reference_predictions(reference)
        predictions = {run_id: held[run_id] for run_id in kept["run_id"]} | predictions
        if len(kept):
            environments = [*known, *environments]
    distinct = {json.dumps(each, sort_keys=True): each for each in environments}
    in_order = dict(sorted(predictions.items()))
    reference.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{reference.name}.", dir=reference.parent) as aside:
        partial = Path(aside) / reference.name
        if reference.exists():  # it may hold more than is written here
            shutil.copytree(reference, partial)
        partial.mkdir(exist_ok=True)
        runs.sort_values("run_id").to_csv(partial / "runs.csv", index=False)
        history.sort_values(["run_id", "epoch"]).to_csv(partial / "history.csv", index=False)
        np.savez_compressed(partial / "predictions.npz", labels=labels, **in_order)  # type: ignore[arg-type]
        files = {name: _sha256(partial / name) for name in REFERENCE_FILES}
        content = _describe(list(distinct.values()), files)
        (partial / "environment.json").write_text(json.dumps(content, indent=1) + "\n")
        publish(partial, reference)


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
    _write_tables(folder, content, _describe([environment(device)], files))


def load_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables that `save_tables` wrote, by name.

    Raises:
        InputError: There are none, or they were changed.
    """
    folder = Path(folder)
    try:
        files = _read_description(folder)["files"]
    except InputError as error:
        raise InputError(f"{folder} holds no whole tables: {error}") from error
    return {file.removesuffix(".csv"): _read_csv(folder / file) for file in files}


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
    # Until it is written anew, there are no tables, rather than some that do not belong together.
    (folder / "environment.json").unlink(missing_ok=True)
    for name, text in content.items():
        (folder / f"{name}.csv").write_text(text)
    write_atomically(folder / "environment.json", f"{json.dumps(description, indent=1)}\n".encode())


def _read_all(folder: Path) -> list[RunRecord]:
    """Every record in `folder`, by run id; hidden folders are work in progress."""
    records, damaged = [], []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            try:
                records.append(read_record(path))
            except InputError as error:
                damaged.append(str(error))
    for path in sorted(folder.glob(_replaced(folder / "*").name)):
        name = path.name.removeprefix(".").removesuffix(".replaced")
        if not (folder / name).exists():
            damaged.append(
                f"the record {folder / name} is damaged: it was being replaced; name {path} so, "
                f"or save the run again"
            )
    if damaged:
        raise InputError("\n".join(damaged))
    if not records:
        raise InputError(f"no runs in {folder}")
    return records


def _check_same_images(folder: Path, runs: pd.DataFrame) -> None:
    names = runs.groupby("dataset_fingerprint")["run_id"].agg(list)
    if len(names) > 1:
        mixed = "; ".join(f"{str(key)[:12]}: {', '.join(ids)}" for key, ids in names.items())
        raise InputError(f"{folder} mixes runs on different images: {mixed}")


def _record_tables(folder: Path, records: Sequence[RunRecord]) -> tuple[pd.DataFrame, pd.DataFrame]:
    runs = pd.DataFrame([_run_row(record) for record in records])
    histories = {r.run_id: _read_csv(folder / r.run_id / "history.csv") for r in records}
    history = pd.concat(histories, names=["run_id"]).reset_index("run_id").reset_index(drop=True)
    return runs, history


def _record_predictions(
    folder: Path, records: Sequence[RunRecord]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    predictions = {}
    for record in records:
        arrays = _read_arrays(folder / record.run_id / "predictions.npz")
        predictions[record.run_id] = arrays["predictions"]
        labels = arrays["labels"]
    return labels, predictions


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


def _verify_reference(folder: Path) -> dict[str, Any]:
    """What its `environment.json` holds, every checksum verified."""
    try:
        content = _read_description(folder)
        if set(content["files"]) != set(REFERENCE_FILES):
            raise InputError(f"environment.json lists {', '.join(content['files'])}")
    except InputError as error:
        raise InputError(f"the reference {folder} is damaged: {error}") from error
    return content


def _describe(environments: list[dict[str, Any]], files: Mapping[str, str]) -> dict[str, Any]:
    """What an `environment.json` holds."""
    content = {"environments": environments, "files": dict(files)}
    return content | {"checksum": _checksum(content)}


def _read_description(folder: Path) -> dict[str, Any]:
    """What `environment.json` in `folder` holds, itself and the files that it lists verified.

    Raises:
        InputError: Says what is wrong.
    """
    try:
        content = json.loads((folder / "environment.json").read_text())
        if content.keys() - {"checksum"} != {"environments", "files"}:
            raise InputError(f"environment.json has the keys {', '.join(content)}")
        checksum = content.pop("checksum", None)
        if checksum and checksum != _checksum(content):
            raise InputError("environment.json was changed")
        files = content["files"]
        for name in files:
            if Path(name).name != name:
                raise InputError(f"{name!r} is not the name of a file in it")
        changed = [name for name in files if _sha256(folder / name) != files[name]]
    except FileNotFoundError as error:
        raise InputError(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(str(error)) from error
    if changed:
        raise InputError(f"{', '.join(changed)} was changed")
    return content


def _reference_tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    return _read_csv(folder / "runs.csv"), _read_csv(folder / "history.csv")


def _reference_predictions(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    predictions = _read_arrays(folder / "predictions.npz")
    return predictions.pop("labels"), predictions


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except ValueError as error:  # its checksum holds: it was made to look whole
        raise InputError(f"{path} holds more than arrays of numbers: {error}") from error


def _read_csv(path: Path) -> pd.DataFrame:
    # Only an empty field is missing: "none" is a kind of normalisation.
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def _environment(result: RunResult) -> dict[str, Any]:
    return environment(device_name(result.device)) | {"engine": result.engine}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
