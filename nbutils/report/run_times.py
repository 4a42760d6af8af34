"""`make run-times`: how long *Run All* takes in each notebook, for the table of the overview.

Run it on a quiet machine. Each notebook is executed with its default parameters and one thread.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pandas as pd

from nbutils.paths import NOTEBOOKS, REFERENCE
from nbutils.studies.notebook import execute_notebook

TIMES = REFERENCE / "run-times.csv"
"""One row per notebook but the overview, which shows them: `notebook` and whole `seconds`."""


def measure_run_times(path: Path = TIMES) -> None:
    """Execute all notebooks and write the table."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in sorted(notebook.stem for notebook in NOTEBOOKS.glob("*.ipynb"))[1:]:
            start = time.perf_counter()
            execute_notebook(name, Path(scratch, "out.ipynb"), {}, threads=1)
            rows.append((name, round(time.perf_counter() - start)))
            print(*rows[-1], flush=True)
    pd.DataFrame(rows, columns=["notebook", "seconds"]).to_csv(path, index=False)


if __name__ == "__main__":
    measure_run_times()
