"""Batch size and learning rate: the map of a study's runs, its ridge, and the scaling rules."""

import math

import numpy as np
import pandas as pd
import scipy

from nbutils.analysis.intervals import proportion_interval, student_quantile
from nbutils.analysis.outcomes import outcomes
from nbutils.errors import InputError

NOTHING_LEARNT = 0.2  # of accuracies below: twice that of guessing among ten classes
KEYS = ["optimizer", "effective_batch_size"]
# The power of the batch size to which the learning rate is proportional. Sources: Goyal et al.
# (2017), "Accurate, Large Minibatch SGD", for SGD; Malladi et al. (2022), "On the SDEs and Scaling
# Rules for Adaptive Gradient Algorithms", for Adam.
RULES = {"linear": 1.0, "square root": 0.5}


def rate_map(runs: pd.DataFrame) -> pd.DataFrame:
    """The outcomes of runs of `load_runs` over batch size and learning rate, means over seeds.

    One row per `optimizer`, `effective_batch_size` and `learning_rate`: `seeds`, `train_loss`,
    `validation_accuracy` with `low` and `high` (Wilson's interval), `best` of its size,
    `within_noise` (no lower than `low` of that best one), and `outcome`: "learnt"; where nothing
    was, "too slow" at rates below the best one; else, or if the loss is not finite, "diverged".
    """
    ends = outcomes(runs)
    ends["finite"] = np.isfinite(ends["train_loss"])
    by_rate = ends.groupby([*KEYS, "learning_rate"])
    table = by_rate[["train_loss", "validation_accuracy"]].mean()
    table["seeds"], table["finite"] = by_rate["seed"].nunique(), by_rate["finite"].all()
    table = table.reset_index()
    rate, accuracy = table["learning_rate"], table["validation_accuracy"]
    images = int(ends["validation_images"].iloc[0])
    table["low"], table["high"] = np.transpose([proportion_interval(a, images) for a in accuracy])
    top = table.groupby(KEYS)["validation_accuracy"].transform("idxmax").to_numpy()
    table["best"] = table.index == top
    table["within_noise"] = accuracy >= table["low"].to_numpy()[top]
    learnt = table["finite"] & (accuracy >= NOTHING_LEARNT)
    slow = table["finite"] & (rate < rate.to_numpy()[top])
    return table.assign(outcome=np.select([learnt, slow], ["learnt", "too slow"], "diverged"))


def ridge(table: pd.DataFrame) -> pd.DataFrame:
    """The best rate of each size of a `rate_map`, and the range of rates within noise of it.

    One row per `optimizer` and `effective_batch_size`: `best_rate`; its `validation_accuracy`;
    `low` and `high`, half-way from the outermost rates within noise to the next that were tried,
    if any; and `loss_rate`, of the lowest training loss, which is less noisy.
    """
    by_size, rates = table.groupby(KEYS), table["learning_rate"]
    below, above = (np.sqrt(rates * by_size["learning_rate"].shift(step)) for step in (1, -1))
    equal = table.assign(low=below, high=above)[table["within_noise"]].groupby(KEYS)
    best = table[table["best"]].rename(columns={"learning_rate": "best_rate"}).set_index(KEYS)
    found = best[["best_rate", "validation_accuracy"]]
    found["low"], found["high"] = equal["low"].first(skipna=False), equal["high"].last(skipna=False)
    found["loss_rate"] = by_size.apply(lowest_loss_rate)
    return found.reset_index()


def lowest_loss_rate(of_size: pd.DataFrame) -> float:
    """The vertex of the parabola, on log scales, through the lowest loss and both neighbours."""
    known = of_size[np.isfinite(of_size["train_loss"])].sort_values("learning_rate")
    rates, losses = np.log(known[["learning_rate", "train_loss"]].to_numpy()).T
    lowest = int(losses.argmin())
    if lowest in (0, len(rates) - 1):
        return math.exp(rates[lowest])
    near = slice(lowest - 1, lowest + 2)
    curvature, slope, _ = np.polyfit(rates[near], losses[near], 2)
    return math.exp(-slope / (2 * curvature))


