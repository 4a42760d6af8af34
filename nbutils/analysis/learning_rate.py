"""Batch size and learning rate: the map of a study's runs, its ridge, and the scaling rules."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nbutils.analysis.intervals import proportion_interval, student_quantile
from nbutils.analysis.outcomes import outcomes
from nbutils.errors import InputError

NOTHING_LEARNT = 0.2
"""Validation accuracy below which nothing was learnt: twice that of guessing among ten classes."""

RULES = {"linear": 1.0, "square root": 0.5}
"""Scaling rules: the power of the batch size to which the learning rate is proportional.

Sources: Goyal et al. (2017), "Accurate, Large Minibatch SGD", for SGD; Malladi et al. (2022), "On
the SDEs and Scaling Rules for Adaptive Gradient Algorithms", for Adam.
"""

KEYS = ["optimizer", "effective_batch_size"]


def rate_map(runs: pd.DataFrame) -> pd.DataFrame:
    """The validation accuracy that runs came to, over batch size and learning rate.

    Args:
        runs: From `load_runs`.

    Returns:
        One row per `optimizer`, `effective_batch_size` and `learning_rate`, in that order:
        `seeds`; means over them of the outcomes `train_loss` and `validation_accuracy`, the latter
        with its 95 % interval `low` and `high` (Wilson's, as a share of the validation images);
        `best`, whether it is the highest of its size; `within_noise`, whether it is no lower than
        `low` of that best one; and `outcome`: "learnt", or, where the loss is not finite or the
        accuracy below `NOTHING_LEARNT`, "diverged" at rates above the best one and "too slow" at
        rates below it. A loss that is not finite has "diverged" at any rate.
    """
    ends = outcomes(runs)
    images = int(ends["validation_images"].iloc[0])
    parts = []
    for (optimizer, size), of_size in ends.groupby(KEYS):
        by_rate = of_size.groupby("learning_rate")
        accuracy = by_rate["validation_accuracy"].mean()
        finite = by_rate["train_loss"].agg(lambda losses: np.isfinite(losses).all()).astype(bool)
        best, below = accuracy.index == accuracy.idxmax(), accuracy.index < accuracy.idxmax()
        intervals = np.array([proportion_interval(share, images) for share in accuracy])
        outcome = [finite & (accuracy >= NOTHING_LEARNT), finite & below]
        part = pd.DataFrame(
            {
                "optimizer": optimizer,
                "effective_batch_size": size,
                "seeds": by_rate["seed"].nunique(),
                "train_loss": by_rate["train_loss"].mean(),
                "validation_accuracy": accuracy,
                "low": intervals[:, 0],
                "high": intervals[:, 1],
                "best": best,
                "within_noise": accuracy >= intervals[best, 0].item(),
                "outcome": np.select(outcome, ["learnt", "too slow"], "diverged"),
            }
        )
        parts.append(part.reset_index())
    return pd.concat(parts, ignore_index=True)


def ridge(table: pd.DataFrame) -> pd.DataFrame:
    """The best rate of each size, and the range of rates that cannot be distinguished from it.

    Args:
        table: From `rate_map`.

    Returns:
        One row per `optimizer` and `effective_batch_size`: `best_rate`; `validation_accuracy`
        there; `low` and `high`, half-way (on a log scale) from the outermost rates within noise to
        the next that were tried, missing where none was; and `loss_rate`, see `lowest_loss_rate`.
    """
    rows = []
    for (optimizer, size), group in table.groupby(KEYS):
        rates, equal = group["learning_rate"], group.loc[group["within_noise"], "learning_rate"]
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
                "loss_rate": lowest_loss_rate(group),
            }
        )
    return pd.DataFrame(rows)


def lowest_loss_rate(of_size: pd.DataFrame) -> float:
    """The rate of lowest training loss at one size.

    The loss of thousands of training images is far less noisy than the accuracy on some hundred
    others. The rate is the vertex of the parabola, on log scales, through the lowest loss and its
    two neighbours; the lowest itself where it has only one neighbour.

    Args:
        of_size: From `rate_map`, the rows of one optimizer and size.
    """
    known = of_size[np.isfinite(of_size["train_loss"])].sort_values("learning_rate")
    rates, losses = np.log(known["learning_rate"].to_numpy()), np.log(known["train_loss"])
    lowest = int(losses.to_numpy().argmin())
    if lowest in (0, len(rates) - 1):
        return float(np.exp(rates[lowest]))
    near = slice(lowest - 1, lowest + 2)
    curvature, slope, _ = np.polyfit(rates[near], losses[near], 2)
    return float(np.exp(-slope / (2 * curvature)))


def growth(ridge_table: pd.DataFrame) -> pd.DataFrame:
    """The power of the batch size with which the rate of lowest training loss grows.

    Args:
        ridge_table: From `ridge`.

    Returns:
        One row per `optimizer`, its index: `power`, by least squares on log scales over the sizes,
        and its 95 % interval (Student's), `low` and `high`; all NaN for fewer than three sizes.
    """
    from scipy import stats

    rows = {}
    for optimizer, group in ridge_table.groupby("optimizer"):
        if len(group) < 3:
            rows[optimizer] = [np.nan] * 3
            continue
        fit = stats.linregress(np.log(group["effective_batch_size"]), np.log(group["loss_rate"]))
        half = student_quantile(len(group) - 2) * fit.stderr
        rows[optimizer] = [fit.slope, fit.slope - half, fit.slope + half]
    columns = ["power", "low", "high"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("optimizer")


def scaling_rules(ridge_table: pd.DataFrame, anchor: int) -> pd.DataFrame:
    """What each rule of `RULES` makes of the rate of lowest training loss at one size.

    Args:
        ridge_table: From `ridge`.
        anchor: The effective batch size whose rate is taken as it is.

    Returns:
        One row per `optimizer`, `rule` and `effective_batch_size`: its `learning_rate`, and
        `fits`, whether that is in the range that cannot be distinguished from the best rate.

    Raises:
        InputError: No runs have the size `anchor`.
    """
    sizes = sorted(set(ridge_table["effective_batch_size"].tolist()))
    if anchor not in sizes:
        raise InputError(f"anchor = {anchor}, but it must be a size of the runs: {sizes}")
    start = ridge_table[ridge_table["effective_batch_size"] == anchor]
    start_rates = ridge_table["optimizer"].map(start.set_index("optimizer")["loss_rate"])
    parts = []
    for rule, power in RULES.items():
        rates = start_rates * (ridge_table["effective_batch_size"] / anchor) ** power
        outside = (rates < ridge_table["low"]) | (rates > ridge_table["high"])
        parts.append(ridge_table[KEYS].assign(rule=rule, learning_rate=rates, fits=~outside))
    return pd.concat(parts, ignore_index=True)


def format_ridge(ridge_table: pd.DataFrame, rules: pd.DataFrame) -> pd.DataFrame:
    """The ridge for reading, beside the rate of each rule and whether that is within noise.

    Args:
        ridge_table: From `ridge`.
        rules: From `scaling_rules`.
    """
    low, high = (
        ridge_table[end].map(lambda rate: "open" if pd.isna(rate) else f"{rate:.2g}")
        for end in ("low", "high")
    )
    by_rule = rules.assign(
        text=rules["learning_rate"].map("{:.2g}".format)
        + rules["fits"].map({True: ", within", False: ", outside"})
    ).pivot_table(index=KEYS, columns="rule", values="text", aggfunc="first")
    table = ridge_table[KEYS].assign(
        **{
            "best rate": ridge_table["best_rate"].map("{:g}".format),
            "accuracy": ridge_table["validation_accuracy"].map("{:.1%}".format),
            "within noise": low + " to " + high,
            "lowest loss": ridge_table["loss_rate"].map("{:.2g}".format),
        }
    )
    return table.set_index(KEYS).join(by_rule).rename_axis(["optimizer", "images per update"])


def describe_ridge(table: pd.DataFrame, rules: pd.DataFrame) -> str:
    """Markdown lines for each optimizer: does the ridge move with the batch size as a rule says?

    Args:
        table: From `rate_map`.
        rules: From `scaling_rules`.
    """
    lines = []
    for optimizer, power in growth(ridge(table)).iterrows():
        everywhere = table[table["optimizer"] == optimizer].groupby("learning_rate")["within_noise"]
        rates = [f"{rate:g}" for rate, equal in everywhere.all().items() if equal]
        if not np.isnan(power["low"]):
            held = [rule for rule, p in RULES.items() if power["low"] <= p <= power["high"]]
            lines.append(
                f"- **{optimizer}**: the rate of lowest training loss grows with the batch size "
                f"to the power of {power['power']:.2f} (95 % interval {power['low']:.2f} to "
                f"{power['high']:.2f}). Of the rules, linear (1) and square root (0.5), the "
                f"interval contains {' and '.join(held) or 'neither'}."
            )
        lines.append(
            f"- **{optimizer}**: rates within noise of the best validation accuracy at every "
            f"size: {', '.join(rates) or 'none'}."
        )
        for rule, rows in rules[rules["optimizer"] == optimizer].groupby("rule"):
            off = ", ".join(map(str, rows.loc[~rows["fits"], "effective_batch_size"]))
            lines.append(
                f"- **{optimizer}**, {rule} rule: within noise at {rows['fits'].sum()} of "
                f"{len(rows)} sizes{f', not at {off}' if off else ''}."
            )
    return "\n".join(lines)


def describe_fixed_rates(table: pd.DataFrame) -> str:
    """Markdown lines for each optimizer: at which fixed rates small or large batches are better.

    Small batches are better at a rate if the largest size is worse than the best size of that rate
    by more than noise (their intervals do not overlap); large ones if the smallest size is. Both
    hold where a middle size is best.

    Args:
        table: From `rate_map`.
    """
    lines = []
    for optimizer, of_optimizer in table.groupby("optimizer"):
        worse: dict[str, list[str]] = {"small": [], "large": []}
        for rate, cut in of_optimizer.groupby("learning_rate"):
            cut = cut.sort_values("effective_batch_size")
            best = cut.sort_values("validation_accuracy").iloc[-1]
            for name, other in (("small", cut.iloc[-1]), ("large", cut.iloc[0])):
                if other["high"] < best["low"]:
                    worse[name].append(
                        f"{rate:g} (best at {best['effective_batch_size']}: "
                        f"{best['validation_accuracy']:.1%}, "
                        f"at {other['effective_batch_size']}: {other['validation_accuracy']:.1%})"
                    )
        lines += [
            f"- **{optimizer}**, {name} batches are better at "
            f"{', '.join(rates) or 'none of the rates tried'}."
            for name, rates in worse.items()
        ]
    return "\n".join(lines)
