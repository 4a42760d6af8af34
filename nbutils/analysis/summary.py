"""A study summed up: names for its settings, the table of results, and the pick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nbutils.analysis.intervals import (
    crossed_interval,
    detectable_gain,
    gain_interval,
    mean_interval,
    proportion_interval,
)
from nbutils.training.config import RunConfig

TARGETS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
"""Validation accuracies whose first reaching is timed; see `target_accuracy`."""


def name_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs` with a column `setting`: what tells its runs apart, but for the seed.

    Batch size and accumulation steps always show ("128", or "8 x 128 = 1024"); other fields of
    `RunConfig` where they vary. Sorted by effective batch size, then by accumulation steps, then
    by the other fields, so that settings come in the order in which they are to be shown.
    """
    sizes = ["batch_size", "accumulation_steps"]
    varying = [
        name
        for name in RunConfig.field_names()
        if name not in [*sizes, "seed"] and _varies(runs[name])
    ]

    def setting(row: pd.Series) -> str:
        batch_size, steps = row["batch_size"], row["accumulation_steps"]
        name = f"{batch_size}" if steps == 1 else f"{steps} x {batch_size} = {batch_size * steps}"
        return ", ".join([name, *(f"{field} {row[field]}" for field in varying)])

    order = ["effective_batch_size", "accumulation_steps", *varying, "seed", "epoch"]
    named = runs.sort_values(order, ignore_index=True)
    return named.assign(setting=named.apply(setting, axis=1))


def last_epochs(runs: pd.DataFrame) -> pd.DataFrame:
    """The row of each run's last epoch."""
    return runs[runs["epoch"] == runs.groupby("run_id")["epoch"].transform("max")]


def target_accuracy(runs: pd.DataFrame) -> float:
    """The highest of `TARGETS` that more than half of the runs reached in some epoch."""
    best = runs.groupby("run_id")["validation_accuracy"].max()
    return max([t for t in TARGETS if (best >= t).mean() > 0.5], default=TARGETS[0])


def _varies(values: pd.Series) -> bool:
    return len(values.unique()) > 1


