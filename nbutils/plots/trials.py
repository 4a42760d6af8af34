"""The trials behind an advice: what sizes cost, and how well rates learn."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator


def plot_trial_costs(axes: Sequence[Axes], costs: pd.DataFrame, chosen: int) -> None:
    """Speed (left), and time to get equally far (right), over images per update.

    Bars at the speeds reach down to the slowest measurement.

    Args:
        axes: Two, side by side.
        costs: `Advice.costs` as a table.
        chosen: The effective batch size that is advised.
    """
    whole = costs["accumulation_steps"] == 1
    styles = {
        "one micro-batch": (whole, "#440154", "-"),
        "accumulated": (~whole, "#29af7f", "--"),
    }
    for label, (kind, colour, line) in styles.items():
        part = costs[kind]
        if part.empty:
            continue
        size, speed = part["effective_batch_size"], part["images_per_second"]
        spread = [speed - part["slowest"], 0 * speed]
        axes[0].errorbar(
            size, speed, spread, fmt="o", ls=line, color=colour, capsize=4, label=label
        )
        axes[1].plot(size, part["relative_time"], "o", ls=line, color=colour, label=label)
    axes[0].set(ylabel="images per second", ylim=(0, None))
    axes[1].set(ylabel="time to get equally far", ylim=(0, None))
    for ax in axes:
        ax.set(xscale="log", xlabel="images per update")
        ax.axvline(chosen, color="0.6", linestyle=":", label="advised")
        ax.xaxis.set_major_locator(FixedLocator(sorted(costs["effective_batch_size"].unique())))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter("{:,g}".format))
    axes[1].legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))


def plot_trial_rates(ax: Axes, rates: pd.DataFrame) -> None:
    """Validation loss after equally many updates at each rate, with 95 % intervals.

    Args:
        ax: Where to draw.
        rates: `Advice.rates` as a table. Rates that diverged are crosses at the top.
    """
    learnt = rates[rates["outcome"] != "diverged"]
    diverged = rates.loc[rates["outcome"] == "diverged", "learning_rate"]
    loss = learnt["validation_loss"]
    spread = [loss - learnt["low"], learnt["high"] - loss]
    ax.errorbar(learnt["learning_rate"], loss, spread, fmt="o-", color="#440154", capsize=4)
    best = learnt[learnt["best"]]
    ax.plot(best["learning_rate"], best["validation_loss"], "o", ms=12, mfc="none", color="#29af7f")
    top = 1.1 * learnt["high"].max()
    ax.plot(diverged, [top] * len(diverged), "x", color="#b5367a", ms=9, clip_on=False)
    if len(diverged):
        ax.annotate(
            "diverged",
            (diverged.min(), top),
            xytext=(-10, 0),
            textcoords="offset points",
            color="#b5367a",
            ha="right",
            va="center",
        )
    ax.set(xscale="log", ylim=(0, 1.05 * top), xlabel="learning rate", ylabel="validation loss")
