"""Batch size x learning rate: the map of a study's runs, its ridge, and the scaling rules."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nbutils.analysis.intervals import proportion_interval
from nbutils.analysis.outcomes import last_epochs
from nbutils.errors import InputError

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
        means over them of `train_loss` and of `validation_accuracy`, with its 95 % interval `low`
        and `high` (Wilson's, of a share of the validation images); `best`, whether that is the
        highest of its size; `within_noise`, whether it is no lower than `low` of that best one;
        and `outcome`: "learnt", or, where the loss is not finite or the accuracy below
        `NOTHING_LEARNT`, "diverged" at rates above the best one and "too slow" at rates below it.
        A loss that is not finite has "diverged" at any rate.
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
        intervals = [proportion_interval(share, images) for share in accuracy]
        low, high = (np.array(ends) for ends in zip(*intervals, strict=True))
        learnt = finite & (accuracy >= NOTHING_LEARNT)
        too_slow = finite & (accuracy.index < best)
        part = pd.DataFrame(
            {
                "optimizer": optimizer,
                "effective_batch_size": size,
                "seeds": by_rate["seed"].nunique(),
                "train_loss": by_rate["train_loss"].mean(),
                "validation_accuracy": accuracy,
                "low": low,
                "high": high,
                "best": accuracy.index == best,
                "within_noise": accuracy >= low[accuracy.index == best].item(),
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
        `low` and `high`, half-way (on a log scale) from the outermost rates within noise to the
        next that were tried, missing where none was; and `loss_rate`, see `lowest_loss_rate`.
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
                "loss_rate": lowest_loss_rate(group),
            }
        )
    return pd.DataFrame(rows)


def lowest_loss_rate(of_size: pd.DataFrame) -> float:
    """The rate of lowest training loss at one size.

    The loss of thousands of training images is far less noisy than the accuracy on some hundred
    others. The rate is the vertex of the parabola, on log scales, through the lowest loss and
    its two neighbours; the lowest itself where it has but one.

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
        A row an `optimizer`: `power`, by least squares on log scales over the sizes, and its
        95 % interval (Student's), `low` and `high`; all NaN where there are fewer than three.
    """
    from scipy import stats

    rows = []
    for optimizer, group in ridge_table.groupby("optimizer"):
        if len(group) < 3:
            rows.append({"optimizer": optimizer, **dict.fromkeys(("power", "low", "high"), np.nan)})
            continue
        fit = stats.linregress(np.log(group["effective_batch_size"]), np.log(group["loss_rate"]))
        half = stats.t.ppf(0.975, len(group) - 2) * fit.stderr
        rows.append(
            {
                "optimizer": optimizer,
                "power": fit.slope,
                "low": fit.slope - half,
                "high": fit.slope + half,
            }
        )
    return pd.DataFrame(rows)


def scaling_rules(ridge_table: pd.DataFrame, anchor: int) -> pd.DataFrame:
    """What each rule of `RULES` makes of the rate of lowest training loss at one size.

    That rate is known better than the one of highest validation accuracy.

    Args:
        ridge_table: From `ridge`.
        anchor: The effective batch size whose rate is taken as it is.

    Returns:
        A row an `optimizer`, `rule` and `effective_batch_size`: its `learning_rate`, and `fits`,
        whether that is in the range of rates that noise does not tell from the best.

    Raises:
        InputError: No runs have the size `anchor`.
    """
    sizes = sorted(set(ridge_table["effective_batch_size"].tolist()))
    if anchor not in sizes:
        raise InputError(f"anchor = {anchor}, but it must be a size of the runs: {sizes}")
    rows = []
    for rule, power in RULES.items():
        start = ridge_table[ridge_table["effective_batch_size"] == anchor]
        start_rates = start.set_index("optimizer")["loss_rate"]
        ratio = (ridge_table["effective_batch_size"] / anchor) ** power
        rates = ridge_table["optimizer"].map(start_rates) * ratio
        outside = (rates < ridge_table["low"]) | (rates > ridge_table["high"])
        keys = ridge_table[["optimizer", "effective_batch_size"]]
        rows.append(keys.assign(rule=rule, learning_rate=rates, fits=~outside))
    return pd.concat(rows, ignore_index=True)


def format_ridge(ridge_table: pd.DataFrame, rules: pd.DataFrame) -> pd.DataFrame:
    """The ridge as people read it, beside the rate of each rule and whether that is on it.

    Args:
        ridge_table: From `ridge`.
        rules: From `scaling_rules`.
    """
    keys = ["optimizer", "effective_batch_size"]
    low = ridge_table["low"].map(lambda rate: "open" if pd.isna(rate) else f"{rate:.2g}")
    high = ridge_table["high"].map(lambda rate: "open" if pd.isna(rate) else f"{rate:.2g}")
    verdicts = rules.assign(
        text=rules["learning_rate"].map("{:.2g}".format)
        + rules["fits"].map({True: ", on it", False: ", off it"})
    ).pivot_table(index=keys, columns="rule", values="text", aggfunc="first")
    table = ridge_table[keys].assign(
        **{
            "best rate": ridge_table["best_rate"].map("{:g}".format),
            "accuracy": ridge_table["validation_accuracy"].map("{:.1%}".format),
            "within noise": low + " to " + high,
            "of lowest loss": ridge_table["loss_rate"].map("{:.2g}".format),
        }
    )
    names = {"optimizer": "optimizer", "effective_batch_size": "images per update"}
    return table.set_index(keys).join(verdicts).rename_axis(list(names.values()))


def describe_ridge(table: pd.DataFrame, rules: pd.DataFrame) -> str:
    """A Markdown line for each optimizer and question: does the ridge move as the rules say?

    Args:
        table: From `rate_map`.
        rules: From `scaling_rules`.
    """
    powers = growth(ridge(table)).set_index("optimizer")
    lines = []
    for optimizer, power in powers.iterrows():
        everywhere = table[table["optimizer"] == optimizer].groupby("learning_rate")["within_noise"]
        rates = [f"{rate:g}" for rate, equal in everywhere.all().items() if equal]
        grows = ""
        if not np.isnan(power["low"]):
            held = [r for r, power_of in RULES.items() if power["low"] <= power_of <= power["high"]]
            where = ("neither is", f"{''.join(held)} is", "both are")[len(held)]
            grows = (
                f"the rate of lowest training loss grows as the batch size to the "
                f"power of {power['power']:.2f} (95 % interval {power['low']:.2f} to "
                f"{power['high']:.2f}; linear is 1, square root 0.5: {where} in it). "
            )
        lines.append(
            f"- **{optimizer}**: {grows}Within noise of the best validation accuracy at *every* "
            f"size: {', '.join(rates) or 'no rate'}."
        )
        for rule, rows in rules[rules["optimizer"] == optimizer].groupby("rule"):
            off = ", ".join(map(str, rows.loc[~rows["fits"], "effective_batch_size"]))
            lines.append(
                f"- **{optimizer}**, {rule} rule: within noise at {rows['fits'].sum()} of "
                f"{len(rows)} sizes{f', not at {off}' if off else ''}."
            )
    return "\n".join(lines)


def describe_fixed_rates(table: pd.DataFrame) -> str:
    """One Markdown line an optimizer: at which fixed rates smaller or larger batches are better.

    Smaller batches are better at a rate if the largest size is worse than the best size of that
    rate by more than noise (their intervals do not overlap); larger ones if the smallest size is.
    Both hold where a middle size is best.

    Args:
        table: From `rate_map`.
    """
    lines = []
    for optimizer, of_optimizer in table.groupby("optimizer"):
        worse: dict[str, list[str]] = {"smaller": [], "larger": []}
        for rate, cut in of_optimizer.groupby("learning_rate"):
            cut = cut.sort_values("effective_batch_size")
            best = cut.sort_values("validation_accuracy").iloc[-1]
            for name, other in (("smaller", cut.iloc[-1]), ("larger", cut.iloc[0])):
                if other["high"] < best["low"]:
                    worse[name].append(
                        f"{rate:g} (best at {best['effective_batch_size']}: "
                        f"{best['validation_accuracy']:.1%}, "
                        f"at {other['effective_batch_size']}: {other['validation_accuracy']:.1%})"
                    )
        lines += [
            f"- **{optimizer}**, {name} batches are better at the rates: "
            f"{', '.join(rates) or 'none of those tried'}."
            for name, rates in worse.items()
        ]
    return "\n".join(lines)
