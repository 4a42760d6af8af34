"""The README and the figures, made from `notebooks/reference/`: `python -m nbutils figures`.

The text of the README is `README.md.jinja` beside this file; its numbers come from the records.
"""

import json
import tempfile
from pathlib import Path

import jinja2

from nbutils.advise.advice import load_advice
from nbutils.analysis.claims import CONFIRMING, fitted_change, load_kaggle_runs, split_seeds
from nbutils.analysis.effects import lead, load_answers, prediction_differences
from nbutils.analysis.pick import pick, quiet_seconds
from nbutils.analysis.summary import describe_study, format_table, markdown_table, summary_table
from nbutils.analysis.verdicts import all_verdicts, size_verdicts, verdict_table
from nbutils.paths import FIGURES, REFERENCE, ROOT, write_atomically
from nbutils.report.libraries import libraries_table
from nbutils.report.notebooks import PATHS, notebooks_table
from nbutils.studies.notebook import declared_parameters, execute_notebook
from nbutils.studies.reference import load_tables

TEMPLATE = Path(__file__).with_name("README.md.jinja")
OTHER_DATASET = "fashion-mnist"
"""The reference study that repeats `batch-size` on another dataset."""

QUIET = REFERENCE / "bench" / "cpu-2-cores.json"
"""Times on a machine that did nothing else."""


def make_figures() -> list[Path]:
    """Execute the notebooks that draw the figures, and write the README; the files written."""
    names = [path.stem for path in PATHS if "figures" in declared_parameters(path.stem)]
    jobs = [(name, {"figures": str(FIGURES)}) for name in names]
    other = {"runs": str(REFERENCE / OTHER_DATASET), "figures": str(FIGURES / OTHER_DATASET)}
    with tempfile.TemporaryDirectory() as scratch:
        for notebook, parameters in [*jobs, ("04_summary", other)]:
            print(f"drawing the figures of {notebook}", flush=True)
            execute_notebook(notebook, Path(scratch) / "out.ipynb", parameters)
    write_atomically(ROOT / "README.md", render().encode())
    return [*sorted(path for path in FIGURES.rglob("*") if path.is_file()), ROOT / "README.md"]


def render() -> str:
    """The text of the README."""
    answers, seconds = load_answers(REFERENCE / "batch-size"), quiet_seconds(QUIET)
    other = load_answers(REFERENCE / OTHER_DATASET)
    normalisation = load_answers(REFERENCE / "normalisation")
    cost = load_tables(REFERENCE / "cost")["cost"]
    parts = split_seeds(answers, CONFIRMING)
    judged = list(parts.values())[-1]
    benches = sorted((REFERENCE / "bench").glob("*.json"))
    values = {
        "answers": answers,
        "seeds": list(parts),
        "change": fitted_change(judged),
        "other_change": fitted_change(other),
        "gap": lead(judged, "8 x 128", "1024"),
        "earlier": fitted_change(next(iter(parts.values()))),
        "slower": seconds["8 x 128"] / seconds["1024"] - 1,
        "choice": pick(answers.runs, seconds),
        "study": describe_study(answers.runs),
        "summary": format_table(summary_table(answers, seconds)),
        "claims": all_verdicts(answers, normalisation, load_kaggle_runs(), cost),
        "other": other,
        "other_claims": size_verdicts(other),
        "differences": prediction_differences(judged, [("1024", "8 x 128"), ("1024", "1024")]),
        "libraries": libraries_table(),
        "advice": load_advice(REFERENCE / "advice" / "mnist-5k.json").answer,
        "notebooks": notebooks_table(),
        "benches": [json.loads(path.read_text(encoding="utf-8")) for path in benches],
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"markdown": markdown_table, "verdicts": verdict_table}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values)
