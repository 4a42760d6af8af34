"""The noise scale of gradients and the critical batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nbutils.analysis.critical_batch import REGIMES, CriticalBatch, regime_borders
from nbutils.plots.style import RED, fixed_ticks, plain_log_ticks


def plot_noise_scale(ax: Axes, table: pd.DataFrame) -> None:
    """The noise scale along training, a line a seed with its interval, a colour an optimizer.

    An interval without an upper end reaches to the top of the axis.

    Args:
        ax: Where to draw.
        table: From `nbutils.measure.noise_scale.noise_along_training`.
    """
    finite = table[["low", "value", "high"]].replace([np.inf, 0.0], np.nan)
    top, bottom = 3000.0, 1.0  # where no end of an interval is known
    if finite[["low", "value"]].notna().any(axis=None):
        top, bottom = 3 * np.nanmax(finite), np.nanmin(finite[["low", "value"]]) / 2
    colours = dict(zip(sorted(table["optimizer"].unique()), ("#29af7f", "#440154"), strict=False))
    for (optimizer, seed), group in table.groupby(["optimizer", "seed"]):
        value = group["value"].where(group["value"] < top)
        ax.fill_between(
            group["update"],
            group["low"].clip(lower=bottom),
            group["high"].clip(upper=top),
            color=colours[optimizer],
            alpha=0.12,
        )
        label = optimizer if seed == table["seed"].min() else f"_{optimizer} {seed}"
        ax.plot(group["update"], value, marker="o", ms=4, color=colours[optimizer], label=label)
    ax.set(
        xscale="log",
        yscale="log",
        ylim=(bottom, top),
        xlabel="updates",
        ylabel="noise scale (images)",
    )
    plain_log_ticks(ax.xaxis, "{:,g}", (1, 3))
    plain_log_ticks(ax.yaxis, "{:,g}", (1, 3))
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))


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
    ax.axvspan(max(critical.low, x[0]), min(critical.high, x[-1]), color="0.9", zorder=0)
    ax.axvline(critical.value, color="0.5", linewidth=1)
    ax.plot(x, most / x, color="0.5", linestyle=":", label="perfect scaling")
    ax.axhline(least, color="0.5", linestyle="--", label="fewest updates")
    ax.plot(x, least + most / x, color="#440154", label="fit")
    for name, runs, fill in (
        ("runs", fastest[fastest["epochs"] > 1], "#29af7f"),
        ("at most", fastest[fastest["epochs"] <= 1], "white"),
    ):
        points = runs["effective_batch_size"], runs["updates"]
        label = name if len(runs) else None
        ax.plot(*points, "o", color="#29af7f", markerfacecolor=fill, label=label)
    ax.set(xscale="log", yscale="log", xlim=(x[0], x[-1]))
    ax.set(xlabel="images per update", ylabel="updates to the target")
    if len(missing):
        places = list(missing), [0.04] * len(missing)
        style: dict[str, Any] = {
            "color": RED,
            "linestyle": "",
            "transform": ax.get_xaxis_transform(),
        }
        ax.plot(*places, marker="x", label="not reached", **style)
    for border in regime_borders(critical.value):
        ax.axvline(border, color=RED, linewidth=1, linestyle="-.")
    borders = np.clip([x[0], *regime_borders(critical.value), x[-1]], x[0], x[-1])
    for name, left, right in zip(REGIMES, borders, borders[1:], strict=False):
        if right > left:
            place = np.sqrt(left * right), 0.98
            text = name.replace(" ", "\n")
            ax.text(*place, text, transform=ax.get_xaxis_transform(), ha="center", va="top", size=8)
    fixed_ticks(ax.xaxis, sizes)
    plain_log_ticks(ax.yaxis, "{:,g}", (1, 2, 5))
    ax.legend(title=None, loc="upper left", bbox_to_anchor=(1, 1))