def summary_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a setting, in the order of `name_settings`.

    Args:
        runs: From `load_runs`.

    Returns:
        Indexed by `setting`: `seeds` (number of runs), means over them of the final
        `validation_accuracy` and `test_accuracy`, of `best_validation_accuracy` (highest of any
        epoch) and of `updates`; of the fastest seed, since other work on the machine only ever
        adds, `seconds` (of training), `seconds_to_target` (until validation accuracy first
        reached `target`, see `target_accuracy`; missing if a run never did) and
        `images_per_second`; and `validation_low`, `validation_high`, see `validation_interval`.
    """
    rows = []
    target = target_accuracy(runs)
    for setting, group in name_settings(runs).groupby("setting", sort=False):
        final = last_epochs(group)
        reached = group[group["validation_accuracy"] >= target]
        first = reached.groupby("run_id")["seconds"].min().reindex(final["run_id"])
        low, high = validation_interval(final)
        rows.append(
            {
                "setting": setting,
                "seeds": len(final),
                "validation_accuracy": final["validation_accuracy"].mean(),
                "validation_low": low,
                "validation_high": high,
                "best_validation_accuracy": group.groupby("run_id")["validation_accuracy"]
                .max()
                .mean(),
                "test_accuracy": final["test_accuracy"].mean(),
                "updates": final["updates"].mean(),
                "seconds": final["seconds"].min(),
                "target": target,
                "seconds_to_target": first.min(skipna=False),
                "images_per_second": final["images_per_second"].max(),
            }
        )
    return pd.DataFrame(rows).set_index("setting").astype({"updates": int})


def validation_interval(final: pd.DataFrame) -> tuple[float, float]:
    """95 % interval of a setting's validation accuracy, from the last epochs of its runs.

    Two things blur it: the validation images are a sample (Wilson's interval), and the seeds
    differ (Student's t, from two seeds on). The wider end of the two counts on either side.
    """
    accuracy = final["validation_accuracy"]
    images = int(final["validation_images"].iloc[0])
    ends = [proportion_interval(accuracy.mean(), images)]
    if len(accuracy) > 1:
        ends.append(mean_interval(accuracy.tolist()))
    return max(0.0, min(low for low, _ in ends)), min(1.0, max(high for _, high in ends))


TIE = 1.25
"""Times of training whose ratio is below this count as the same: one setting's own differ by as
much from run to run, on a machine that does other work."""


@dataclass(frozen=True)
class Pick:
    """The setting to take, and why.

    Attributes:
        setting: Its name.
        best: The setting of highest final validation accuracy.
        threshold: Lower end of the best setting's interval.
        costs: Seconds of training, of the fastest seed, until the epoch in which the validation
            accuracy, mean over seeds, first reached the threshold; for each setting that ended
            at or above it.
    """

    setting: str
    best: str
    threshold: float
    costs: dict[str, float]

    @property
    def ties(self) -> list[str]:
        """Other settings whose cost is not told apart from the pick's; see `TIE`."""
        near = TIE * self.costs[self.setting]
        return [name for name, cost in self.costs.items() if cost < near and name != self.setting]

    def __str__(self) -> str:
        costs = ", ".join(f"{name} ({seconds:.0f} s)" for name, seconds in self.costs.items())
        ties = f"; times within {TIE - 1:.0%} of it, so as good: {', '.join(self.ties)}"
        return (
            f"Pick: {self.setting}{ties if self.ties else ''}.\n"
            f"The best final validation accuracy is that of {self.best}. Within its noise, that "
            f"is at {self.threshold:.2%} or above, ended: {', '.join(self.costs)}.\n"
            f"Of these, {self.setting} got there with the least training: {costs}."
        )


def pick(runs: pd.DataFrame) -> Pick:
    """The smallest cost within the noise of the best validation accuracy.

    Args:
        runs: From `load_runs`.
    """
    table = summary_table(runs)
    best = str(table["validation_accuracy"].idxmax())
    threshold = float(table["validation_low"][best])
    by_epoch = name_settings(runs).groupby(["setting", "epoch"], sort=False)
    curves = by_epoch.agg({"validation_accuracy": "mean", "seconds": "min"})
    reached = curves[curves["validation_accuracy"] >= threshold].groupby("setting")["seconds"]
    ended = table.index[table["validation_accuracy"] >= threshold]
    costs = reached.min()[ended]
    return Pick(str(costs.idxmin()), best, threshold, {str(k): v for k, v in costs.items()})


def compare_predictions(
    runs: pd.DataFrame, labels: np.ndarray, predictions: Mapping[str, np.ndarray], baseline: str
) -> pd.DataFrame:
    """How many test images each setting gains over a baseline setting.

    Args:
        runs: From `load_runs`.
        labels: True classes of the test images, from `load_predictions`; none where unknown.
        predictions: Predicted classes by run id, from `load_predictions`.
        baseline: Name of a setting, as `name_settings` gives it.

    Returns:
        A row a setting but the baseline, if they have seeds in common and the labels are known:
        the number of `seeds`;
        means over them of `disagreements` (images that only one gets right), of `gained` (net, in
        images) and of `detectable` (see `detectable_gain`); and the 95 % interval of `gained`,
        `low` and `high`: `crossed_interval` from two seeds on, `gain_interval` for one.
    """
    columns = ["seeds", "disagreements", "gained", "low", "high", "detectable"]
    if len(labels) == 0:
        return pd.DataFrame(columns=columns, dtype=float).rename_axis("setting")
    ids = name_settings(runs).drop_duplicates("run_id").set_index(["setting", "seed"])["run_id"]
    right = {run_id: predictions[run_id] == labels for run_id in ids}
    rows = {}
    for setting in ids.index.unique("setting").drop(baseline):
        seeds = ids[setting].index.intersection(ids[baseline].index)
        if seeds.empty:
            continue
        pairs = [(right[ids[baseline, seed]], right[ids[setting, seed]]) for seed in seeds]
        won = [int((ours & ~theirs).sum()) for theirs, ours in pairs]
        lost = [int((theirs & ~ours).sum()) for theirs, ours in pairs]
        gains = [w - m for w, m in zip(won, lost, strict=True)]
        both = [w + m for w, m in zip(won, lost, strict=True)]
        if len(seeds) == 1:
            low, high = gain_interval(won[0], lost[0])
        else:
            ahead = np.stack([ours.astype(int) - theirs for theirs, ours in pairs])
            low, high = (len(labels) * end for end in crossed_interval(ahead))
        detectable = np.mean([detectable_gain(n) for n in both])
        rows[setting] = [len(seeds), np.mean(both), np.mean(gains), low, high, detectable]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("setting")


def compare_settings(runs: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Changes of the last epoch's metrics from one large batch to the same in pieces.

    Pairs are runs with the same normalisation and seed, one without and one with accumulation.

    Args:
        runs: From `load_runs`; settings with equal effective batch size.
        metrics: Columns to compare.

    Returns:
        A row a normalisation and accumulated setting, a column a metric: the mean over seeds of
        the paired difference, with Student's 95 % interval, as text.
    """
    final = last_epochs(runs)
    whole = final[final["accumulation_steps"] == 1]
    pieces = final[final["accumulation_steps"] > 1]
    pairs = pieces.merge(whole, on=["norm", "seed"], suffixes=("", "_whole"), validate="m:1")
    for metric in metrics:
        pairs[metric] -= pairs[f"{metric}_whole"]

    def text(values: pd.Series) -> str:
        low, high = mean_interval(values.tolist())
        form = "+.2%" if str(values.name).endswith("accuracy") else "+.4f"
        interval = f"{low:{form}} to {high:{form}}" if len(values) > 1 else "n = 1: no interval"
        return f"{values.mean():{form}} ({interval})"

    return pairs.groupby(["norm", "accumulation_steps", "batch_size"])[metrics].agg(text)


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
    same = [text.format(first[name]) for name, text in common.items() if not _varies(runs[name])]
    settings = name_settings(runs)["setting"].nunique()
    return (
        f"**{runs['run_id'].nunique()} runs** on `{first['dataset']}`: {settings} settings, "
        f"{seeds} seed{'s' if seeds > 1 else ''}, "
        f"{epochs} epochs; {first['images_per_epoch']:,} training images, "
        f"{first['validation_images']:,} to validate, {first['test_images']:,} to test. "
        f"Equal in all: {', '.join(same)}."
    )


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `summary_table` as people read it: percentages, rounded, with units."""

    def percent(values: pd.Series) -> pd.Series:
        return values.map("{:.2%}".format)

    def seconds(values: pd.Series) -> pd.Series:
        return values.map(lambda value: "not reached" if pd.isna(value) else f"{value:.0f}")

    return pd.DataFrame(
        {
            "seeds": table["seeds"],
            "validation": percent(table["validation_accuracy"]),
            "95 % interval": percent(table["validation_low"])
            + " to "
            + percent(table["validation_high"]),
            "best epoch": percent(table["best_validation_accuracy"]),
            "test": percent(table["test_accuracy"]).mask(table["test_accuracy"].isna(), "unknown"),
            "updates": table["updates"].map("{:,}".format),
            "training, s": seconds(table["seconds"]),
            f"to {table['target'].iloc[0]:.0%}, s": seconds(table["seconds_to_target"]),
            "images/s": table["images_per_second"].map("{:,.0f}".format),
        }
    )


def markdown_table(table: pd.DataFrame) -> str:
    """A Markdown table, its index first; columns of short cells to the right."""
    rows = [[str(cell) for cell in row] for row in table.reset_index().to_numpy()]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    rule = ["---", *("---" if width > 30 else "---:" for width in widths[1:])]
    header = [str(name or "") for name in (table.index.name, *table.columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])
