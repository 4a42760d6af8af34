"""What batch size and accumulation cost: memory, time, images per second."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nbutils.plots.style import (
    MARKERS,
    RED,
    batch_size_colours,
    fixed_ticks,
    label_ends,
    plain_log_ticks,
)

COSTS = {
    "peak_memory": ("peak memory (MB)", 1e-6),
    "seconds_per_update": ("seconds per update", 1.0),
    "images_per_second": ("images per second", 1.0),
}
"""What `plot_cost` and `plot_cost_map` show: its name on an axis, and the factor to its unit."""


def plot_cost_map(ax: Axes, table: pd.DataFrame, column: str) -> None:
    """A heat map over batch size and accumulation steps: medians, on a log scale of colours.

    Args:
        ax: Where to draw.
        table: From `nbutils.measure.cost.measure_grid`.
        column: One of `COSTS`.
    """
    name, factor = COSTS[column]
    medians = factor * table.pivot_table(
        index="accumulation_steps", columns="batch_size", values=column, aggfunc="median"
    )
    values = medians.to_numpy()
    shades = mpl.colors.LogNorm(np.nanmin(values), np.nanmax(values))
    ax.pcolormesh(values, cmap="viridis_r", norm=shades, edgecolor="white", linewidth=1)
    for (row, place), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "black" if shades(value) < 0.4 else "white"
            text = f"{value:.3g}"
            ax.text(place + 0.5, row + 0.5, text, color=ink, ha="center", va="center", size=10)
    ax.set_xticks(np.arange(values.shape[1]) + 0.5, list(map(str, medians.columns)))
    ax.set_yticks(np.arange(values.shape[0]) + 0.5, list(map(str, medians.index)))
    ax.set(xlabel="micro-batch (images)", ylabel="accumulation steps", title=name)
    ax.grid(False)


def plot_cost(ax: Axes, table: pd.DataFrame, column: str) -> None:
    """A cost against images per update: in one pass a thick line, accumulated one per micro-batch.

    Points are medians, bars reach from the lowest to the highest measurement.

    Args:
        ax: Where to draw.
        table: From `nbutils.measure.cost.measure_grid`.
        column: One of `COSTS`.
    """
    name, factor = COSTS[column]
    sizes = ["batch_size", "accumulation_steps", "effective_batch_size"]
    groups = table.assign(value=table[column] * factor).groupby(sizes)["value"]
    points = groups.agg(["median", "min", "max"]).dropna().reset_index()
    accumulated = points[points["accumulation_steps"] > 1]
    shades = batch_size_colours(accumulated["batch_size"].astype(int))
    lines = {"the whole batch": points[points["accumulation_steps"] == 1]}
    lines |= {f"passes of {size}": points[points["batch_size"] == size] for size in shades}
    colours = ["0.25", *shades.values()]
    ends = {}
    for number, (label, line) in enumerate(lines.items()):
        x = line["effective_batch_size"] * 1.025**number  # side by side, so that bars show
        ax.errorbar(
            x,
            line["median"],
            yerr=[line["median"] - line["min"], line["max"] - line["median"]],
            elinewidth=1,
            marker=MARKERS[number % len(MARKERS)],
            linewidth=1.5 if number else 3,
            linestyle="--" if number else "-",
            color=colours[number],
            label=label,
        )
        if len(line):
            ends[label] = (x.iloc[-1], line["median"].iloc[-1])
    if column == "images_per_second":
        ax.set_ylim(0)
    else:
        ax.set_yscale("log")
        plain_log_ticks(ax.yaxis, "{:,g}", (1, 2, 5))
    ax.set(xscale="log", xlabel="images per update", ylabel=name)
    fixed_ticks(ax.xaxis, points["effective_batch_size"])
    label_ends(ax, ends, colours)


def plot_search(ax: Axes, tried: Mapping[int, int | None], limit: int) -> None:
    """The sizes that `nbutils.measure.cost.largest_batch_size` tried, numbered, and the limit.

    Args:
        ax: Where to draw.
        tried: Peak memory in bytes by batch size, in the order of the tries; None where memory
            ran out, which is not drawn.
        limit: Bytes that fit.
    """
    name, factor = COSTS["peak_memory"]
    for number, (size, peak) in enumerate(tried.items(), start=1):
        if peak is not None:
            fits = peak <= limit
            ax.plot(
                size, peak * factor, "o" if fits else "x", color="#2d708e" if fits else RED, ms=8
            )
            ax.annotate(f"{number}", (size, peak * factor), (6, -9), textcoords="offset points")
    ax.axhline(limit * factor, color="0.4", linestyle="--")
    ax.set(xlabel="micro-batch (images)", ylabel=name)
    label_ends(ax, {"limit": (ax.get_xlim()[1], limit * factor)}, ["0.4"])
