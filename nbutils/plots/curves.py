"""How runs develop, against epochs, updates or seconds, and how they end, by setting."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from nbutils.analysis.intervals import mean_interval
from nbutils.analysis.outcomes import name_settings, outcomes, setting_name
from nbutils.plots import style

Progress = Literal["epoch", "updates", "seconds"]
Scale = Literal["accuracy", "error"]

METRIC_NAMES = {
    "train_accuracy": "training accuracy (as seen during the epoch)",
    "validation_accuracy": "validation accuracy (after the epoch)",
    "test_accuracy": "test accuracy (after the epoch)",
}

SETTINGS = "images per update; accumulated: steps x micro-batch"
BAR_SEEDS = 3  # from which on curves have intervals: those of two are 13 standard errors wide


def plot_accuracy(
    ax: Axes,
    runs: pd.DataFrame,
    metric: str,
    against: Progress = "epoch",
    scale: Scale = "accuracy",
) -> None:
    """How one of `METRIC_NAMES` develops in runs of `load_runs`: the mean over seeds by setting.

    The darker a line, the more images per update; accumulated settings are dashed. Marks with
    95 % intervals take turns at the epochs. Seconds are those of the fastest seed at each epoch.
    """
    runs, metrics = name_settings(runs), list(METRIC_NAMES)
    if scale == "error":
        runs[metrics] = 100 * (1 - runs[metrics])
    settings = runs.groupby("setting", sort=False)
    colours = style.batch_size_colours(runs["effective_batch_size"])
    bars = settings["seed"].nunique().min() >= BAR_SEEDS
    shown = ["value", "low", "high"] if bars else ["value"]
    for number, (setting, rows) in enumerate(settings):
        epochs = rows.groupby("epoch")
        size, steps = rows[["effective_batch_size", "accumulation_steps"]].iloc[0]
        turn = (number % len(epochs), len(settings))
        look: dict[str, Any] = {"label": setting, "color": colours[size], "linewidth": 1.8}
        look |= {"marker": style.MARKERS[number % len(style.MARKERS)], "elinewidth": 1.2}
        look |= {"markevery": turn, "errorevery": turn}
        look["linestyle"] = "-" if steps == 1 else style.ACCUMULATED
        style.errorbar(ax, epochs[against].min(), _intervals(epochs[metric])[shown], **look)
    values = runs[metrics].to_numpy()  # of all metrics, so that panels side by side have one scale
    if scale == "accuracy":
        style.stretch_towards_one(ax, values)
    else:
        lowest = values.min(initial=100, where=values > 0)
        ax.set(yscale="log", ylim=(lowest / 1.3, 1.3 * np.nanquantile(values, 0.98)))
        style.plain_log_ticks(ax.yaxis, "{:g} %", 1, 2, 5)
    _progress_axis(ax, against, runs[against])
    ax.set(ylabel=scale, title=METRIC_NAMES[metric].replace("accuracy", scale))
    if against == "epoch" and len(settings) <= len(style.MARKERS):
        style.label_ends(ax)
    else:
        style.legend_beside(ax, title="images per update")


def plot_overlay(
    ax: Axes, histories: Mapping[str, pd.DataFrame], against: Progress = "epoch"
) -> None:
    """Validation accuracy of a few runs, of which equal ones can be seen: "8 x 128" is drawn thin.

    `histories` are `RunResult.history` by name.
    """
    metric = "validation_accuracy"
    style.cycle_looks(ax, style.shades(len(histories), 0.3))
    for name, history in histories.items():
        look: dict[str, Any] = {"linewidth": 4, "alpha": 0.7, "markersize": 8}
        if " x " in name:
            look = {"linewidth": 1.8, "linestyle": style.ACCUMULATED, "mfc": "white", "zorder": 3}
        ax.plot(history[against], history[metric], label=name, **look)
    _few_curves(ax, against)
    ax.set_title(METRIC_NAMES[metric])
    if against == "epoch":
        style.label_ends(ax)
    else:
        ax.legend(title="images per update", loc="lower right")


def plot_history(ax: Axes, history: pd.DataFrame) -> None:
    """Training, validation and, where it is known, test accuracy of a `RunResult.history`."""
    style.cycle_looks(ax, style.shades(3, 1, 0.25))
    for metric, title in METRIC_NAMES.items():
        if history[metric].notna().all():
            ax.plot(history["epoch"], history[metric], label=title.partition(" ")[0])
    _few_curves(ax, "epoch")
    style.label_ends(ax)


def _few_curves(ax: Axes, against: Progress) -> None:
    """The axes of curves so few and short that they can show the lowest point."""
    progress, accuracies = np.concatenate([line.get_xydata() for line in ax.lines]).T
    style.stretch_towards_one(ax, accuracies)
    ax.set(ylim=(max(0.01, 1 - 1.1 * (1 - accuracies.min())), None), ylabel="accuracy")
    _progress_axis(ax, against, progress)


def _progress_axis(ax: Axes, against: Progress, values: Any) -> None:
    if against == "epoch":
        last = values.max()
        ax.set_xlim(1 - 0.02 * last, 1.02 * last)
        steps = MaxNLocator(6, integer=True).tick_values(1, last)
        style.fixed_ticks(ax.xaxis, [1, *(step for step in steps if 1 < step <= last)])
    else:
        ax.set_xscale("log")
        style.plain_log_ticks(ax.xaxis, "{:,g}", 1, 3)
    ax.set_xlabel("seconds of training" if against == "seconds" else against)


def _intervals(groups: Any) -> pd.DataFrame:
    """Mean (`value`) and 95 % interval (`low`, `high`) of each group of a column."""
    rows = {name: (values.mean(), *mean_interval(values.tolist())) for name, values in groups}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"])


def plot_final(ax: Axes, runs: pd.DataFrame, values: pd.Series) -> None:
    """A value in [0, 1] of each run (one row each): pale dots, and each setting's mean, interval.

    Diamonds are accumulated settings.
    """
    table = name_settings(runs.assign(value=values))
    settings = table.groupby("setting", sort=False)
    colours = style.batch_size_colours(table["effective_batch_size"])
    means = _intervals(settings["value"])
    for place, (_, rows) in enumerate(settings):
        size, steps = rows[["effective_batch_size", "accumulation_steps"]].iloc[0]
        look: dict[str, Any] = {"color": colours[size], "marker": "o" if steps == 1 else "D"}
        beside = place + 0.18 * np.linspace(-1, 1, len(rows))
        ax.plot(beside, rows["value"], linestyle="", alpha=0.35, ms=4, **look)
        style.errorbar(ax, [place], means.iloc[[place]], capsize=4, ms=8, **look)
    longest = max(map(len, means.index))
    ax.set_xticks(range(len(means)), means.index, rotation=0 if longest < 8 else 25)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value * 100:.5g} %")
    ax.set(xlabel=SETTINGS, ylabel=None)


def plot_normalisations(ax: Axes, runs: pd.DataFrame, metric: str) -> None:
    """The mean outcome of each normalisation, with its 95 % interval; accuracies as errors.

    `runs` of `load_runs` have one effective batch size.
    """
    final = outcomes(runs).sort_values("batch_size", ascending=False)
    is_accuracy = metric.endswith("accuracy")
    final["value"] = 100 * (1 - final[metric]) if is_accuracy else final[metric]
    final["setting"] = final["batch_size"].combine(final["accumulation_steps"], setting_name)
    norms, places = final.groupby("norm"), pd.Index(final["setting"].unique())
    style.cycle_looks(ax, style.shades(len(norms)), linestyle=["-", "--", "-.", ":"][: len(norms)])
    for number, (norm, rows) in enumerate(norms):
        means = _intervals(rows.groupby("setting", sort=False)["value"])
        beside = places.get_indexer(means.index) + 0.12 * (number - (len(norms) - 1) / 2)
        style.errorbar(ax, beside, means, label=norm, ms=7, capsize=4)
    ax.set_xticks(range(len(places)), places)
    name = metric.replace("_", " ").replace("accuracy", "error (%)")
    ax.set(xlabel=SETTINGS, ylabel=name)
    style.label_ends(ax)
