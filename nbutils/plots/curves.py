"""How runs develop: accuracy or error against epochs, updates or seconds."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from nbutils.analysis.intervals import mean_interval
from nbutils.analysis.summary import name_settings
from nbutils.plots.style import batch_size_colours, plain_log_ticks, stretch_towards_one

Metric = Literal["train_accuracy", "validation_accuracy", "test_accuracy"]

METRIC_NAMES = {
    "train_accuracy": "training accuracy (as seen during the epoch)",
    "validation_accuracy": "validation accuracy (after the epoch)",
    "test_accuracy": "test accuracy (after the epoch)",
}

Progress = Literal["epoch", "updates", "seconds"]
PROGRESS_NAMES = {
    "epoch": "epoch",
    "updates": "updates",
    "seconds": "seconds of training",
}

Scale = Literal["accuracy", "error"]

BAND_SEEDS = 3
"""Seeds of each setting from which on curves have bands. Student's interval of two seeds is 13
standard errors wide on either side: such bands would hide the curves and say nothing."""


def plot_accuracy(
    ax: Axes,
    runs: pd.DataFrame,
    metric: Metric,
    against: Progress = "epoch",
    scale: Scale = "accuracy",
) -> None:
    """How a metric develops, a line a setting, with a 95 % band from `BAND_SEEDS` seeds on.

    Colour tells the effective batch size; dashes tell that gradients were accumulated, the
    shorter the more steps.

    Args:
        ax: Where to draw.
        runs: From `load_runs`.
        metric: The column to draw.
        against: The horizontal axis. Seconds are the fastest seed's at each epoch.
        scale: "accuracy", on an axis stretched towards 100 % so that curves near 99 % can be
            told apart; or "error", the percentage of wrong answers on a log axis.
    """
    import seaborn as sns

    runs = name_settings(runs)
    settings = runs.drop_duplicates("setting").set_index("setting")
    colours = batch_size_colours(settings["effective_batch_size"])
    progress = runs.groupby(["setting", "epoch"])[against].transform("min")
    values = runs[metric] if scale == "accuracy" else 100 * (1 - runs[metric])
    sns.lineplot(
        data=runs.assign(progress=progress, value=values),
        x="progress",
        y="value",
        hue="setting",
        style="setting",
        palette=settings["effective_batch_size"].map(colours).to_dict(),
        dashes=settings["accumulation_steps"].map(_dashes).to_dict(),
        errorbar=mean_interval if _fewest_seeds(runs) >= BAND_SEEDS else None,
        err_kws={"alpha": 0.12},
        linewidth=2,
        ax=ax,
    )
    if scale == "accuracy":
        # The limits come from all of these, so that panels side by side have one scale.
        stretch_towards_one(ax, runs[list(METRIC_NAMES)])
    else:
        ax.set_yscale("log")
        plain_log_ticks(ax.yaxis, "{:g} %", (1, 2, 5))
    if against == "epoch":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        ax.set_xscale("log")
        plain_log_ticks(ax.xaxis, "{:,g}", (1, 3))
    ax.set(xlabel=PROGRESS_NAMES[against], ylabel=scale, title=METRIC_NAMES[metric])
    ax.margins(x=0.02)
    ax.legend(title="images per update", loc="upper left", bbox_to_anchor=(1, 1))


def plot_history(ax: Axes, history: pd.DataFrame) -> None:
    """Training, validation and, where it is known, test accuracy of one run against epoch."""
    import seaborn as sns

    names = {name: title.partition(" (")[0] for name, title in METRIC_NAMES.items()}
    curves = history.melt("epoch", list(names), "split", "accuracy").replace({"split": names})
    curves = curves.dropna()
    sns.lineplot(
        data=curves,
        x="epoch",
        y="accuracy",
        hue="split",
        style="split",
        markers=True,
        palette="viridis",
        ax=ax,
    )
    accuracies = history[list(METRIC_NAMES)]
    stretch_towards_one(ax, accuracies)
    ax.set_ylim(bottom=max(0.01, 1 - 1.1 * (1 - accuracies.min().min())))  # no point is cut off
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(title=None)


def _fewest_seeds(runs: pd.DataFrame) -> int:
    return int(runs.groupby("setting")["seed"].nunique().min())


def _dashes(accumulation_steps: int) -> tuple[float, float] | str:
    if accumulation_steps == 1:
        return ""
    length = max(1.0, 6 - np.log2(accumulation_steps))
    return (length, length / 2)
