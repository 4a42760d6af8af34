"""The README and the figures, made from `notebooks/reference/`: `python -m nbutils figures`.

The text of the README is the template `README.md.jinja` beside this file; every number and table in
it is a variable that is computed here.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import jinja2
import pandas as pd

from nbutils.advise.advice import load_advice
from nbutils.analysis.claims import (
    CONFIRMING,
    confirmation_table,
    fitted_change,
    load_kaggle_runs,
    split_seeds,
)
from nbutils.analysis.effects import Answers, lead, load_answers, prediction_differences
from nbutils.analysis.outcomes import last_epochs
from nbutils.analysis.pick import Pick, pick, quiet_seconds
from nbutils.analysis.summary import describe_study, format_table, markdown_table, summary_table
from nbutils.analysis.verdicts import all_verdicts, size_verdicts, verdict_table
from nbutils.paths import FIGURES, NOTEBOOKS, REFERENCE, ROOT, write_atomically
from nbutils.report import bench
from nbutils.report.libraries import libraries_notes, libraries_table
from nbutils.studies.notebook import execute_notebook
from nbutils.studies.reference import load_tables

TEMPLATE = Path(__file__).with_name("README.md.jinja")
FIGURE_NOTEBOOKS = (
    "01_data_and_model",
    "04_summary",
    "07_normalisation",
    "08_learning_rate",
    "09_noise_scale",
    "10_cost",
)
OTHER_DATASET = "fashion-mnist"
"""The reference study that repeats `batch-size` on another dataset."""

QUIET = REFERENCE / "bench" / "cpu-2-cores.json"
"""Times on a machine that did nothing else."""


def make_figures() -> list[Path]:
    """Execute the notebooks that draw the figures, and write the README.

    Returns:
        The files written.
    """
    other = {"runs": str(REFERENCE / OTHER_DATASET), "figures": str(FIGURES / OTHER_DATASET)}
    jobs = [(name, {"figures": str(FIGURES)}) for name in FIGURE_NOTEBOOKS]
    with tempfile.TemporaryDirectory() as scratch:
        for notebook, parameters in [*jobs, ("04_summary", other)]:
            print(f"drawing the figures of {notebook}", flush=True)
            execute_notebook(notebook, Path(scratch) / "out.ipynb", parameters)
    write_atomically(ROOT / "README.md", render().encode())
    return [*sorted(path for path in FIGURES.rglob("*") if path.is_file()), ROOT / "README.md"]


def render() -> str:
    """The text of the README.

    Raises:
        jinja2.UndefinedError: The template names a variable that is not computed here.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(_variables())


def _variables() -> dict[str, str]:
    answers = load_answers(REFERENCE / "batch-size")
    other = load_answers(REFERENCE / OTHER_DATASET)
    seconds = quiet_seconds(QUIET)
    choice = pick(answers.runs, seconds)
    verdicts = all_verdicts(
        answers,
        load_answers(REFERENCE / "normalisation"),
        load_kaggle_runs(),
        load_tables(REFERENCE / "cost")["cost"],
    )
    return {
        "answer": _answer(answers, choice, seconds),
        "study": f"{describe_study(answers.runs)} {_made_by(answers.runs)}",
        "table": markdown_table(format_table(summary_table(answers, seconds))),
        "pick": str(choice),
        "claims": markdown_table(verdict_table(verdicts)),
        "confirmation": _confirmation(answers),
        "other": f"{describe_study(other.runs)}\n\n"
        + markdown_table(verdict_table(size_verdicts(other))),
        "agreement": _agreement(answers),
        "libraries": f"{markdown_table(libraries_table())}\n\n{libraries_notes()}",
        "advice": _advice(),
        "notebooks": markdown_table(notebooks_table()),
        "bench": _bench(),
    }


