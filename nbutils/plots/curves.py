"""How runs develop: accuracy or error against epochs, updates or seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from nbutils.analysis.intervals import mean_interval
from nbutils.analysis.outcomes import name_settings
from nbutils.plots.style import (
    MARKERS,
    batch_size_colours,
    fixed_ticks,
    label_ends,
    plain_log_ticks,
    stretch_towards_one,
)

Metric = Literal["train_accuracy", "validation_accuracy", "test_accuracy"]
Progress = Literal["epoch", "updates", "seconds"]
Scale = Literal["accuracy", "error"]

METRIC_NAMES = {
    "train_accuracy": "training accuracy (as seen during the epoch)",
    "validation_accuracy": "validation accuracy (after the epoch)",
    "test_accuracy": "test accuracy (after the epoch)",
}
PROGRESS_NAMES = {"epoch": "epoch", "updates": "updates", "seconds": "seconds of training"}

BAR_SEEDS = 3
"""Seeds of each setting from which on curves have intervals. Student's interval of two seeds is
13 standard errors wide on either side: it would hide the curves and say nothing."""


def plot_accuracy(
    ax: Axes,
    runs: pd.DataFrame,
    metric: Metric,
    against: Progress = "epoch",
    scale: Scale = "accuracy",
) -> None:
    """How a metric develops: one line per setting, its mean over seeds.

    The darker a line, the more images per update; accumulated settings are dashed. Marks with
    bars, 95 % intervals of the mean from `BAR_SEEDS` seeds on, take turns: at each epoch only
    some lines have one, so that bars do not cover each other.

    Args:
        ax: Where to draw.
        runs: From `load_runs`.
        metric: The column to draw.
        against: The horizontal axis. Seconds are those of the fastest seed at each epoch.
        scale: "accuracy", on an axis stretched towards 100 % so that curves near 99 % can be
            compared; or "error", the percentage of wrong answers on a log axis.
    """
    runs = name_settings(runs)
    settings = runs.drop_duplicates("setting").set_index("setting")
    shades = batch_size_colours(settings["effective_batch_size"])
    runs["value"] = runs[metric] if scale == "accuracy" else 100 * (1 - runs[metric])
    bars = runs.groupby("setting")["seed"].nunique().min() >= BAR_SEEDS
    ends, colours = {}, []
    for number, (setting, row) in enumerate(settings.iterrows()):
        epochs = runs[runs["setting"] == setting].groupby("epoch")
        x, mean = epochs[against].min(), epochs["value"].mean()
        turn = (number % len(x), len(settings))
        name, colour = str(setting), shades[row["effective_batch_size"]]
        spread = None
        if bars:
            low, high = np.transpose([mean_interval(list(v)) for _, v in epochs["value"]])
            spread = [mean - low, high - mean]
        ax.errorbar(
            x,
            mean,
            yerr=spread,
            errorevery=turn,
            markevery=turn,
            label=name,
            color=colour,
            marker=MARKERS[number % len(MARKERS)],
            linestyle="-" if row["accumulation_steps"] == 1 else (0, (4, 1.5)),
            linewidth=1.8,
            elinewidth=1.2,
        )
        ends[name] = (x.iloc[-1], mean.iloc[-1])
        colours.append(colour)
    # The limits come from all metrics, so that panels side by side have one scale.
    _accuracy_axis(ax, runs[list(METRIC_NAMES)].to_numpy(), scale)
    _progress_axis(ax, against, runs[against])
    ax.set_title(METRIC_NAMES[metric].replace("accuracy", scale))
    if against == "epoch" and len(ends) <= len(MARKERS):
        label_ends(ax, ends, colours)
    else:
        ax.legend(title="images per update", loc="upper left", bbox_to_anchor=(1, 1))


def plot_overlay(
    ax: Axes, histories: Mapping[str, pd.DataFrame], against: Progress = "epoch"
) -> None:
    """Validation accuracy of a few runs, one over the other, so that equal ones can be seen.

    Args:
        ax: Where to draw.
        histories: `RunResult.history` by name, such as "128", "1024", "8 x 128". A name with
            " x " is drawn dashed and thin, over the thick line that it should coincide with.
        against: The horizontal axis.
    """
    shades = mpl.colormaps["viridis_r"](np.linspace(0.3, 1, len(histories)))
    ends = {}
    for marker, shade, (name, history) in zip(MARKERS, shades, histories.items(), strict=False):
        accumulated = " x " in name
        style: dict[str, Any] = {"linewidth": 4, "alpha": 0.7, "markersize": 8}
        if accumulated:
            style = {"linewidth": 1.8, "linestyle": (0, (4, 1.5)), "markerfacecolor": "white"}
        x, y = history[against], history["validation_accuracy"]
        ax.plot(x, y, label=name, color=shade, marker=marker, zorder=2 + accumulated, **style)
        ends[name] = (x.iloc[-1], y.iloc[-1])
    accuracies = np.concatenate([h["validation_accuracy"] for h in histories.values()])
    _accuracy_axis(ax, accuracies)
    _show_lowest(ax, accuracies)
    _progress_axis(ax, against, np.concatenate([h[against] for h in histories.values()]))
    ax.set_title(METRIC_NAMES["validation_accuracy"])
    if against == "epoch":
        label_ends(ax, ends, list(shades))
    else:
        ax.legend(title="images per update", loc="lower right")


def plot_history(ax: Axes, history: pd.DataFrame) -> None:
    """Training, validation and, where it is known, test accuracy of one run against epoch.

    Args:
        ax: Where to draw.
        history: `RunResult.history`.
    """
    ends = {}
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.75, len(METRIC_NAMES)))
    for (metric, title), marker, shade in zip(METRIC_NAMES.items(), MARKERS, shades, strict=False):
        curve = history[metric]
        if curve.notna().all():
            name = title.partition(" ")[0]
            ax.plot(history["epoch"], curve, marker=marker, color=shade, label=name)
            ends[name] = (history["epoch"].iloc[-1], curve.iloc[-1])
    accuracies = history[list(METRIC_NAMES)].to_numpy()
    _accuracy_axis(ax, accuracies)
    _show_lowest(ax, accuracies)
    _progress_axis(ax, "epoch", history["epoch"])
    label_ends(ax, ends, list(shades[: len(ends)]))


def _accuracy_axis(ax: Axes, accuracies: np.ndarray, scale: Scale = "accuracy") -> None:
    if scale == "accuracy":
        stretch_towards_one(ax, accuracies)
    else:
        errors = 100 * (1 - accuracies)
        lowest = errors.min(initial=100, where=errors > 0)
        ax.set(yscale="log", ylim=(lowest / 1.3, 1.3 * np.nanquantile(errors, 0.98)))
        plain_log_ticks(ax.yaxis, "{:g} %", (1, 2, 5))
    ax.set_ylabel(scale)


def _show_lowest(ax: Axes, accuracies: np.ndarray) -> None:
    """Let the axis begin below the lowest point, for curves that are few and short."""
    ax.set_ylim(bottom=max(0.01, 1 - 1.1 * (1 - np.nanmin(accuracies))))


def _progress_axis(ax: Axes, against: Progress, values: Any) -> None:
    if against == "epoch":
        last = max(values)
        ax.set_xlim(1 - 0.02 * last, 1.02 * last)
        steps = MaxNLocator(6, integer=True).tick_values(1, last)
        fixed_ticks(ax.xaxis, [1, *(step for step in steps if 1 < step <= last)])
    else:
        ax.set_xscale("log")
        plain_log_ticks(ax.xaxis, "{:,g}", (1, 3))
    ax.set_xlabel(PROGRESS_NAMES[against])
