"""A study summed up: the table of its settings, and the words around it."""

import math
from collections.abc import Mapping
from contextlib import suppress

import pandas as pd

from nbutils.analysis.effects import Answers, Effect, lead, points, written_gaps
from nbutils.analysis.outcomes import name_settings, outcomes
from nbutils.errors import InputError

BASELINE = "128"  # the blog post's: others are compared with it where a study has it


def summary_table(answers: Answers, seconds: Mapping[str, float] | None = None) -> pd.DataFrame:
    """One row per setting: its outcome, and how that differs from the baseline's.

    `seeds`; `accuracy`, the mean of `metric` ("validation_accuracy" where test labels are unknown);
    its `difference` from the setting `baseline` ("128", else the first), with `low`, `high` and
    `detectable` of an `Effect`, all missing where no seed has both; `updates` and `seconds` per
    epoch: those given, else of the fastest seed, since other work on the machine only adds to them.
    """
    table = answers.outcomes
    by_setting = table.groupby("setting", sort=False)
    metric = "test_accuracy" if table["test_accuracy"].notna().all() else "validation_accuracy"
    rows = pd.DataFrame({"seeds": by_setting.size(), "accuracy": by_setting[metric].mean()})
    fastest = (table["seconds"] / table["epoch"]).groupby(table["setting"]).min()
    rows["seconds"] = pd.Series(fastest if seconds is None else seconds, dtype=float)
    rows["updates"] = by_setting["updates"].first() // by_setting["epoch"].first()
    baseline = BASELINE if BASELINE in rows.index else str(rows.index[0])
    columns = ["difference", "low", "high", "detectable"]
    rows[columns] = math.nan
    for setting in rows.index.drop(baseline):
        with suppress(InputError):  # no seed in common
            gap = lead(answers, setting, baseline, metric)
            rows.loc[setting, columns] = gap.mean, gap.low, gap.high, gap.detectable
    return rows.assign(metric=metric, baseline=baseline)


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `summary_table` for reading: percentages, points, units in the heads."""
    baseline, metric = table.iloc[0][["baseline", "metric"]]
    return pd.DataFrame(
        {
            "seeds": table["seeds"],
            metric.replace("_", " "): table["accuracy"].map("{:.2%}".format),
            f"minus {baseline}, points (95 %)": written_gaps(table, baseline, "baseline"),
            "s/epoch": table["seconds"].map("{:.1f}".format).mask(table["seconds"].isna(), ""),
            "updates/epoch": table["updates"].map("{:,}".format),
        }
    )


def markdown_table(table: pd.DataFrame) -> str:
    """A Markdown table, its index first; columns of short cells to the right."""
    rows = [[str(cell) for cell in row] for row in table.reset_index().to_numpy()]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    rule = ["---", *("---" if width > 30 else "---:" for width in widths[1:])]
    header = [str(name or "") for name in (table.index.name, *table.columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def describe_study(runs: pd.DataFrame) -> str:
    """One Markdown paragraph: how many runs, on which images, with which common settings."""
    first, counted = runs.iloc[0], name_settings(runs)[["run_id", "setting", "seed"]].nunique()
    made, settings, seeds = (
        f"{number} {str(name).removesuffix('_id')}{'s' if number > 1 else ''}"
        for name, number in counted.items()
    )
    epochs = " or ".join(map(str, sorted(runs["epochs"].unique())))
    shown = ("optimizer", "learning_rate", "norm", "dropout")
    common = [name for name in shown if len(runs[name].unique()) == 1]
    same = [f"{name.replace('_', ' ')} {first[name]}".removesuffix(".0") for name in common]
    return (
        f"**{made}** on `{first['dataset']}`: {settings}, {seeds}, {epochs} epochs; "
        f"{first['images_per_epoch']:,} images to train on, {first['validation_images']:,} to "
        f"validate, {first['test_images']:,} to test. The same in all: {', '.join(same)}."
    )


def compare_settings(runs: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """How outcomes change from one large batch to the same images in micro-batches, as text.

    One row per normalisation and accumulated setting: differences with Student's interval.
    """
    final = name_settings(outcomes(runs))
    final["setting"] = final["setting"].str.partition(",")[0]
    whole, cut = final[final["accumulation_steps"] == 1], final[final["accumulation_steps"] > 1]
    pairs = cut.merge(whole, on=["norm", "seed"], suffixes=("", "_whole"), validate="m:1")
    for metric in metrics:
        pairs[metric] -= pairs[f"{metric}_whole"]

    def text(values: pd.Series) -> str:
        number = points if "accuracy" in str(values.name) else "{:+.4f}".format
        return Effect.of_seeds(values).written(number)

    table = pairs.groupby(["norm", "setting"], sort=False)[metrics].agg(text)
    heads = {name: f"{name.replace('_', ' ')}, points" for name in metrics if "accuracy" in name}
    return table.rename(columns=heads | {"train_loss": "training loss"})
