"""Updates and images to reach a target at each batch size, and the critical batch size.

With S updates and E = S B images to reach a target at B images per update, McCandlish et al.
(2018), "An Empirical Model of Large-Batch Training", section 2.3, expect

    (S / S_min - 1) (E / E_min - 1) = 1,  that is  E = E_min (1 + B / B_crit)

with the critical batch size B_crit = E_min / S_min, at which S = 2 S_min and E = 2 E_min. They
expect it to be near the noise scale.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy

from nbutils.analysis.intervals import student_quantile
from nbutils.analysis.outcomes import first_crossing
from nbutils.errors import InputError

SIZE = ["optimizer", "effective_batch_size"]
# Shallue et al. (2019), "Measuring the Effects of Data Parallelism on Neural Network Training"
REGIMES = ("perfect scaling", "diminishing returns", "maximal data parallelism")
SAVED = (0.8, 0.2)  # shares of the ideal saving that separate the regimes: our choice


def updates_to_target(runs: pd.DataFrame, target: float) -> pd.DataFrame:
    """`epochs` (by `first_crossing`), `updates` and `images` to a validation accuracy, or NaN.

    One row per run, with `optimizer`, `effective_batch_size`, `learning_rate` and `seed`.
    InputError for a target not in (0, 1).
    """
    if not 0 < target < 1:
        raise InputError(f"target = {target}, but it must be in (0, 1)")
    keys = [*SIZE, "learning_rate", "seed"]
    by_run = runs.sort_values("epoch").groupby("run_id")
    first, accuracies = by_run.first(), by_run["validation_accuracy"]
    table = first[keys]
    table["epochs"] = accuracies.agg(lambda curve: first_crossing(1 - curve.array, 1 - target))
    table["updates"] = table["epochs"] * first["updates"]
    table["images"] = table["epochs"] * first["images_per_epoch"]
    return table.sort_values(keys, ignore_index=True)


def fastest_rates(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `updates_to_target` at each size's fastest rate at which all seeds arrived."""
    rate = [*SIZE, "learning_rate"]
    means = table.groupby(rate)["updates"].mean(skipna=False).dropna()
    best = means.sort_values().reset_index().drop_duplicates(SIZE)
    return table.merge(best[rate], on=rate)


class CriticalBatch(NamedTuple):
    """The critical batch size in images per update, its 95 % interval, `E_min` and `S_min`."""

    value: float
    low: float
    high: float
    fewest_images: float
    fewest_updates: float


def fit_critical_batch(fastest: pd.DataFrame) -> CriticalBatch:
    """Fit `E = E_min (1 + B / B_crit)` to the rows of `fastest_rates` of one optimizer.

    Runs that reached the target in their first epoch are left out, since how soon is unknown.
    Least squares on log E, as runs differ by factors; Student's interval on log B_crit. It covers
    neither the choice of the rates nor errors that all sizes share. InputError below three sizes.
    """
    known = fastest[fastest["epochs"] > 1]
    distinct = known["effective_batch_size"].nunique()
    if distinct < 3:
        raise InputError(
            f"the target was reached after the first epoch at {distinct} batch sizes, but the fit "
            f"needs 3; choose another target"
        )

    def log_images(batch_size: np.ndarray, log_fewest: float, log_critical: float) -> np.ndarray:
        return log_fewest + np.log1p(batch_size / np.exp(log_critical))

    sizes, images = known[["effective_batch_size", "images"]].to_numpy(float).T
    start = math.log(images.min()), np.log(sizes).mean()
    # Outside these bounds the curve is a straight line, whatever the critical size.
    bounds = [-np.inf, math.log(sizes.min() / 100)], [np.inf, math.log(sizes.max() * 100)]
    (log_fewest, log_critical), covariance = scipy.optimize.curve_fit(
        log_images, sizes, np.log(images), start, bounds=bounds
    )
    half = student_quantile(len(sizes) - 2) * math.sqrt(covariance[1, 1])
    highest = min(log_critical + half, 700.0)  # the largest power that a float holds
    logs = log_critical, log_critical - half, highest, log_fewest, log_fewest - log_critical
    return CriticalBatch(*np.exp(logs))


