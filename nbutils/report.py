"""What the README shows, made from `notebooks/reference/`: its figures and its numbers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from nbutils.config import InputError
from nbutils.records import REFERENCE_FOLDER, load_runs
from nbutils.study import execute_notebook
from nbutils.summary import describe_study, format_table, pick, summary_table

ROOT = REFERENCE_FOLDER.parents[1]
README = ROOT / "README.md"
FIGURES = ROOT / "figures"
FIGURE_NOTEBOOKS = ("01_data_and_model", "04_summary", "07_normalisation")


def make_figures() -> list[Path]:
    """Execute the notebooks that draw the figures, and renew the README's numbers.

    Returns:
        The files written.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        for notebook in FIGURE_NOTEBOOKS:
            execute_notebook(notebook, Path(scratch) / "out.ipynb", {"figures": str(FIGURES)})
    README.write_text(renew_blocks(README.read_text()))
    return [*sorted(FIGURES.iterdir()), README]


def renew_blocks(text: str) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- /NAME -->` made anew.

    Raises:
        InputError: The text lacks a block, or has one twice.
    """
    for name, block in _blocks().items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise InputError(f"README.md must have each of {start.strip()} and {end} once")
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}{block}\n{end}{after}"
    return text


def _blocks() -> dict[str, str]:
    runs = load_runs(REFERENCE_FOLDER / "batch-size")
    table = summary_table(runs)
    return {
        "study": describe_study(runs),
        "table": _markdown(format_table(table)),
        "pick": str(pick(runs)).replace("\n", " "),
    }


def _markdown(table: pd.DataFrame) -> str:
    """A Markdown table, its index first, numbers to the right."""
    header = [table.index.name or "", *table.columns]
    rows = [[str(cell) for cell in row] for row in table.reset_index().to_numpy()]
    rule = ["---", *["---:"] * len(table.columns)]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, rule, *rows])
