"""Where runs end: a value of the last epoch against the setting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from nbutils.analysis.intervals import mean_interval
from nbutils.analysis.outcomes import last_epochs, name_settings
from nbutils.plots.style import batch_size_colours, fixed_ticks


def plot_final(ax: Axes, runs: pd.DataFrame, values: pd.Series) -> None:
    """A value of each run's last epoch against the effective batch size: dots, means, intervals.

    Each run is a dot, pale; each setting a mark with the 95 % interval of its mean, a circle
    without accumulation and a diamond with, the larger the more steps.

    Args:
        ax: Where to draw.
        runs: From `load_runs`, their last epochs.
        values: What to draw of each row of `runs`, in its order.
    """
    table = name_settings(runs.assign(value=values))
    colours = batch_size_colours(table["effective_batch_size"])
    for _, group in table.groupby("setting", sort=False):
        size = int(group["effective_batch_size"].iloc[0])
        steps = int(group["accumulation_steps"].iloc[0])
        # Settings of one size stand side by side.
        place = size * 1.09 ** np.log2(steps)
        style: dict[str, Any] = {"color": colours[size], "marker": "o" if steps == 1 else "D"}
        ax.plot([place] * len(group), group["value"], linestyle="", alpha=0.3, ms=4, **style)
        mean, (low, high) = group["value"].mean(), mean_interval(group["value"].tolist())
        ends = [[mean - low], [high - mean]] if len(group) > 1 else None
        mark = 8 if steps == 1 else 4 + np.log2(steps)
        ax.errorbar([place], [mean], yerr=ends, capsize=4, ms=mark, **style)
        # The legend tells marks; colours are told by the axis.
        label = "1 pass per update" if steps == 1 else f"{steps} passes per update"
        if label not in ax.get_legend_handles_labels()[1]:
            ax.plot([], [], label=label, linestyle="", ms=mark, **style | {"color": "0.3"})
    ax.set_xscale("log", base=2)
    fixed_ticks(ax.xaxis, colours)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.2f} %"))
    ax.set(xlabel="images per update", ylabel=None)
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))


def plot_normalisations(ax: Axes, runs: pd.DataFrame, metric: str) -> None:
    """Mean and 95 % interval of a metric of the last epoch, a line a kind of normalisation.

    Args:
        ax: Where to draw.
        runs: From `load_runs`; settings with equal effective batch size.
        metric: The column to draw, an accuracy, shown as errors in percent; or a loss.
    """
    import seaborn as sns

    final = last_epochs(runs).sort_values("batch_size", ascending=False)
    accuracy = metric.endswith("accuracy")
    sns.pointplot(
        data=final.assign(
            pieces=final["accumulation_steps"].astype(str)
            + " x "
            + final["batch_size"].astype(str),
            value=100 * (1 - final[metric]) if accuracy else final[metric],
        ),
        x="pieces",
        y="value",
        hue="norm",
        hue_order=["batch", "ghost", "group", "none"],
        palette=["#b8de29", "#29af7f", "#2d708e", "#440154"],
        markers=["o", "s", "D", "^"],
        dodge=0.3,
        errorbar=mean_interval,
        linewidth=1.5,
        ax=ax,
    )
    name = metric.replace("_", " ").replace("accuracy", "error (%)")
    ax.set(xlabel="micro-batches x images in each", ylabel=name)
    ax.legend(title="norm", loc="upper left", bbox_to_anchor=(1, 1))
