"""Runs all libraries, keeps the record, and formats it for notebook 06 and the README."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from nbutils.errors import InputError
from nbutils.paths import REFERENCE, ROOT
from nbutils.report.libraries.measure import LIBRARIES, NOT_ITS_JOB, NOT_OFFERED, PROBES

FOLDER = REFERENCE / "libraries"
TIME_LIMIT = 300  # seconds for one package
_CHILD = "import sys; from nbutils.report.libraries.measure import main; main(*sys.argv[1:])"


def observe_all(folder: Path = FOLDER, jobs: int = 2) -> Path:
    """Run the installed libraries, each package in a process of its own, and write the record.

    A library that fails is recorded with the reason. One that is not installed here keeps the
    rows that were recorded elsewhere, which say with which versions.

    Args:
        folder: Gets `libraries.csv`, one row per library and probe, and `versions.csv`.
        jobs: Processes side by side.

    Returns:
        The path of `libraries.csv`.

    Raises:
        InputError: No library is installed.
    """
    packages = list(dict.fromkeys(library.package for library in LIBRARIES.values()))
    installed = {
        package: number for package in packages if (number := _version(package)) is not None
    }
    if list(installed) == [""]:
        raise InputError("none of the libraries is installed: pip install -e '.[peers]'")
    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(installed, pool.map(_observe_in_process, installed), strict=True))
    kept, versions = _read(folder)
    kept["package"] = [LIBRARIES[name].package for name in kept["library"]]
    rows, numbers = [], []
    for package in packages:
        one = found.get(package, {"not_run": "it is not installed"})
        if package not in found and package in versions.index:
            one = {str(key): value for key, value in versions.loc[package].items()}
            one["rows"] = (
                kept[kept["package"] == package].drop(columns="package").to_dict("records")
            )
        rows += one.pop("rows", [])
        numbers.append({"package": package, "version": installed.get(package, ""), **one})
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["package", "version", "torch", "not_run"]
    pd.DataFrame(numbers).reindex(columns=columns).to_csv(folder / "versions.csv", index=False)
    pd.DataFrame(rows).to_csv(folder / "libraries.csv", index=False)
    return folder / "libraries.csv"


def _version(package: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return version(package) if package else ""
    except PackageNotFoundError:
        return None


def _observe_in_process(package: str) -> dict[str, Any]:
    """What a new process measured; or why it could not."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    settings = {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryDirectory() as folder:
        try:
            ended = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", _CHILD, package, "found.json"],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            return {"not_run": f"it took longer than {TIME_LIMIT} s"}
        if ended.returncode:
            lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
            return {"not_run": lines[-1]}
        return json.loads(Path(folder, "found.json").read_text())


def _read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The record: its rows, and the versions by package."""
    try:
        rows = pd.read_csv(folder / "libraries.csv")
        versions = pd.read_csv(folder / "versions.csv", dtype=str).fillna("")
    except FileNotFoundError:
        rows = pd.DataFrame(columns=["library", "probe", "measured", "verdict"])
        versions = pd.DataFrame(columns=["package", "version", "torch", "not_run"])
    return rows, versions.set_index("package")


def libraries_table(folder: Path = FOLDER) -> pd.DataFrame:
    """The record as people read it: one row per library, a tick or the error in each cell."""
    rows, versions = _read(folder)
    cells = {(row.library, row.probe): _cell(row) for row in rows.itertuples()}
    names = [name for name in LIBRARIES if (name, next(iter(PROBES))) in cells]
    titles = [_title(name, str(versions["version"][LIBRARIES[name].package])) for name in names]
    return pd.DataFrame(
        {probe: [cells[name, probe] for name in names] for probe in PROBES},
        index=pd.Index(titles, name="library"),
    )


def _title(name: str, number: str) -> str:
    """The version behind the library's name: `accelerate 1.15.0, loader not prepared`."""
    library, comma, variant = name.partition(",")
    return f"{library} {number}".strip() + comma + variant


def _cell(row: Any) -> str:
    if row.verdict == "right":
        return "✓"
    in_words = row.probe in ("clipping", "schedule") or row.verdict in (
        *(NOT_ITS_JOB, NOT_OFFERED, "carried over", "dropped"),
    )
    return row.verdict if in_words else f"{row.measured:.3g}"


NOTES = """\
Each library trained for two epochs on micro-batches of 4 images, 3 to a window. A tick is right; \
a number is the measured value, which should be 1 (updates per epoch: 2).

- *Full window* and *short last window*: the size of the gradient, relative to the mean over the \
images of the window. The short window has two micro-batches.
- *Unequal micro-batches*: the weight of an image that is alone in the last micro-batch, relative \
to one among four. *Unequal tokens*: the same for a token where the others are padding.
- *Logged loss*: relative to the mean over the images of the epoch.
- *Not its job*: the user's own code does it.
- accelerate closes the last window of an epoch only if the DataLoader went through `prepare`. \
Otherwise it carries the rest over into the next epoch without a warning.
- transformers' Trainer does not divide if the model's `forward` takes `**kwargs`: it expects the \
model to divide by `num_items_in_batch`. A model that does not, such as \
`ResNetForImageClassification`, gets the gradient and logs the loss times the accumulation steps. \
Otherwise the Trainer logs a mean over micro-batches or, with `num_items_in_batch`, over updates; \
pytorch-ignite's `Average` is a mean over micro-batches.
- Keras counts its schedule in micro-batches, so a schedule made for updates ends too early.
- fastai counts images, so a smaller last micro-batch also leaves a window open. Its schedule is a \
function of the fraction of training done, so asking it at each micro-batch does no harm. It logs \
a smoothed loss.
- poutyne clips after each micro-batch, before it divides by the number of images. \
pytorch-accelerated clips after each micro-batch, by value. poutyne's schedules step once per \
epoch by design.
- torchtnt and pytorch-accelerated report the loss after its division by the accumulation steps.
- composer asks for a torch below 2.7.1, so it needs an environment of its own; there it is told \
to weight micro-batches by tokens (`accumulate_train_batch_on_tokens`)."""


def libraries_notes(folder: Path = FOLDER) -> str:
    """What the table's columns mean, its footnotes, and what could not be run, as Markdown."""
    _, versions = _read(folder)
    failed = versions[versions["not_run"] != ""]
    not_run = [f"- Not run: {name}, because {row['not_run']}." for name, row in failed.iterrows()]
    numbers = ", ".join(sorted({number for number in versions["torch"] if number}))
    return "\n".join([NOTES, *not_run, f"- Versions of torch: {numbers}."])
