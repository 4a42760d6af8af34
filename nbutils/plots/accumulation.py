"""How far accumulation is from the large batch: rounding, drift, and the damage of mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nbutils.analysis.intervals import mean_interval
from nbutils.plots.style import MARKERS, label_ends


def plot_ladder(ax: Axes, table: pd.DataFrame, limits: Mapping[str, float]) -> None:
    """Differences of each rung on a log axis, and the limit that each must stay below.

    Args:
        ax: Where to draw.
        table: From `nbutils.accumulation.equivalence.ladder`; one mark per row and rung.
        limits: The limit of each rung.
    """
    by_optimizer = table.reset_index().groupby("optimizer")
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.8, len(by_optimizer)))
    for number, (optimizer, rows) in enumerate(by_optimizer):
        places = np.arange(len(limits)) + 0.2 * (number - (len(by_optimizer) - 1) / 2)
        values = rows[list(limits)].to_numpy(float)
        style = {"marker": MARKERS[number], "color": shades[number], "alpha": 0.7}
        ax.plot(
            np.tile(places, len(values)), values.ravel(), linestyle="", label=optimizer, **style
        )
    for place, limit in enumerate(limits.values()):
        name = "limit" if place == 0 else "_limit"
        ax.hlines(limit, place - 0.4, place + 0.4, color="0.4", linestyle="--", label=name)
    ax.set_xticks(range(len(limits)), list(limits))
    ax.set(yscale="log", ylabel="relative difference to the large batch")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))


def plot_drift(ax: Axes, table: pd.DataFrame) -> None:
    """How the weights of two trainings drift apart: one line per precision and optimizer.

    Args:
        ax: Where to draw.
        table: From `equivalence.drift`, with columns `precision` and `optimizer`; where it has
            several rows per update, their mean is drawn.
    """
    ax.set(yscale="log", xlabel="updates", ylabel="relative difference of the weights")
    shades = dict(zip(table["precision"].unique(), ("#440154", "#2d9e8f", "#8a8a00"), strict=False))
    dashes = dict(zip(table["optimizer"].unique(), ("-", "--", ":"), strict=False))
    ends, colours = {}, []
    for (precision, optimizer), rows in table.groupby(["precision", "optimizer"], sort=False):
        line = rows.groupby("update")["weights"].mean()
        ax.plot(line, color=shades[precision], linestyle=dashes[optimizer], linewidth=2)
        ends[f"{precision}, {optimizer}"] = (line.index[-1], line.iloc[-1])
        colours.append(shades[precision])
    label_ends(ax, ends, colours)


def plot_damage(axes: Sequence[Axes], damage: pd.DataFrame) -> None:
    """What each wrong loop does to the gradient (left) and to the test error (right).

    The right loop is drawn in another colour. Errors of the gradient are on a log axis, one dot
    per seed. The test error is shown as the difference to the right loop with the same start, in
    points, with its mean and 95 % interval; beyond 1 point the axis is logarithmic.

    Args:
        axes: Two, side by side.
        damage: From `pitfalls.measure_damage`; its first loop is the right one.
    """
    loops = list(damage["loop"].unique())
    colours = ["#d1495b"] + ["#2d708e"] * (len(loops) - 1)
    left, right = axes
    errors = 100 * (1 - damage.pivot_table("accuracy", "seed", "loop"))
    for place, (loop, colour) in enumerate(zip(loops, colours, strict=True)):
        gradients = damage.loc[damage["loop"] == loop, "gradient_error"]
        left.plot(gradients, [place] * len(gradients), "o", color=colour, alpha=0.6)
        differences = (errors[loop] - errors[loops[0]]).tolist()
        mean = float(np.mean(differences))
        right.hlines(place, *mean_interval(differences), color=colour, linewidth=2)
        right.plot(mean, place, "o", color=colour)
        right.annotate(
            f"{mean:+.1f}",
            (1, place),
            xycoords=("axes fraction", "data"),
            va="center",
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
        )
    right.axvline(0, color="0.4", linestyle="--", zorder=0)
    left.set(xscale="log", xlabel="largest relative error of an update's gradient")
    left.set_title("The gradient")
    left.set_yticks(range(len(loops)), loops)
    right.set_xscale("symlog", linthresh=1, linscale=1)
    right.set_xticks([-10, -1, 0, 1, 10, 90], ["-10", "-1", "0", "+1", "+10", "+90"])
    right.set(xlabel="test error less the right loop's (points)", title="The test error")
    right.set_yticks(range(len(loops)), [""] * len(loops))
    for ax in axes:
        ax.invert_yaxis()
