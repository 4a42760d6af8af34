"""What batch size and accumulation cost: memory, time, images per second."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from nbutils.plots.style import batch_size_colours, plain_log_ticks

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
    import seaborn as sns

    name, factor = COSTS[column]
    medians = table.pivot_table(
        index="accumulation_steps", columns="batch_size", values=column, aggfunc="median"
    ).sort_index(ascending=False)
    sns.heatmap(
        medians * factor,
        annot=True,
        fmt=".3g",
        annot_kws={"size": 9},
        norm="log",
        cmap="viridis_r",
        cbar=False,
        linewidths=1,
        ax=ax,
    )
    ax.set(xlabel="micro-batch (images)", ylabel="accumulation steps", title=name)
    ax.grid(False)
    ax.tick_params(axis="y", rotation=0)


def plot_cost(ax: Axes, table: pd.DataFrame, column: str) -> None:
    """A cost against images per update: a thick line without accumulation, one a micro-batch with.

    Points are medians, bars reach from the lowest to the highest measurement.

    Args:
        ax: Where to draw.
        table: From `nbutils.measure.cost.measure_grid`.
        column: One of `COSTS`.
    """
    name, factor = COSTS[column]
    groups = table.assign(value=table[column] * factor).groupby(
        ["batch_size", "accumulation_steps", "effective_batch_size"]
    )["value"]
    points = groups.agg(["median", "min", "max"]).dropna().reset_index()
    micro_batches = points[points["effective_batch_size"] > points["batch_size"]]["batch_size"]
    lines = {f"{size}": points[points["batch_size"] == size] for size in sorted(set(micro_batches))}
    colours = batch_size_colours(map(int, lines))
    whole = points[points["accumulation_steps"] == 1]
    for number, (label, line) in enumerate({"the whole batch": whole, **lines}.items()):
        accumulated = label in lines
        ax.errorbar(
            line["effective_batch_size"] * 1.02**number,  # side by side, so that bars show
            line["median"],
            yerr=[line["median"] - line["min"], line["max"] - line["median"]],
            capsize=3,
            marker="D" if accumulated else "o",
            ms=4 if accumulated else 6,
            linewidth=1.5 if accumulated else 3,
            linestyle="--" if accumulated else "-",
            color=colours[int(label)] if accumulated else "0.25",
            label=label,
        )
    if column == "images_per_second":
        ax.set_ylim(0)
    else:
        ax.set_yscale("log")
        plain_log_ticks(ax.yaxis, "{:,g}", (1, 2, 5))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(points["effective_batch_size"]))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set(xlabel="images per update", ylabel=name)
    ax.legend(title="images in a pass", loc="upper left", bbox_to_anchor=(1, 1))


def plot_search(ax: Axes, tried: Mapping[int, int | None], limit: int) -> None:
    """The sizes that `nbutils.measure.cost.largest_batch_size` tried, numbered, and the limit.

    Args:
        ax: Where to draw.
        tried: Peak memory in bytes by batch size, in the order of the tries.
        limit: Bytes that fit.
    """
    _, factor = COSTS["peak_memory"]
    for number, (size, peak) in enumerate(tried.items(), start=1):
        if peak is not None:
            fits = peak <= limit
            ax.plot(size, peak * factor, "o" if fits else "x", color="#2d708e" if fits else "0.3")
            ax.annotate(f"{number}", (size, peak * factor), (6, -9), textcoords="offset points")
    ax.axhline(limit * factor, color="0.4", linestyle="--")
    ax.set(xlabel="micro-batch (images)", ylabel=COSTS["peak_memory"][0])