def growth(of_optimizer: pd.DataFrame) -> tuple[float, float, float]:
    """The power of the batch size with which `loss_rate` of three rows or more grows; interval."""
    x, y = np.log(of_optimizer[["effective_batch_size", "loss_rate"]].to_numpy()).T
    fit = scipy.stats.linregress(x, y)
    half = student_quantile(len(x) - 2) * fit.stderr
    return fit.slope, fit.slope - half, fit.slope + half


def scaling_rules(ridge_table: pd.DataFrame, anchor: int) -> pd.DataFrame:
    """What each of `RULES` makes of the rate of lowest training loss at the size `anchor`.

    One row per `optimizer`, `rule` and `effective_batch_size`: its `learning_rate`, and `fits`,
    whether that is in the range of the `ridge`. InputError where no runs have the size `anchor`.
    """
    sizes = ridge_table["effective_batch_size"]
    if anchor not in (known := sorted(set(sizes.tolist()))):
        raise InputError(f"anchor = {anchor}, but it must be a size of the runs: {known}")
    start = ridge_table[sizes == anchor].set_index("optimizer")["loss_rate"]
    parts = []
    for rule, power in RULES.items():
        rates = ridge_table["optimizer"].map(start) * (sizes / anchor) ** power
        outside = (rates < ridge_table["low"]) | (rates > ridge_table["high"])
        parts.append(ridge_table[KEYS].assign(rule=rule, learning_rate=rates, fits=~outside))
    return pd.concat(parts, ignore_index=True)


def format_ridge(ridge_table: pd.DataFrame, rules: pd.DataFrame) -> pd.DataFrame:
    """The ridge for reading, beside the rates of `scaling_rules` and whether they are in noise."""
    table = ridge_table.set_index(KEYS)
    rounded = table[["low", "high", "loss_rate"]].map("{:.2g}".format).replace("nan", "open")
    shown = {
        "best rate": table["best_rate"].map("{:g}".format),
        "accuracy": table["validation_accuracy"].map("{:.1%}".format),
        "within noise": rounded["low"] + " to " + rounded["high"],
        "lowest loss": rounded["loss_rate"],
    }
    for rule, rows in rules.set_index(KEYS).groupby("rule"):
        fits = rows["fits"].map({True: ", within", False: ", outside"})
        shown[str(rule)] = rows["learning_rate"].map("{:.2g}".format) + fits
    return pd.DataFrame(shown).rename_axis(["optimizer", "images per update"])


def describe_ridge(table: pd.DataFrame, rules: pd.DataFrame) -> str:
    """Markdown lines by optimizer: does the ridge of a `rate_map` move as a rule says?"""
    lines = []
    for optimizer, of_optimizer in ridge(table).groupby("optimizer"):
        if len(of_optimizer) > 2:
            power, low, high = growth(of_optimizer)
            held = [rule for rule, p in RULES.items() if low <= p <= high]
            lines.append(
                f"- **{optimizer}**: the rate of lowest training loss grows with the batch size "
                f"to the power of {power:.2f} (95 % interval {low:.2f} to {high:.2f}). Of the "
                f"rules, linear (1) and square root (0.5), the interval contains "
                f"{' and '.join(held) or 'neither'}."
            )
        equal = table[table["optimizer"] == optimizer].groupby("learning_rate")["within_noise"]
        rates = [f"{rate:g}" for rate, each in equal if each.all()]
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

    Small batches are better at a rate if the intervals of its best and its largest size do not
    overlap, large ones if those of its best and its smallest do not.
    """
    lines, ordered = [], table.sort_values("effective_batch_size")
    accuracy = "at {effective_batch_size}: {validation_accuracy:.1%}".format_map
    for optimizer, of_optimizer in ordered.groupby("optimizer"):
        for name, end in (("small", -1), ("large", 0)):
            rates = []
            for rate, cut in of_optimizer.groupby("learning_rate"):
                best, other = cut.sort_values("validation_accuracy").iloc[-1], cut.iloc[end]
                if other["high"] < best["low"]:
                    rates.append(f"{rate:g} (best {accuracy(best)}, {accuracy(other)})")
            listed = ", ".join(rates) or "none of the rates tried"
            lines.append(f"- **{optimizer}**, {name} batches are better at {listed}.")
    return "\n".join(lines)
