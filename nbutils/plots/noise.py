"""The noise scale of gradients and the critical batch size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nbutils.analysis.critical_batch import REGIMES, CriticalBatch, regime_borders
from nbutils.plots.style import MARKERS, RED, fixed_ticks, label_ends, plain_log_ticks


def plot_noise_scale(ax: Axes, table: pd.DataFrame) -> None:
    """The noise scale along training: a line through the medians over seeds of each optimizer.

    Marks are measurements with their 95 % intervals, those of different seeds side by side. An
    interval without an upper end reaches to the top of the axis.

    Args:
        ax: Where to draw.
        table: From `nbutils.measure.noise_scale.noise_along_training`.
    """
    finite = table[["low", "value", "high"]].replace([np.inf, 0.0], np.nan)
    top, bottom = 3000.0, 1.0  # where no end of an interval is known
    if finite[["low", "value"]].notna().any(axis=None):
        top, bottom = 3 * np.nanmax(finite), np.nanmin(finite[["low", "value"]]) / 2
    ax.set(xscale="log", yscale="log", ylim=(bottom, top))
    colours = dict(zip(sorted(table["optimizer"].unique()), ("#29af7f", "#440154"), strict=False))
    ends = {}
    for number, (optimizer, colour) in enumerate(colours.items()):
        measured = table[table["optimizer"] == optimizer]
        for place, (_, seed) in enumerate(measured.groupby("seed")):
            value = seed["value"].where(seed["value"] < top)
            low, high = seed["low"].clip(lower=bottom), seed["high"].clip(upper=top)
            x = seed["update"] * 1.06 ** (place + number / 2)
            ax.vlines(x, low, high, color=colour, linewidth=1, alpha=0.5)
            ax.plot(x, value, MARKERS[number], color=colour, ms=4, alpha=0.7)
        medians = measured.groupby("update")["value"].median()
        medians = medians.where(medians < top)
        ax.plot(medians, color=colour, linewidth=2.5, linestyle=["-", "--"][number])
        last = medians.last_valid_index()
        if last is not None:
            ends[str(optimizer)] = (last, medians[last])
    ax.set(xlabel="updates", ylabel="noise scale (images)")
    plain_log_ticks(ax.xaxis, "{:,g}", (1, 3))
    plain_log_ticks(ax.yaxis, "{:,g}", (1, 3))
    label_ends(ax, ends, list(colours.values()))


def plot_updates_to_target(
    ax: Axes, fastest: pd.DataFrame, critical: CriticalBatch, missing: Sequence[int] = ()
) -> None:
    """Updates to a target against batch size, the fitted curve, and the three regimes.

    Dots are runs, open ones those that reached it in their first epoch, where it is an upper
    bound. The shaded band is the 95 % interval of the critical batch size.

    Args:
        ax: Where to draw.
        fastest: From `nbutils.analysis.critical_batch.fastest_rates`, the rows of one optimizer.
        critical: Fitted to them.
        missing: Sizes at which some seed never reached the target at any rate: crosses.
    """
    sizes = np.array(sorted({*fastest["effective_batch_size"], *missing}), dtype=float)
    x = np.geomspace(sizes.min() / 2, sizes.max() * 3, 200)
    least, most = critical.fewest_updates, critical.fewest_images
    fit = least + most / x
    ax.plot(x, fit, color="#440154")
    ax.axhline(least, color="0.5", linestyle="--")
    ax.plot(x, most / x, color="0.5", linestyle=":", label="perfect scaling")
    for name, runs, fill in (
        ("run", fastest[fastest["epochs"] > 1], "#29af7f"),
        ("run, at most", fastest[fastest["epochs"] <= 1], "white"),
    ):
        if len(runs):
            points = runs["effective_batch_size"], runs["updates"]
            ax.plot(*points, "o", color="#29af7f", markerfacecolor=fill, ms=6, label=name)
    # Free space above for the names of the regimes, below for the legend.
    highest = max(fastest["updates"].max(), fit.max())
    ax.set(xscale="log", yscale="log", xlim=(x[0], x[-1]), ylim=(least / 10, 4 * highest))
    ax.set(xlabel="images per update", ylabel="updates to the target")
    along = ax.get_xaxis_transform()
    if len(missing):
        places = list(missing), [0.04] * len(missing)
        ax.plot(*places, "x", color=RED, transform=along, label="not reached")
    band = max(critical.low, x[0]), min(critical.high, x[-1])
    ax.axvspan(*band, color="0.9", zorder=0, label="critical batch size, 95 %")
    ax.axvline(critical.value, ymax=0.86, color="0.5", linewidth=1)
    for border in regime_borders(critical.value):
        ax.axvline(border, color=RED, linewidth=1, linestyle="-.")
    borders = np.clip([x[0], *regime_borders(critical.value), x[-1]], x[0], x[-1])
    for name, left, right in zip(REGIMES, borders, borders[1:], strict=False):
        if right > left:
            place, text = np.sqrt(left * right), name.replace(" ", "\n")
            ax.text(place, 0.98, text, transform=along, ha="center", va="top", size=10)
    fixed_ticks(ax.xaxis, sizes)
    plain_log_ticks(ax.yaxis, "{:,g}", (1, 2, 5))
    label_ends(ax, {"fit": (x[-1], fit[-1]), "fewest updates": (x[-1], least)}, ["#440154", "0.5"])
    ax.legend(loc="lower left", frameon=True, framealpha=1, edgecolor="none")
