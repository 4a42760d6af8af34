"""A study summed up: the table of its settings, and the words around it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress

import pandas as pd

from nbutils.analysis.effects import Answers, Effect, lead, written_gaps
from nbutils.analysis.intervals import mean_interval
from nbutils.analysis.outcomes import name_settings, outcomes
from nbutils.errors import InputError

BASELINE = "128"  # the blog post's: others are compared with it where a study has it


def summary_table(answers: Answers, seconds: Mapping[str, float] | None = None) -> pd.DataFrame:
    """One row per setting: its outcome, and how that differs from the baseline's.

    `seeds`; `accuracy`, the mean over them of `metric` ("validation_accuracy" where test labels
    are unknown); its `difference` from the setting `baseline` ("128", else the first), paired by
    seed, with `low`, `high` and `detectable` of an `Effect`, all missing where no seed has both;
    `updates` and `seconds` per epoch: those given, as measured on a quiet machine, else those of
    the fastest seed, since other work on the machine only adds to them.
    """
    table = answers.outcomes
    per_epoch = table[["seconds", "updates"]].div(table["epoch"], axis=0)
    by_setting = table.assign(**per_epoch).groupby("setting", sort=False)
    metric = "test_accuracy" if table["test_accuracy"].notna().all() else "validation_accuracy"
    rows = by_setting.agg(
        seeds=("seed", "size"),
        accuracy=(metric, "mean"),
        seconds=("seconds", "min"),
        updates=("updates", "first"),
    )
    baseline = BASELINE if BASELINE in rows.index else str(rows.index[0])
    if seconds is not None:
        rows["seconds"] = rows.index.map(seconds)
    columns = ["difference", "low", "high", "detectable"]
    rows[columns] = math.nan
    for setting in rows.index.drop(baseline):
        with suppress(InputError):  # no seed in common
            gap = lead(answers, setting, baseline, metric)
            rows.loc[setting, columns] = gap.mean, gap.low, gap.high, gap.detectable
    return rows.assign(metric=metric, baseline=baseline, updates=rows["updates"].astype(int))


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

    One row per normalisation and accumulated setting, one column per metric: mean paired
    differences with Student's 95 % interval, accuracies in points.
    """
    final = name_settings(outcomes(runs.assign(norm=runs["norm"].astype(str))))
    final["setting"] = final["setting"].str.partition(",")[0]
    whole = final[final["accumulation_steps"] == 1]
    cut = final[final["accumulation_steps"] > 1]
    pairs = cut.merge(whole, on=["norm", "seed"], suffixes=("", "_whole"), validate="m:1")

    def text(values: pd.Series) -> str:
        low, high = mean_interval(values.tolist())
        if str(values.name).endswith("accuracy"):
            return str(Effect(values.mean(), low, high, len(values))).replace(" points", "")
        interval = f"{low:+.4f} to {high:+.4f}, n = {len(values)}"
        return f"{values.mean():+.4f} ({interval if len(values) > 1 else 'n = 1: no interval'})"

    for metric in metrics:
        pairs[metric] -= pairs[f"{metric}_whole"]
    table = pairs.groupby(["norm", "setting"], sort=False)[metrics].agg(text)
    heads = {name: f"{name.replace('_', ' ')}, points" for name in metrics if "accuracy" in name}
    return table.rename(columns=heads | {"train_loss": "training loss"})
