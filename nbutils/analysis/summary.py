"""A study summed up: the table of its settings, and the words around it."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from nbutils.analysis.effects import Answers, Effect, lead, points
from nbutils.analysis.intervals import mean_interval
from nbutils.analysis.outcomes import name_settings, outcomes

BASELINE = "128"
"""The setting that others are compared with, where a study has it: the blog post's."""


def summary_table(answers: Answers, seconds: Mapping[str, float] | None = None) -> pd.DataFrame:
    """One row per setting: its outcome, and how that differs from the baseline's.

    Args:
        answers: The runs of a study.
        seconds: Seconds per epoch of each setting, measured on a quiet machine. Otherwise they are
            those of the fastest seed, since other work on the machine only adds to them.

    Returns:
        Indexed by `setting`, in the order of `name_settings`: `seeds`; `accuracy`, the mean over
        them of `metric`, which is "test_accuracy", or "validation_accuracy" where test labels are
        unknown; its `difference` from the setting `baseline` ("128", else the first), paired by
        seed, with its interval `low` and `high` and its minimum detectable effect `detectable`,
        all missing where no seed has both; `seconds` per epoch; `updates` per epoch.
    """
    table = answers.outcomes
    known = bool(table["test_accuracy"].notna().all())
    metric = "test_accuracy" if known else "validation_accuracy"
    settings = list(table["setting"].unique())
    baseline = BASELINE if BASELINE in settings else settings[0]
    seeds = answers.by_setting("run_id").notna()
    rows = []
    for setting in settings:
        of_setting = table[table["setting"] == setting]
        own = (of_setting["seconds"] / of_setting["epoch"]).min()
        row = {
            "setting": setting,
            "seeds": len(of_setting),
            "metric": metric,
            "accuracy": of_setting[metric].mean(),
            "baseline": baseline,
            "seconds": own if seconds is None else seconds.get(setting, float("nan")),
            "updates": int((of_setting["updates"] / of_setting["epoch"]).iloc[0]),
        }
        if setting != baseline and (seeds[setting] & seeds[baseline]).any():
            gap = lead(answers, setting, baseline, metric)
            row |= {"difference": gap.mean, "low": gap.low, "high": gap.high}
            row |= {"detectable": gap.detectable, "paired": gap.seeds}
        rows.append(row)
    columns = ["seeds", "metric", "accuracy", "baseline", "difference", "low", "high"]
    columns += ["detectable", "paired", "seconds", "updates"]
    return pd.DataFrame(rows).set_index("setting").reindex(columns=columns)


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `summary_table` for reading: percentages, points, units in the heads."""
    first = table.iloc[0]
    split = first["metric"].removesuffix("_accuracy")

    def difference(row: pd.Series) -> str:
        if row.name == first["baseline"]:
            return "baseline"
        if pd.isna(row["difference"]):
            return "no seed in common"
        if pd.isna(row["low"]):
            return f"{points(row['difference'])} (one seed)"
        return f"{points(row['difference'])} ({points(row['low'])} to {points(row['high'])})"

    return pd.DataFrame(
        {
            "seeds": table["seeds"],
            f"{split} accuracy": table["accuracy"].map("{:.2%}".format),
            f"less {first['baseline']}, points (95 %)": table.apply(difference, axis=1),
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
    first = runs.iloc[0]
    epochs = " or ".join(map(str, sorted(runs["epochs"].unique())))
    common = {
        "optimizer": "optimizer {}",
        "learning_rate": "learning rate {:g}",
        "norm": "norm {}",
        "dropout": "dropout {:g}",
    }
    seeds = runs["seed"].nunique()
    same = [t.format(first[name]) for name, t in common.items() if len(runs[name].unique()) == 1]
    settings = name_settings(runs)["setting"].nunique()

    def counted(number: int, thing: str) -> str:
        return f"{number} {thing}{'s' if number > 1 else ''}"

    return (
        f"**{counted(runs['run_id'].nunique(), 'run')}** on `{first['dataset']}`: "
        f"{counted(settings, 'setting')}, {counted(seeds, 'seed')}, {epochs} epochs; "
        f"{first['images_per_epoch']:,} images to train on, {first['validation_images']:,} to "
        f"validate, {first['test_images']:,} to test. The same in all: {', '.join(same)}."
    )


def compare_settings(runs: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """How outcomes change from one large batch to the same images in micro-batches.

    Pairs are runs with the same normalisation and seed, one without and one with accumulation.

    Args:
        runs: From `load_runs`; settings with equal effective batch size.
        metrics: Columns to compare.

    Returns:
        One row per normalisation and accumulated setting, one column per metric: the mean over
        seeds of the paired difference with Student's 95 % interval, as text; accuracies in points.
    """
    final = name_settings(outcomes(runs.assign(norm=runs["norm"].astype(str))))
    final["setting"] = final["setting"].str.partition(",")[0]
    whole = final[final["accumulation_steps"] == 1]
    cut = final[final["accumulation_steps"] > 1]
    pairs = cut.merge(whole, on=["norm", "seed"], suffixes=("", "_whole"), validate="m:1")
    for metric in metrics:
        pairs[metric] -= pairs[f"{metric}_whole"]

    def text(values: pd.Series) -> str:
        found = Effect(values.mean(), *mean_interval(values.tolist()), len(values))
        if str(values.name).endswith("accuracy"):
            return str(found).replace(" points", "")
        interval = f"{found.low:+.4f} to {found.high:+.4f}, n = {found.seeds}"
        return f"{found.mean:+.4f} ({interval if found.seeds > 1 else 'n = 1: no interval'})"

    table = pairs.groupby(["norm", "setting"], sort=False)[metrics].agg(text)
    heads = {name: f"{name.replace('_', ' ')}, points" for name in metrics if "accuracy" in name}
    return table.rename(columns=heads | {"train_loss": "training loss"})
