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
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

RECORD_FILES = ("history.csv", "predictions.npz")
REFERENCE_FILES, MANIFEST = ("runs.csv", *RECORD_FILES), "environment.json"


class Runs(NamedTuple):
    """All runs of a folder: `tidy` is what `load_runs` returns, `labels` have shape (test images,).

    `predictions` are those of each run after its last k epochs, shape (k, test images), by its id.
    """

    tidy: pd.DataFrame
    labels: np.ndarray
    predictions: dict[str, np.ndarray]
    environments: list[dict[str, Any]]


def save_run(result: RunResult, out: str | Path) -> Path:
    """Write the record of a run to the folder `<out>/<run_id>/`, in place of an earlier one."""
    config, data, last = result.config, result.data, result.history.iloc[-1]
    splits = {name: len(getattr(data, name).images) for name in ("train", "validation", "test")}
    content = {
        "run_id": config.run_id,
        "config": config.to_dict(),
        "dataset": {"name": data.name, "fingerprint": data.fingerprint, **splits},
        "images_per_epoch": result.images_per_epoch,
        "environment": environment(device_name(result.device)) | {"cuda_graph": result.cuda_graph},
        "final": last.to_dict(),
        "images_per_second": result.images_per_epoch * config.epochs / last["seconds"],
        "peak_memory": result.peak_memory,
        "micro_batch": result.micro_batch,
        "schema_version": 2,
    }
    late, labels = result.late_predictions.numpy(), data.test.labels.numpy().astype(np.uint8)
    folder = Path(out, config.run_id)
    with replacing(folder) as new:
        files = {"history": result.history, "predictions": {"predictions": late, "labels": labels}}
        write_files(new / "run.json", content, files)
    return folder


def read_record(folder: Path, fingerprint: str | None = None) -> dict[str, Any]:
    """What `run.json` in `folder` says, with the `files`.

    InputError names what is damaged, or a record made on images of another fingerprint.
    """
    with naming_damage(folder):
        content = read_files(folder / "run.json", RECORD_FILES)
        version = content.get("schema_version")
        if version not in (1, 2):
            raise InputError(f"its schema version is {version!r}, and only 1 and 2 can be read")
        run_id = RunConfig.from_dict(content["config"]).run_id
        if not folder.name == content["run_id"] == run_id:
            raise InputError(f"it belongs to the run {run_id}")
        name, made_on = (content["dataset"][key] for key in ("name", "fingerprint"))
    if fingerprint not in (None, made_on):
        raise InputError(f"{folder} was made on other images than {name!r} has now; move it away")
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
    if (folder / "runs.csv").exists():
        return combine([_from_reference(folder)], folder)
    parts, damaged = [], []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):  # else work in progress
            try:
                parts.append(_from_record(path))
            except InputError as error:
                damaged.append(str(error))
    if damaged or not parts:
        raise InputError("\n".join(damaged) or f"no runs in {folder}")
    return combine(parts, folder)


def combine(parts: Sequence[Runs], folder: Path) -> Runs:
    """The runs of all parts, for `folder`; of one that is in several, what the last part has."""
    key = ["run_id", "epoch"]
    tidy = pd.concat([part.tidy for part in parts]).drop_duplicates(key, keep="last")
    names = tidy.groupby("dataset_fingerprint")["run_id"].unique()
    if len(names) > 1:
        mixed = "; ".join(f"{str(key)[:12]}: {', '.join(ids)}" for key, ids in names.items())
        raise InputError(f"{folder} mixes runs on different images: {mixed}")
    late = {run_id: array for part in parts for run_id, array in part.predictions.items()}
    places = [place for part in parts for place in part.environments]
    return Runs(
        tidy=tidy.sort_values(key, ignore_index=True),
        labels=parts[-1].labels,
        predictions=dict(sorted(late.items())),
        environments=[place for i, place in enumerate(places) if place not in places[:i]],
    )


def _from_record(folder: Path) -> Runs:
    record = read_record(folder)
    config = RunConfig.from_dict(record["config"])  # which knows settings that came later
    row = {
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
    history, arrays = record["files"]["history"], record["files"]["predictions"]
    return Runs(
        tidy=pd.DataFrame([row]).merge(history, how="cross"),
        labels=arrays["labels"],
        predictions={record["run_id"]: np.atleast_2d(arrays["predictions"])},
        environments=[record["environment"]],
    )


def _from_reference(folder: Path) -> Runs:
    with naming_damage(folder):
        content = read_files(folder / MANIFEST, REFERENCE_FILES)
    table, history, arrays = (content["files"][name] for name in ("runs", "history", "predictions"))
    table = table.drop(columns=history.columns.drop("run_id"), errors="ignore")
    later = {k: v for k, v in RunConfig().to_dict().items() if k not in table}  # than it was made
    columns = dict.fromkeys(["run_id", *RunConfig.field_names(), *table])
    return Runs(
        tidy=table.assign(**later)[[*columns]].merge(history, on="run_id"),
        labels=arrays.pop("labels"),
        predictions={run_id: np.atleast_2d(late) for run_id, late in arrays.items()},
        environments=content["environments"],
    )


def write_files(path: Path, content: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Write tables as `<name>.csv`, arrays by name as `<name>.npz`, and a manifest at `path`."""
    digests = {}
    for name, held in files.items():
        if isinstance(held, pd.DataFrame):
            file = path.with_name(f"{name}.csv")
            held.to_csv(file, index=False)
        else:
            file = path.with_name(f"{name}.npz")
            np.savez_compressed(file, **held)
        digests[file.name] = _sha256(file.read_bytes())
    signed = {**content, "files": digests}
    write_json(path, signed | {"checksum": _sha256(json.dumps(signed, sort_keys=True).encode())})


def read_files(path: Path, required: Iterable[str] = ()) -> dict[str, Any]:
    """What a manifest says, its `files` in place of their checksums, which are verified."""
    content = json.loads(path.read_text(encoding="utf-8"))
    older = content.keys() == {"environments", "files"}  # a reference, before checksums
    checksum = content.pop("checksum", None)
    if checksum != _sha256(json.dumps(content, sort_keys=True).encode()) and not older:
        raise InputError(f"{path.name} was changed")
    digests, content["files"] = content["files"], {}
    for name in dict.fromkeys([*required, *digests]):
        file = path.with_name(name)
        if _sha256(file.read_bytes()) != digests.get(name):
            raise InputError(f"{name} was changed")
        if file.suffix == ".csv":  # only an empty field is missing: "none" is a normalisation
            held: Any = pd.read_csv(file, keep_default_na=False, na_values=[""])
        else:
            with np.load(file, allow_pickle=False) as arrays:  # objects could run code
                held = dict(arrays)
        content["files"][file.stem] = held
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def naming_damage(folder: Path) -> Iterator[None]:
    """Have what goes wrong in the block say that `folder` is damaged."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{folder} is damaged: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} is damaged: {error}") from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder for the block to fill, then renamed to `folder`, in place of an earlier one.

    Killed between two renames, it leaves the earlier one as `replaced`, and the next puts it back.
    """
    aside = replaced(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if aside.exists() and not folder.exists():
        os.rename(aside, folder)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = Path(scratch, folder.name)
        new.mkdir()
        yield new
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
        os.rename(new, folder)
        shutil.rmtree(aside, ignore_errors=True)


def replaced(folder: Path) -> Path:
    """Where `replacing` puts the earlier folder until the new one has its name."""
    return folder.with_name(f".{folder.name}.replaced")
