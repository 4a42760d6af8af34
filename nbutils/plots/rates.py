"""Batch size and learning rate: maps, cuts, rules; updates to a target; the noise scale.

Tables are those of `nbutils.analysis`, the rows of one optimizer.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nbutils.analysis.critical_batch import REGIMES, CriticalBatch, regime_borders
from nbutils.plots import style


def plot_rate_map(ax: Axes, table: pd.DataFrame) -> None:
    """The validation accuracies of `rate_map`, the paler the better; bold: as good as the best."""
    grid = table.pivot_table(
        index="learning_rate", columns="effective_batch_size", values="validation_accuracy"
    )
    colours, shade_of = mpl.colormaps["viridis_r"], mpl.colors.LogNorm(0.01, 1)
    edges = _log_edges(grid.columns.to_numpy(float)), _log_edges(grid.index.to_numpy(float))
    ax.pcolormesh(*edges, 1 - grid.to_numpy(), cmap=colours, norm=shade_of, edgecolor="white")
    for _, row in table.iterrows():
        accuracy, text, size = row["validation_accuracy"], row["outcome"], 8
        if text == "learnt":
            text, size = f"{100 * accuracy:.1f}", 10
        shade = float(shade_of(1 - accuracy))
        look: dict[str, Any] = {"ha": "center", "va": "center", "size": size, "zorder": 4}
        look["color"] = "black" if shade < 0.4 else "white"
        look["weight"] = "bold" if row["within_noise"] else "normal"
        # The box hides what is drawn over the map behind the number.
        look["bbox"] = {"facecolor": colours(shade), "edgecolor": "none", "pad": 1.5}
        ax.text(row["effective_batch_size"], row["learning_rate"], text, **look)
    ax.set(xscale="log", yscale="log", xlabel="images per update", ylabel="learning rate")
    style.fixed_ticks(ax.xaxis, table["effective_batch_size"])
    style.fixed_ticks(ax.yaxis, table["learning_rate"])
    ax.grid(False)


def _log_edges(centres: np.ndarray) -> np.ndarray:
    """Borders of cells around two or more `centres` on a log scale; shape (n + 1,)."""
    inner = np.sqrt(centres[1:] * centres[:-1])
    outer = centres[[0, -1]] ** 2 / inner[[0, -1]]
    return np.array([outer[0], *inner, outer[1]])


def plot_scaling_rules(ax: Axes, ridge: pd.DataFrame, rules: pd.DataFrame) -> None:
    """The rates of lowest training loss of `ridge`, and `scaling_rules`, over `plot_rate_map`."""
    limits = ax.get_ylim()
    for (rule, line), dashes in zip(rules.groupby("rule"), ("-", "--"), strict=True):
        x, y = line["effective_batch_size"], line["learning_rate"]
        ax.plot(x, y, color="white", linewidth=5, alpha=0.6)
        ax.plot(x, y, color=style.RED, linewidth=2, linestyle=dashes, label=f"{rule} rule")
    ring: dict[str, Any] = {"color": style.RED, "mfc": "none", "mew": 2, "ms": 24}
    x, y = ridge["effective_batch_size"], ridge["loss_rate"]
    ax.plot(x, y, "o", label="lowest training loss", **ring)
    ax.set_ylim(limits)
    style.legend_beside(ax, labelspacing=0.9)


def plot_fixed_rates(ax: Axes, table: pd.DataFrame, rates: Sequence[float]) -> None:
    """Error, with 95 % intervals, against batch size at some rates of `rate_map` and the best."""
    ends = {"high": "low", "validation_accuracy": "value", "low": "high"}  # of accuracy, of error
    errors = 100 * (1 - table[list(ends)].rename(columns=ends))
    lines = {
        np.format_float_positional(rate, trim="-"): np.isclose(table["learning_rate"], rate)
        for rate in sorted(rates)
    }
    lines["best of each size"] = table["best"]
    dashes = ["-"] * len(rates) + ["--"]
    style.cycle_looks(ax, [*style.shades(len(rates)), style.RED], linestyle=dashes)
    for number, (label, chosen) in enumerate(lines.items()):
        # Side by side, so that bars show.
        sizes = table["effective_batch_size"][chosen] * 1.03**number
        style.errorbar(ax, sizes, errors[chosen], label=label, capsize=3)
    ax.set(xscale="log", yscale="log", xlabel="images per update", ylabel="validation error")
    style.fixed_ticks(ax.xaxis, table["effective_batch_size"])
    style.plain_log_ticks(ax.yaxis, "{:g} %", 1, 2, 5)
    style.label_ends(ax)


def plot_noise_scale(ax: Axes, table: pd.DataFrame) -> None:
    """The measurements of `noise_along_training`, and their medians over seeds by optimizer.

    An interval without an upper end reaches to the top of the axis.
    """
    finite = table[["low", "value", "high"]].replace([np.inf, 0.0], np.nan)
    top, bottom = 3000.0, 1.0  # where no end of an interval is known
    if finite[["low", "value"]].notna().any(axis=None):
        top, bottom = 3 * np.nanmax(finite), np.nanmin(finite[["low", "value"]]) / 2
    ax.set(xscale="log", yscale="log", ylim=(bottom, top))
    ax.set(xlabel="updates", ylabel="noise scale (images)")
    known = table.assign(value=table["value"].where(table["value"] < top))
    for number, (optimizer, measured) in enumerate(known.groupby("optimizer")):
        colour, dashes = ((style.GREEN, "-"), (style.PURPLE, "--"))[number]
        x = measured["update"] * 1.06 ** (measured.groupby("seed").ngroup() + number / 2)
        low, high = measured["low"].clip(lower=bottom), measured["high"].clip(upper=top)
        ax.vlines(x, low, high, color=colour, linewidth=1, alpha=0.5)
        ax.plot(x, measured["value"], style.MARKERS[number], color=colour, ms=4, alpha=0.7)
        medians = measured.groupby("update")["value"].median()
        ax.plot(medians, dashes, color=colour, linewidth=2.5, label=str(optimizer))
    style.plain_log_ticks(ax.xaxis, "{:,g}", 1, 3)
    style.plain_log_ticks(ax.yaxis, "{:,g}", 1, 3)
    style.label_ends(ax)


def plot_updates_to_target(
    ax: Axes, fastest: pd.DataFrame, critical: CriticalBatch, missing: Sequence[int] = ()
) -> None:
    """The runs of `fastest_rates` against batch size, the fitted curve, and the three regimes.

    Open dots reached the target in their first epoch: upper bounds. Sizes that are `missing` never
    did.
    """
    sizes = np.array([*fastest["effective_batch_size"], *missing], dtype=float)
    x = np.geomspace(sizes.min() / 2, sizes.max() * 3, 200)
    least, perfect = critical.fewest_updates, critical.fewest_images / x
    ax.plot(x, least + perfect, color=style.PURPLE, label="fit")
    ax.plot(x, np.full_like(x, least), color="0.5", linestyle="--", label="fewest updates")
    # Free space above for the names of the regimes, below for the legend.
    highest = max(fastest["updates"].max(), least + perfect[0])
    ax.set(xscale="log", yscale="log", xlim=(x[0], x[-1]), ylim=(least / 10, 4 * highest))
    ax.set(xlabel="images per update", ylabel="updates to the target")
    style.label_ends(ax)
    ax.plot(x, perfect, color="0.5", linestyle=":", label="perfect scaling")
    for first, runs in fastest.groupby(fastest["epochs"] <= 1):
        fill, label = ("white", "run, at most") if first else (style.GREEN, "run")
        points = runs["effective_batch_size"], runs["updates"]
        ax.plot(*points, "o", color=style.GREEN, mfc=fill, ms=6, label=label)
    along: dict[str, Any] = {"transform": ax.get_xaxis_transform()}  # y is a share of the height
    if missing:
        low = [0.04] * len(missing)
        ax.plot(missing, low, "x", color=style.RED, label="not reached", **along)
    band = max(critical.low, x[0]), min(critical.high, x[-1])
    ax.axvspan(*band, color="0.9", zorder=0, label="critical batch size, 95 %")
    ax.axvline(critical.value, ymax=0.86, color="0.5", linewidth=1)
    borders = regime_borders(critical.value)
    for border in borders:
        ax.axvline(border, color=style.RED, linewidth=1, linestyle="-.")
    edges = np.clip([0, *borders, np.inf], x[0], x[-1])
    for name, (left, right) in zip(REGIMES, pairwise(edges), strict=True):
        if right > left:
            place, text = np.sqrt(left * right), name.replace(" ", "\n")
            ax.text(place, 0.98, text, ha="center", va="top", size=10, **along)
    style.fixed_ticks(ax.xaxis, sizes)
    style.plain_log_ticks(ax.yaxis, "{:,g}", 1, 2, 5)
    named = ax.get_legend_handles_labels()[0][2:]
    ax.legend(handles=named, loc="lower left", frameon=True, framealpha=1, edgecolor="none")
