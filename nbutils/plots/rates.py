"""Batch size and learning rate: the map, its cuts, and the scaling rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from nbutils.plots.style import RED, fixed_ticks, plain_log_ticks


def plot_rate_map(ax: Axes, table: pd.DataFrame) -> None:
    """A heat map of validation accuracy over batch size and learning rate, both axes log.

    Cells say the accuracy in percent, or why there is none; bold ones are within noise of the
    best of their size. Colours follow the logarithm of the error.

    Args:
        ax: Where to draw.
        table: From `nbutils.analysis.learning_rate.rate_map`, the rows of one optimizer.
    """
    grid = table.pivot_table(
        index="learning_rate", columns="effective_batch_size", values="validation_accuracy"
    )
    sizes, rates = grid.columns.to_numpy(float), grid.index.to_numpy(float)
    colours, shades = mpl.colormaps["viridis"], mpl.colors.LogNorm(0.01, 1)
    ax.pcolormesh(
        _log_edges(sizes),
        _log_edges(rates),
        1 - grid.to_numpy(),
        cmap=colours.reversed(),
        norm=shades,
        edgecolor="white",
    )
    for _, row in table.iterrows():
        accuracy, learnt = row["validation_accuracy"], row["outcome"] == "learnt"
        ax.text(
            row["effective_batch_size"],
            row["learning_rate"],
            f"{100 * accuracy:.1f}" if learnt else row["outcome"],
            color="black" if shades(1 - accuracy) < 0.4 else "white",
            fontsize=9 if learnt else 7,
            fontweight="bold" if row["within_noise"] else "normal",
            ha="center",
            va="center",
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    fixed_ticks(ax.xaxis, sizes)
    ax.yaxis.set_major_locator(FixedLocator(list(rates)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(False)
    ax.set(xlabel="images per update", ylabel="learning rate")


def plot_scaling_rules(ax: Axes, ridge: pd.DataFrame, rules: pd.DataFrame) -> None:
    """The rates of lowest training loss, and those of each rule, over `plot_rate_map`.

    Args:
        ax: Where a map was drawn; its limits stay.
        ridge: From `nbutils.analysis.learning_rate.ridge`, the rows of one optimizer.
        rules: From `nbutils.analysis.learning_rate.scaling_rules`, the same.
    """
    limits = ax.get_ylim()
    styles = {"linear": "-", "square root": "--"}
    for rule, line in rules.groupby("rule"):
        x, y = line["effective_batch_size"], line["learning_rate"]
        ax.plot(x, y, color="white", linewidth=5, alpha=0.6)
        ax.plot(x, y, color=RED, linewidth=2, linestyle=styles[str(rule)], label=rule)
    points = ridge["effective_batch_size"], ridge["loss_rate"]
    label = "lowest training loss"
    ax.plot(*points, "o", color=RED, markerfacecolor="none", mew=2, ms=20, label=label)
    ax.set_ylim(limits)
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))


def plot_fixed_rates(ax: Axes, table: pd.DataFrame, rates: Sequence[float]) -> None:
    """Error against batch size: the map cut at some heights, and at each size's best rate.

    Bars are 95 % intervals.

    Args:
        ax: Where to draw.
        table: From `nbutils.analysis.learning_rate.rate_map`, the rows of one optimizer.
        rates: Where to cut; rates of the table.
    """
    shades = mpl.colormaps["viridis_r"](np.linspace(0.2, 1, len(rates)))
    cuts = [
        (f"{rate:g}", table[np.isclose(table["learning_rate"], rate)], shade, "-")
        for rate, shade in zip(sorted(rates), shades, strict=True)
    ]
    for label, cut, colour, line in [*cuts, ("best of each size", table[table["best"]], RED, "--")]:
        accuracy = cut["validation_accuracy"]
        ends = 100 * np.array([cut["high"] - accuracy, accuracy - cut["low"]])
        x, y = cut["effective_batch_size"], 100 * (1 - accuracy)
        style: dict[str, Any] = {"marker": "o", "color": colour, "linestyle": line}
        ax.errorbar(x, y, yerr=ends, capsize=3, label=label, **style)
    ax.set(xscale="log", yscale="log", xlabel="images per update", ylabel="validation error")
    fixed_ticks(ax.xaxis, table["effective_batch_size"])
    plain_log_ticks(ax.yaxis, "{:g} %", (1, 2, 5))
    ax.legend(title="learning rate", loc="upper left", bbox_to_anchor=(1, 1))


def _log_edges(centres: np.ndarray) -> np.ndarray:
    """Borders of cells around `centres`, shape (n,), on a log scale; shape (n + 1,)."""
    logs = np.log(centres)
    steps = np.diff(logs) / 2 if len(logs) > 1 else np.array([0.5])
    inner = logs[:-1] + np.diff(logs) / 2
    return np.exp(np.concatenate([[logs[0] - steps[0]], inner, [logs[-1] + steps[-1]]]))