def _answer(answers: Answers, choice: Pick, seconds: dict[str, float]) -> str:
    """What the study says, in three lines; the last one says what to do."""
    judged = list(split_seeds(answers, CONFIRMING).values())[-1]
    rises, *_ = size_verdicts(answers, CONFIRMING)
    change, gap = fitted_change(judged), lead(judged, "8 x 128", "1024")
    larger = {
        "holds": "Larger batches are more accurate.",
        "fails": "A larger batch is not more accurate.",
    }.get(rises.verdict.split(":")[0], "Whether larger batches are more accurate stays open.")
    slower = seconds["8 x 128"] / seconds["1024"] - 1
    costs = f"is {slower:.0%} slower" if slower > 0 else f"is even {-slower:.0%} faster"
    *first, final = choice.settings or ["no setting"]
    named = f"{', '.join(first)} or {final}" if first else final
    epochs = answers.runs["epoch"].max()
    return (
        f"- **Batch size, all else equal:** from 32 to 1024 images the test accuracy after "
        f"{epochs} epochs changes by {change.bound} (95 % interval, n = {change.seeds} seeds). "
        f"{larger}\n"
        f"- **Accumulation is exact:** 8 x 128 makes the update of one batch of 1024. After "
        f"{epochs} epochs their test accuracies differ by {gap.bound} (n = {gap.seeds}).\n"
        f"- **What to do: take {named}.** They reach full accuracy in the least time. Accumulate "
        f"only when the batch that you want does not fit the memory; on this CPU 8 x 128 {costs} "
        f"than 1024 in one pass."
    )


def _made_by(runs: pd.DataFrame) -> str:
    """The command that makes these runs, and how long they trained."""
    seeds = ",".join(map(str, sorted(runs["seed"].unique())))
    hours = last_epochs(runs)["seconds"].sum() / 3600
    return (
        f"`python -m nbutils run batch-size --dataset {runs['dataset'].iloc[0]} --set seed={seeds} "
        f"--jobs 2` makes them; their training took {hours:.1f} hours in all."
    )


def _confirmation(answers: Answers) -> str:
    """The confirming seeds beside the earlier ones, or that there are none yet."""
    table = confirmation_table(answers)
    if len(table.columns) < 2:
        return "The rules were fixed after these seeds were known, and not yet tried on new ones."
    return (
        "The rules were fixed after the earlier seeds were known. So the claims are judged by the "
        f"later seeds alone:\n\n{markdown_table(table)}"
    )


def _agreement(answers: Answers) -> str:
    """On how many test images the large batch and its accumulated twin predict differently."""
    judged = list(split_seeds(answers, CONFIRMING).values())[-1]
    counts = prediction_differences(judged, [("1024", "8 x 128"), ("1024", "1024")])
    shown = "; ".join(
        f"{row.compared}: {row.mean:.0f} (from {row.fewest} to {row.most}, {row.pairs} pairs)"
        for row in counts.itertuples(index=False)
    )
    return (
        f"In float32, rounding grows over the updates. Of {len(judged.labels):,} test images the "
        f"networks predict this many differently at the end: {shown}."
    )


def _advice() -> str:
    """The recorded advice for this project's own network; nothing where none is recorded."""
    path = REFERENCE / "advice" / "mnist-5k.json"
    return f"```\n{load_advice(path).answer}\n```" if path.exists() else ""


def notebooks_table() -> pd.DataFrame:
    """One row per notebook, with its question, as its first cell asks it."""
    rows = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found = re.search(r"\*\*Question\.\*\* (.*)", "".join(cells[0]["source"]))
        rows[f"[{path.stem}](notebooks/{path.name})"] = found[1] if found else ""
    return pd.DataFrame({"question": rows}).rename_axis("notebook")


def _bench() -> str:
    """A table for each machine on which `python -m nbutils bench` was recorded."""
    parts = []
    for path in sorted((REFERENCE / "bench").glob("*.json")):
        rows = bench.load(path)
        parts.append(
            f"{rows[0].device}; medians of {rows[0].repeats} pairs of epochs of "
            f"{rows[0].images:,} images, scaled to a whole epoch, with the lowest and the "
            f"highest:\n\n{markdown_table(bench.table(rows))}"
        )
    return "\n\n".join(parts)
