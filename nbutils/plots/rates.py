"""Batch size and learning rate: the map, its cuts, and the scaling rules."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nbutils.plots.style import MARKERS, RED, fixed_ticks, label_ends, plain_log_ticks


def plot_rate_map(ax: Axes, table: pd.DataFrame) -> None:
    """A map of validation accuracy over batch size and learning rate, both axes logarithmic.

    Cells say the accuracy in percent, or why there is none; bold ones are within noise of the
    best of their size. Colours follow the logarithm of the error, the paler the better.

    Args:
        ax: Where to draw.
        table: From `nbutils.analysis.learning_rate.rate_map`, the rows of one optimizer.
    """
    grid = table.pivot_table(
        index="learning_rate", columns="effective_batch_size", values="validation_accuracy"
    )
    sizes, rates = grid.columns.to_numpy(float), grid.index.to_numpy(float)
    colours, shades = mpl.colormaps["viridis_r"], mpl.colors.LogNorm(0.01, 1)
    edges = _log_edges(sizes), _log_edges(rates)
    errors = 1 - grid.to_numpy()
    ax.pcolormesh(*edges, errors, cmap=colours, norm=shades, edgecolor="white")
    for _, row in table.iterrows():
        shade, learnt = float(shades(1 - row["validation_accuracy"])), row["outcome"] == "learnt"
        # The box hides what is drawn over the map behind the number.
        box = {"facecolor": colours(shade), "edgecolor": "none", "pad": 1.5}
        ax.text(
            row["effective_batch_size"],
            row["learning_rate"],
            f"{100 * row['validation_accuracy']:.1f}" if learnt else row["outcome"],
            color="black" if shade < 0.4 else "white",
            fontsize=10 if learnt else 8,
            fontweight="bold" if row["within_noise"] else "normal",
            ha="center",
            va="center",
            zorder=4,
            bbox=box,
        )
    ax.set(xscale="log", yscale="log", xlabel="images per update", ylabel="learning rate")
    fixed_ticks(ax.xaxis, sizes)
    fixed_ticks(ax.yaxis, rates)
    ax.grid(False)


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
        label = f"{rule} rule"
        ax.plot(x, y, color=RED, linewidth=2, linestyle=styles[str(rule)], label=label)
    ax.plot(
        ridge["effective_batch_size"],
        ridge["loss_rate"],
        "o",
        color=RED,
        markerfacecolor="none",
        mew=2,
        ms=24,
        label="lowest training loss",
    )
    ax.set_ylim(limits)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), labelspacing=0.9)


def plot_fixed_rates(ax: Axes, table: pd.DataFrame, rates: Sequence[float]) -> None:
    """Error against batch size at some fixed rates, and at the best rate of each size.

    Bars are 95 % intervals.

    Args:
        ax: Where to draw.
        table: From `nbutils.analysis.learning_rate.rate_map`, the rows of one optimizer.
        rates: Rates of the table, one line each.
    """
    shades = mpl.colormaps["viridis_r"](np.linspace(0.2, 1, len(rates)))
    lines = [
        (
            np.format_float_positional(rate, trim="-"),
            table[np.isclose(table["learning_rate"], rate)],
            shade,
            "-",
        )
        for rate, shade in zip(sorted(rates), shades, strict=True)
    ]
    lines.append(("best of each size", table[table["best"]], RED, "--"))
    ends = {}
    for number, (label, line, colour, dashes) in enumerate(lines):
        accuracy = line["validation_accuracy"]
        x = line["effective_batch_size"] * 1.03**number  # side by side, so that bars show
        ax.errorbar(
            x,
            100 * (1 - accuracy),
            yerr=100 * np.array([line["high"] - accuracy, accuracy - line["low"]]),
            capsize=3,
            color=colour,
            linestyle=dashes,
            marker=MARKERS[number],
            label=label,
        )
        ends[label] = (x.iloc[-1], 100 * (1 - accuracy.iloc[-1]))
    ax.set(xscale="log", yscale="log", xlabel="images per update", ylabel="validation error")
    fixed_ticks(ax.xaxis, table["effective_batch_size"])
    plain_log_ticks(ax.yaxis, "{:g} %", (1, 2, 5))
    label_ends(ax, ends, [colour for _, _, colour, _ in lines])


def _log_edges(centres: np.ndarray) -> np.ndarray:
    """Borders of cells around `centres`, shape (n,), on a log scale; shape (n + 1,)."""
    logs = np.log(centres)
    steps = np.diff(logs) / 2 if len(logs) > 1 else np.array([0.5])
    inner = logs[:-1] + np.diff(logs) / 2
    return np.exp(np.concatenate([[logs[0] - steps[0]], inner, [logs[-1] + steps[-1]]]))
