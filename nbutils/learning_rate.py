"""Batch size x learning rate: the map of a study's runs, its ridge, and the scaling rules."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nbutils.config import InputError
from nbutils.statistics import proportion_interval
from nbutils.summary import last_epochs

NOTHING_LEARNT = 0.2
"""Validation accuracy below which nothing was learnt: twice that of guessing among ten classes."""

RULES = {"linear": 1.0, "square root": 0.5}
"""Scaling rules: the power of the batch size to which the learning rate is proportional.

Sources: Goyal et al. (2017), "Accurate, Large Minibatch SGD", for SGD; Malladi et al. (2022), "On
the SDEs and Scaling Rules for Adaptive Gradient Algorithms", for Adam.
"""


def rate_map(runs: pd.DataFrame) -> pd.DataFrame:
    """Validation accuracy after the last epoch, over batch size and learning rate.

    Args:
        runs: From `load_runs`.

    Returns:
        A row an `optimizer`, `effective_batch_size` and `learning_rate`, in that order: `seeds`;
        `validation_accuracy`, the mean over them; `best`, whether it is the highest of its size;
        `within_noise`, whether it is no lower than the lower end of the 95 % interval (Wilson's,
        of a share of the validation images) of that best one; and `outcome`: "learnt", or, where
        the loss is not finite or the accuracy below `NOTHING_LEARNT`, "diverged" at rates above
        the best one and "too slow" at rates below it. A loss that is not finite has "diverged"
        at any rate.
    """
    final = last_epochs(runs)
    final = final.assign(finite=np.isfinite(final["train_loss"]))
    images = int(final["validation_images"].iloc[0])
    parts = []
    for (optimizer, size), of_size in final.groupby(["optimizer", "effective_batch_size"]):
        by_rate = of_size.groupby("learning_rate")
        accuracy = by_rate["validation_accuracy"].mean()
        finite = by_rate["finite"].all()
        best = accuracy.idxmax()
        threshold, _ = proportion_interval(accuracy.max(), images)
        learnt = finite & (accuracy >= NOTHING_LEARNT)
        too_slow = finite & (accuracy.index < best)
        part = pd.DataFrame(
            {
                "optimizer": optimizer,
                "effective_batch_size": size,
                "seeds": by_rate["seed"].nunique(),
                "validation_accuracy": accuracy,
                "best": accuracy.index == best,
                "within_noise": accuracy >= threshold,
                "outcome": np.select([learnt, too_slow], ["learnt", "too slow"], "diverged"),
            }
        )
        parts.append(part.reset_index())
    return pd.concat(parts, ignore_index=True)


def ridge(table: pd.DataFrame) -> pd.DataFrame:
    """The best rate of each size, and the range of rates that noise does not tell from it.

    Args:
        table: From `rate_map`.

    Returns:
        A row an `optimizer` and `effective_batch_size`: `best_rate`; `validation_accuracy` there;
        and `low` and `high`, half-way (on a log scale) from the outermost rates within noise to
        the next that were tried, missing where none was.
    """
    rows = []
    for (optimizer, size), group in table.groupby(["optimizer", "effective_batch_size"]):
        equal = group.loc[group["within_noise"], "learning_rate"]
        rates = group["learning_rate"]
        below, above = rates[rates < equal.min()].max(), rates[rates > equal.max()].min()
        best = group[group["best"]].iloc[0]
        rows.append(
            {
                "optimizer": optimizer,
                "effective_batch_size": size,
                "best_rate": best["learning_rate"],
                "validation_accuracy": best["validation_accuracy"],
                "low": np.sqrt(below * equal.min()),
                "high": np.sqrt(above * equal.max()),
            }
        )
    return pd.DataFrame(rows)


def scaling_rules(ridge_table: pd.DataFrame, anchor: int) -> pd.DataFrame:
    """What each rule of `RULES` makes of the best rate at one size.

    Args:
        ridge_table: From `ridge`.
        anchor: The effective batch size whose best rate is taken as it is.

    Returns:
        A row an `optimizer`, `rule` and `effective_batch_size`: its `learning_rate`, and `fits`,
        whether that is in the range of rates that noise does not tell from the best.

    Raises:
        InputError: No runs have the size `anchor`.
    """
    sizes = sorted(ridge_table["effective_batch_size"].unique())
    if anchor not in sizes:
        raise InputError(f"anchor = {anchor}, but it must be a size of the runs: {sizes}")
    rows = []
    for rule, power in RULES.items():
        start = ridge_table[ridge_table["effective_batch_size"] == anchor]
        start_rates = start.set_index("optimizer")["best_rate"]
        ratio = (ridge_table["effective_batch_size"] / anchor) ** power
        rates = ridge_table["optimizer"].map(start_rates) * ratio
        outside = (rates < ridge_table["low"]) | (rates > ridge_table["high"])
        keys = ridge_table[["optimizer", "effective_batch_size"]]
        rows.append(keys.assign(rule=rule, learning_rate=rates, fits=~outside))
    return pd.concat(rows, ignore_index=True)


def fixed_rate(table: pd.DataFrame) -> pd.DataFrame:
    """Which size is best where the rate is fixed.

    Args:
        table: From `rate_map`.

    Returns:
        A row an `optimizer` and `learning_rate` at which some size learnt:
        `best_size`; and the mean accuracies of the `smallest` and `largest` size.
    """
    rows = []
    for (optimizer, rate), group in table.groupby(["optimizer", "learning_rate"]):
        accuracies = group.set_index("effective_batch_size")["validation_accuracy"].sort_index()
        rows.append(
            {
                "optimizer": optimizer,
                "learning_rate": rate,
                "best_size": accuracies.idxmax(),
                "smallest": accuracies.iloc[0],
                "largest": accuracies.iloc[-1],
            }
        )
    return pd.DataFrame(rows)
