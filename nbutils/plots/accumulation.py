"""What accumulation does to a gradient and to the weights, right and wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes

from nbutils.analysis.intervals import mean_interval


def plot_ladder(ax: Axes, table: pd.DataFrame, limits: Mapping[str, float]) -> None:
    """Differences of each rung on a log axis, and the limit that each must stay below.

    Args:
        ax: Where to draw.
        table: From `nbutils.accumulation.equivalence.ladder`.
        limits: The limit of each rung.
    """
    import seaborn as sns

    rungs = list(limits)
    values = table[rungs].melt(var_name="rung", value_name="difference", ignore_index=False)
    sns.stripplot(
        data=values.reset_index(),
        x="rung",
        y="difference",
        hue="optimizer",
        order=rungs,
        palette="viridis",
        dodge=True,
        jitter=False,
        alpha=0.7,
        ax=ax,
    )
    for position, rung in enumerate(rungs):
        ax.hlines(limits[rung], position - 0.4, position + 0.4, color="0.4", linestyle="--")
    ax.set(yscale="log", xlabel=None, ylabel="relative difference")
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))


def plot_drift(ax: Axes, table: pd.DataFrame) -> None:
    """How the weights of two trainings drift apart, a line a precision and optimizer.

    Args:
        ax: Where to draw.
        table: From `equivalence.drift`, with columns `precision` and `optimizer`.
    """
    import seaborn as sns

    sns.lineplot(
        data=table,
        x="update",
        y="weights",
        hue="precision",
        style="optimizer",
        palette="viridis",
        ax=ax,
    )
    ax.set(yscale="log", xlabel="updates", ylabel="relative difference of the weights")
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))


def plot_damage(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """What each pitfall does to the gradient (left) and to the test error (right).

    Args:
        axes: Two, side by side.
        table: From `pitfalls.measure_damage`. Bars are means over seeds, with 95 % intervals.
    """
    import seaborn as sns

    table = table.assign(error=100 * (1 - table["accuracy"]))
    labels = {
        "gradient_error": "largest relative error of an update's gradient",
        "error": "test error (%)",
    }
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        sns.barplot(data=table, y="loop", x=column, errorbar=mean_interval, color="#2d708e", ax=ax)
        ax.set(ylabel=None, xlabel=label)
    reference = table.loc[table["loop"] == "correct", "error"].mean()
    axes[1].axvline(reference, color="0.4", linestyle="--")
    axes[1].tick_params(labelleft=False)
