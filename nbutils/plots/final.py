"""How runs end: an outcome of each run against its setting."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nbutils.analysis.intervals import mean_interval
from nbutils.analysis.outcomes import name_settings, outcomes, setting_name
from nbutils.plots.style import MARKERS, batch_size_colours, label_ends


def plot_final(ax: Axes, runs: pd.DataFrame, values: pd.Series) -> None:
    """A value of each run against its setting: dots, and means with 95 % intervals.

    Each run is a pale dot; each setting has a mark, a circle without accumulation and a diamond
    with it.

    Args:
        ax: Where to draw.
        runs: One row per run, with the columns of `load_runs`.
        values: What to draw of each row of `runs`, in its order; a fraction in [0, 1].
    """
    table = name_settings(runs.assign(value=values))
    colours = batch_size_colours(table["effective_batch_size"])
    groups = {str(name): group for name, group in table.groupby("setting", sort=False)}
    for place, group in enumerate(groups.values()):
        colour = colours[group["effective_batch_size"].iloc[0]]
        marker = "o" if group["accumulation_steps"].iloc[0] == 1 else "D"
        beside = place + 0.18 * np.linspace(-1, 1, len(group))
        ax.plot(beside, group["value"], marker, color=colour, alpha=0.35, ms=4)
        _mean_with_bar(ax, place, group["value"], color=colour, marker=marker, ms=8)
    longest = max(map(len, groups))
    ax.set_xticks(range(len(groups)), list(groups), rotation=0 if longest < 8 else 25)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value * 100:.5g} %")
    ax.set(xlabel="images per update; accumulated: steps x micro-batch", ylabel=None)


def plot_normalisations(ax: Axes, runs: pd.DataFrame, metric: str) -> None:
    """The mean outcome of each kind of normalisation, with its 95 % interval.

    Args:
        ax: Where to draw.
        runs: From `load_runs`; settings of one effective batch size.
        metric: The column to draw: an accuracy, drawn as errors in percent, or a loss.
    """
    final = outcomes(runs).sort_values("batch_size", ascending=False)
    accuracy = metric.endswith("accuracy")
    final["value"] = 100 * (1 - final[metric]) if accuracy else final[metric]
    sizes = zip(final["batch_size"], final["accumulation_steps"], strict=True)
    final["setting"] = [setting_name(*size) for size in sizes]
    settings = final["setting"].unique().tolist()
    groups = final.groupby(["norm", "setting"])["value"]
    norms = [norm for norm in ("batch", "ghost", "group", "none") if norm in set(final["norm"])]
    shades = list(batch_size_colours(range(len(norms))).values())
    ends = {}
    for number, (norm, shade) in enumerate(zip(norms, shades, strict=True)):
        values = [groups.get_group((norm, setting)) for setting in settings]
        means = [float(of_setting.mean()) for of_setting in values]
        places = np.arange(len(settings)) + 0.12 * (number - (len(norms) - 1) / 2)
        ax.plot(places, means, color=shade, linestyle=["-", "--", "-.", ":"][number])
        for place, of_setting in zip(places, values, strict=True):
            _mean_with_bar(ax, place, of_setting, color=shade, marker=MARKERS[number], ms=7)
        ends[norm] = (places[-1], means[-1])
    ax.set_xticks(range(len(settings)), settings)
    name = metric.replace("_", " ").replace("accuracy", "error (%)")
    ax.set(xlabel="images per update; accumulated: steps x micro-batch", ylabel=name)
    label_ends(ax, ends, shades)


def _mean_with_bar(ax: Axes, place: float, values: pd.Series, **style: object) -> None:
    """The mean of `values` at `place`, and from two values on its 95 % interval."""
    mean = values.mean()
    low, high = mean_interval(values.tolist()) if len(values) > 1 else (mean, mean)
    ax.errorbar([place], [mean], yerr=[[mean - low], [high - mean]], capsize=4, **style)  # type: ignore[arg-type]