def regime_borders(critical: float) -> tuple[float, float]:
    """The batch sizes between the three `REGIMES`: S falls as `B^-p`, and p is one of `SAVED`.

    By the fit `p = 1 / (1 + B / B_crit)`; ideal is 1.
    """
    return critical * (1 / SAVED[0] - 1), critical * (1 / SAVED[1] - 1)


def agreement(noise: pd.DataFrame, target: float, fits: dict[str, CriticalBatch]) -> pd.DataFrame:
    """The noise scale up to the first measurement at the target, beside the critical batch size.

    One row per `optimizer`: `measurements`, their `lowest`, `median` and `highest`; the `fitted`
    size with its interval, `low` and `high`; `ratio`, median to fitted; and `agree`, whether
    interval and range overlap.
    """
    runs = noise.sort_values("update")
    reached = runs["validation_accuracy"] >= target
    before = reached.groupby([runs["optimizer"], runs["seed"]]).cumsum() > reached
    values = runs[~before].groupby("optimizer")["value"]
    table = values.agg(measurements="count", lowest="min", median="median", highest="max")
    fitted = {optimizer: fit[:3] for optimizer, fit in fits.items()}
    table = table.join(pd.DataFrame(fitted, ["fitted", "low", "high"]).T, how="inner")
    table["ratio"] = table["median"] / table["fitted"]
    table["agree"] = (table["lowest"] <= table["high"]) & (table["low"] <= table["highest"])
    return table.rename_axis("optimizer").reset_index()


def describe_agreement(table: pd.DataFrame) -> str:
    """One Markdown line per optimizer of the table of `agreement`."""
    no_overlap = "do not overlap: they do not agree"
    found = np.where(table["agree"], "overlap: they are compatible", no_overlap)
    return "\n".join(
        f"- **{row.optimizer}**: the noise scale is {row.median:.0f} images (median of "
        f"{row.measurements} measurements, {row.lowest:.0f} to {row.highest:.0f}), the fitted "
        f"critical batch size {row.fitted:.0f} ({row.low:.0f} to {row.high:.0f}). Range and "
        f"interval {overlap}. The median is {row.ratio:.2g} times the fitted size."
        for row, overlap in zip(table.itertuples(), found, strict=True)
    )


def target_table(
    fastest: dict[str, pd.DataFrame], fits: dict[str, CriticalBatch], sizes: Sequence[int]
) -> pd.DataFrame:
    """For reading: rate, mean updates and images to the target, those of the fit, and the regime.

    One row per optimizer and size. "At most" means that a run arrived in its first epoch.
    """
    tables = {}
    for optimizer, fit in fits.items():
        runs = fastest[optimizer].groupby("effective_batch_size")
        at_most = (runs["epochs"].min() <= 1).map({True: "at most ", False: ""})
        table = pd.DataFrame(index=pd.Index(sizes, name="images per update"))
        table["learning rate"] = runs["learning_rate"].first().map("{:g}".format)
        for count in ("updates", "images"):
            table[count] = at_most + runs[count].mean().map("{:,.0f}".format)
        table = table.astype(object).fillna({"learning rate": "none"}).fillna("not reached")
        images = pd.Series(fit.fewest_images * (1 + table.index / fit.value), table.index)
        table["updates, fit"] = (images / table.index).map("{:,.0f}".format)
        table["images, fit"] = images.map("{:,.0f}".format)
        regimes = np.searchsorted(regime_borders(fit.value), sizes)
        tables[optimizer] = table.assign(regime=np.take(REGIMES, regimes))
    return pd.concat(tables, names=["optimizer"])
