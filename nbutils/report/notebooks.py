"""What each notebook says of itself at its top: the way to the others, and how long it takes."""

import tempfile
import time
from pathlib import Path

import nbformat
import pandas as pd

from nbutils.paths import NOTEBOOKS, REFERENCE
from nbutils.studies.notebook import execute_notebook

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
RUN_TIMES = REFERENCE / "run-times.csv"
"""Seconds of *Run All* for each notebook, with default parameters and one thread."""


def measure_run_times() -> None:
    """Time all notebooks, on a quiet machine, and write the times at their tops."""
    seconds = {}
    with tempfile.TemporaryDirectory() as scratch:
        for path in PATHS:
            start = time.perf_counter()
            execute_notebook(path.stem, Path(scratch, "out.ipynb"), {}, threads=1)
            seconds[path.stem] = round(time.perf_counter() - start)
            print(path.stem, seconds[path.stem], flush=True)
    pd.Series(seconds, name="seconds").to_csv(RUN_TIMES, index_label="notebook")
    for path in PATHS:
        notebook = nbformat.read(path, as_version=4)
        lines = notebook.cells[0].source.split("\n")
        lines[2] = navigation(path)
        notebook.cells[0].source = "\n".join(lines)
        nbformat.write(notebook, path)


def navigation(path: Path) -> str:
    """The third line of a notebook: links to its neighbours, and how long it takes."""
    place = PATHS.index(path)
    parts = [f"[Overview]({PATHS[0].name})"] if place else []
    parts += [f"previous: {_link(each)}" for each in PATHS[1:place][-1:]]
    parts += [f"next: {_link(each)}" for each in PATHS[place + 1 :][:1]]
    seconds = pd.read_csv(RUN_TIMES, index_col="notebook")["seconds"][path.stem]
    line = " · ".join([*parts, f"*Run All* takes about {seconds} s"])
    return line[0].upper() + line[1:]


def notebooks_table() -> pd.DataFrame:
    """One row per notebook, with its question, as its first cell asks it."""
    rows = {}
    for path in PATHS:
        question = _first_cell(path).partition("**Question.** ")[2].partition("\n")[0]
        rows[f"[{path.stem}](notebooks/{path.name})"] = question
    return pd.DataFrame({"question": rows}).rename_axis("notebook")


def _link(path: Path) -> str:
    title = _first_cell(path).partition("\n")[0].removeprefix("# ")
    return f"[{title}]({path.name})"


def _first_cell(path: Path) -> str:
    return nbformat.read(path, as_version=4).cells[0].source


if __name__ == "__main__":
    measure_run_times()
