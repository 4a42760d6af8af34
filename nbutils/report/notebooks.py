"""What each notebook says of itself at its top: the way to the others, and how long it takes."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

import nbformat
import pandas as pd

from nbutils.paths import NOTEBOOKS, REFERENCE
from nbutils.studies.notebook import execute_notebook

RUN_TIMES = REFERENCE / "run-times.csv"
"""Seconds of *Run All* for each notebook, with default parameters and one thread."""


def measure_run_times() -> None:
    """Time all notebooks, on a quiet machine, and write the times at their tops."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for path in _paths():
            start = time.perf_counter()
            execute_notebook(path.stem, Path(scratch, "out.ipynb"), {}, threads=1)
            rows.append((path.stem, round(time.perf_counter() - start)))
            print(*rows[-1], flush=True)
    pd.DataFrame(rows, columns=["notebook", "seconds"]).to_csv(RUN_TIMES, index=False)
    write_navigation()


def write_navigation() -> None:
    """Write the third line of every notebook: links to its neighbours, and how long it takes."""
    for path in _paths():
        notebook = nbformat.read(path, as_version=4)
        lines = notebook.cells[0].source.split("\n")
        lines[2] = navigation(path)
        notebook.cells[0].source = "\n".join(lines)
        nbformat.write(notebook, path)


def navigation(path: Path) -> str:
    """The line of links and the time at the top of a notebook."""
    paths = _paths()
    place = paths.index(path)
    parts = [f"[Overview]({paths[0].name})"] if place else []
    parts += [f"previous: {_link(each)}" for each in paths[1:place][-1:]]
    parts += [f"next: {_link(each)}" for each in paths[place + 1 : place + 2]]
    seconds = pd.read_csv(RUN_TIMES, index_col="notebook")["seconds"][path.stem]
    parts += [f"*Run All* takes about {seconds} s"]
    line = " · ".join(parts)
    return line[0].upper() + line[1:]


def notebooks_table() -> pd.DataFrame:
    """One row per notebook, with its question, as its first cell asks it."""
    rows = {}
    for path in _paths():
        found = re.search(r"\*\*Question\.\*\* (.*)", _first_cell(path))
        rows[f"[{path.stem}](notebooks/{path.name})"] = found[1] if found else ""
    return pd.DataFrame({"question": rows}).rename_axis("notebook")


def _paths() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def _link(path: Path) -> str:
    title = _first_cell(path).partition("\n")[0].removeprefix("# ")
    return f"[{title}]({path.name})"


def _first_cell(path: Path) -> str:
    return nbformat.read(path, as_version=4).cells[0].source


if __name__ == "__main__":
    measure_run_times()
