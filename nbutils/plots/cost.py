"""What batch size and accumulation cost: memory, time, images per second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes

from nbutils.plots import style

COSTS = {
    "peak_memory": ("peak memory (MB)", 1e-6),
    "seconds_per_update": ("seconds per update", 1.0),
    "images_per_second": ("images per second", 1.0),
}
"""Columns of `nbutils.measure.cost.measure_grid`: their names, and the factors to their units."""


def plot_cost_map(ax: Axes, table: pd.DataFrame, column: str) -> None:
    """The medians of one of `COSTS` over batch size and accumulation steps."""
    import seaborn as sns  # takes over a second

    name, factor = COSTS[column]
    medians = factor * table.pivot_table(
        index="accumulation_steps", columns="batch_size", values=column, aggfunc="median"
    )
    look = {"cmap": "viridis_r", "norm": mpl.colors.LogNorm(), "linewidths": 1, "cbar": False}
    written = medians.map(lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}")
    sns.heatmap(medians, annot=written, fmt="", annot_kws={"size": 10}, ax=ax, **look)
    ax.invert_yaxis()
    ax.grid(False)
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel="micro-batch (images)", ylabel="accumulation steps", title=name)


def plot_cost(ax: Axes, table: pd.DataFrame, column: str) -> None:
    """One of `COSTS` against images per update: a line in one pass (thick) and per micro-batch.

    Points are medians, bars reach from the lowest to the highest measurement.
    """
    name, factor = COSTS[column]
    sizes = ["batch_size", "accumulation_steps", "effective_batch_size"]
    groups = table.assign(value=table[column] * factor).groupby(sizes)["value"]
    points = groups.agg(["median", "min", "max"]).dropna().reset_index()
    whole = points["accumulation_steps"] == 1
    lines = {"the whole batch": points[whole]}
    for size in sorted(points["batch_size"][~whole].unique()):
        lines[f"passes of {size}"] = points[points["batch_size"] == size]
    colours = ["0.25", *style.shades(len(lines) - 1)]
    for number, (label, line) in enumerate(lines.items()):
        x = line["effective_batch_size"] * 1.025**number  # side by side, so that bars show
        ends = line[["min", "median", "max"]].diff(axis=1)[["median", "max"]].to_numpy().T
        look: dict[str, Any] = {"label": label, "color": colours[number], "elinewidth": 1}
        look |= {"linestyle": "--", "linewidth": 1.5} if number else {"linewidth": 3}
        look["marker"] = style.MARKERS[number % len(style.MARKERS)]
        ax.errorbar(x, line["median"], yerr=ends, **look)
    if column == "images_per_second":
        ax.set_ylim(0)
    else:
        ax.set_yscale("log")
        style.plain_log_ticks(ax.yaxis, "{:,g}", (1, 2, 5))
    ax.set(xscale="log", xlabel="images per update", ylabel=name)
    style.fixed_ticks(ax.xaxis, points["effective_batch_size"])
    style.label_ends(ax)


def plot_search(ax: Axes, tried: Mapping[int, int | None], limit: int) -> None:
    """The peaks (bytes) of the sizes that `largest_batch_size` tried, numbered, and the limit.

    None, where memory ran out, is not drawn.
    """
    name, factor = COSTS["peak_memory"]
    ax.axhline(limit * factor, color="0.4", linestyle="--", label="limit")
    for number, (size, peak) in enumerate(tried.items(), start=1):
        if peak is not None:
            mark, colour = ("o", "#2d708e") if peak <= limit else ("x", style.RED)
            ax.plot(size, peak * factor, mark, color=colour, ms=8)
            ax.annotate(f"{number}", (size, peak * factor), (6, -9), textcoords="offset points")
    ax.set(xlabel="micro-batch (images)", ylabel=name)
    style.label_ends(ax)
