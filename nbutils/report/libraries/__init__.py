"""What known libraries do when they accumulate gradients, found by running them.

The record of it is formatted for notebook 06 and the README.
"""

import contextlib
import os
import tempfile
import warnings
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import torch

from nbutils.errors import InputError
from nbutils.measure.process import OutOfMemory, in_own_process
from nbutils.paths import REFERENCE
from nbutils.report.libraries.measure import LIBRARIES, PROBES, observe, package_of

FOLDER = REFERENCE / "libraries"
NOTES = Path(__file__).parents[1] / "libraries_notes.md.jinja"


def observe_all(folder: Path = FOLDER) -> Path:
    """Run the installed libraries, each package in a process of its own, and write the record.

    The record is `libraries.csv`, whose path is returned, and `versions.csv`. A library that fails
    is recorded with the reason; one that is not installed here keeps the rows recorded elsewhere.
    """
    packages = {package_of(name): _version(package_of(name)) for name in LIBRARIES}
    if not any(packages.values()):
        raise InputError("none of the libraries is installed: pip install -e '.[peers]'")
    old_rows, old_versions = _read(folder)
    earlier = old_versions.to_dict("index")
    rows: list[Any] = []
    versions = []
    for package, number in packages.items():
        one: dict[Any, Any] = earlier.get(package, {"not_run": "it is not installed"})
        if number is None:
            rows += old_rows[old_rows["library"].map(package_of) == package].to_dict("records")
        else:
            one = {"version": number, "torch": torch.__version__.partition("+")[0]}
            try:
                rows += in_own_process(partial(_observe, package))
            except (InputError, OutOfMemory) as error:
                one = {"version": number, "not_run": str(error)}
        versions.append({"package": package, **one})
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["package", "version", "torch", "not_run"]
    pd.DataFrame(versions, columns=columns).to_csv(folder / "versions.csv", index=False)
    pd.DataFrame(rows).to_csv(folder / "libraries.csv", index=False)
    return folder / "libraries.csv"


def _version(package: str) -> str | None:
    """The installed version; "" for this project, None where there is none."""
    try:
        return version(package) if package else ""
    except PackageNotFoundError:
        return None


def _observe(package: str) -> list[dict[str, object]]:
    """The rows of what needs a package; called in a process of its own."""
    os.environ.update(KERAS_BACKEND="torch", HF_HUB_OFFLINE="1")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = [name for name in LIBRARIES if package_of(name) == package]
    with (
        tempfile.TemporaryDirectory() as folder,  # libraries leave logs in the working folder
        contextlib.chdir(folder),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        return [row for name in names for row in observe(name)]


def _read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The record: its rows, and the versions by package."""
    if not (folder / "versions.csv").exists():
        return pd.DataFrame(columns=["library"]), pd.DataFrame()
    versions = pd.read_csv(folder / "versions.csv", dtype=str).fillna("").set_index("package")
    return pd.read_csv(folder / "libraries.csv"), versions


def libraries_table(folder: Path = FOLDER) -> pd.DataFrame:
    """The record as people read it: one row per library, a tick or the error in each cell."""
    rows, versions = _read(folder)
    table = rows.assign(cell=rows.apply(_cell, axis=1)).pivot_table(
        index="library", columns="probe", values="cell", aggfunc="first", sort=False
    )

    def with_version(name: str) -> str:  # such as "accelerate 1.15.0, loader not prepared"
        package, comma, variant = name.partition(",")
        return f"{package} {versions['version'][package_of(name)]}".strip() + comma + variant

    return table[list(PROBES)].rename(index=with_version).rename_axis(columns=None)


def _cell(row: pd.Series) -> str:
    if row["verdict"] == "right":
        return "✓"
    words = "not its job", "not offered", "carried over", "dropped"
    in_words = row["probe"] in ("clipping", "schedule") or row["verdict"] in words
    return row["verdict"] if in_words else f"{row['measured']:.3g}"


def libraries_notes(folder: Path = FOLDER) -> str:
    """What the table's columns mean, its footnotes, and what could not be run, as Markdown."""
    _, versions = _read(folder)
    return jinja2.Template(NOTES.read_text(encoding="utf-8")).render(
        not_run=versions["not_run"][versions["not_run"] != ""],
        torch=", ".join(sorted(set(versions["torch"]) - {""})),
    )
