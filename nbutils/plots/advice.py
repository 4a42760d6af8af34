"""The measurements and the race behind an advice."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nbutils.plots import style
from nbutils.plots.style import GREEN, PURPLE, RED

FLOOR = 1e-3  # of the largest loss: lower ones are drawn there


def plot_race(ax: Axes, race: pd.DataFrame, advised: str, usual: str) -> None:
    """Validation loss against seconds of training, of `Advice.race` as a table.

    Thin lines are further starts of `advised` and `usual`, the names of two settings.
    """
    dashes = iter(("--", ":", "-."))
    trained = race[race["seconds"] > 0]
    loss = trained["validation_loss"].astype(float)
    # A loss of 0, or nearly, would leave the log scale or stretch it.
    trained = trained.assign(validation_loss=loss.clip(lower=FLOOR * loss.max()))
    for name, of_setting in trained.groupby("setting", sort=False):
        roles = {"advised": advised, "usual": usual}
        held = [role for role, setting in roles.items() if setting == name]
        look: dict[str, Any] = {"color": "0.6", "linewidth": 1.2, "label": name, "zorder": 2}
        if held:
            look = {"color": PURPLE if name == advised else RED, "linewidth": 2.5}
            look |= {"label": f"{name} ({', '.join(held)})", "zorder": 2 + len(held)}
        look["linestyle"] = "-" if held else next(dashes)
        for start, points in of_setting.groupby("start"):
            if start:
                look |= {"linewidth": 1.2, "alpha": 0.5, "label": None}
            ax.plot(points["seconds"], points["validation_loss"], **look)
    ax.set(yscale="log", xlabel="seconds of training", ylabel="validation loss")
    ax.set_title("The race: the lowest smoothed loss wins")
    low = trained["validation_loss"].min()
    first = trained.groupby(["setting", "start"])["validation_loss"].first().max()
    if 0 < low < first:
        ax.set_ylim(low * 0.9, first * 1.05)
        style.fixed_ticks(ax.yaxis, _round_ticks(low, first))
    style.legend_beside(ax, title="images per update, rate")


def plot_sizes(axes: Sequence[Axes], costs: pd.DataFrame, advised: int, noun: str) -> None:
    """Speed, memory, and the time to get equally far, of `Advice.costs`, on three axes.

    `noun` names the examples. Bars reach down to the slowest measurement.
    """
    memory = costs["peak_memory"] / 1e6
    speed = costs["images_per_second"]
    costs = costs.assign(memory=memory, value=speed, low=costs["slowest"], high=speed)
    for accumulated, part in costs.groupby(costs["accumulation_steps"] > 1):
        size = part["effective_batch_size"]
        look: dict[str, Any] = {"color": PURPLE, "ls": "-", "label": "one micro-batch"}
        if accumulated:
            look = {"color": GREEN, "ls": "--", "label": "accumulated"}
        style.errorbar(axes[0], size, part, fmt="o", **look)
        axes[1].plot(size, part["memory"], "o", **look)
        axes[2].plot(size, part["relative_time"], "o", **look)
    axes[0].set(ylabel=f"{noun} per second", ylim=(0, None), title="Speed")
    axes[1].set(ylabel="peak memory (MB)", yscale="log", title="Memory")
    axes[2].set(ylabel="time, advised = 1", ylim=(0, None), title="Time to get equally far")
    style.fixed_ticks(axes[1].yaxis, _round_ticks(memory.min(), memory.max()))
    sizes = sorted(costs["effective_batch_size"].unique())
    for ax in axes:
        ax.set(xscale="log", xlabel=f"{noun} per update")
        ax.axvline(advised, color="0.5", linestyle=":", label="advised")
        style.fixed_ticks(ax.xaxis, sizes[::2] if len(sizes) > 6 else sizes)
    style.legend_beside(axes[2])


def plot_rates(ax: Axes, rates: pd.DataFrame, advised: float, rates_at: int, same: bool) -> None:
    """Validation loss after equally many updates at each rate of `Advice.rates`, with intervals.

    They were tried at `rates_at` examples per update; is that the `same` as is advised?
    """
    rates = rates.rename(columns={"validation_loss": "value"})
    rates = rates.astype({"value": float, "low": float, "high": float})
    diverged = rates["outcome"] == "diverged"
    learnt, best = rates[~diverged], rates[~diverged & rates["best"]]
    style.errorbar(ax, learnt["learning_rate"], learnt, fmt="o-", color=PURPLE, capsize=4)
    ring: dict[str, Any] = {"mfc": "none", "color": GREEN, "ms": 12, "label": "lowest here"}
    ax.plot(best["learning_rate"], best["value"], "o", **ring)
    where = "advised" if same else "advised, at another size"
    ax.axvline(advised, color="0.5", linestyle=":", label=where)
    top = 1.1 * learnt["high"].max()
    if diverged.any():
        at = rates["learning_rate"][diverged]
        ax.plot(at, [top] * len(at), "x", color=RED, ms=9, clip_on=False, label="diverged")
    ax.set(xscale="log", xlabel="learning rate", ylabel="validation loss")
    ax.set_ylim(min(0.0, 1.1 * learnt["low"].min()), 1.05 * top)
    ax.set_title(f"Learning rates at {rates_at} per update")
    style.legend_beside(ax)


def plot_noise(ax: Axes, noise: pd.DataFrame, noun: str) -> None:
    """The noise scale along a short training, of `Advice.noise`, with its 95 % interval."""
    ends = noise[["low", "value", "high"]].astype(float)
    top, bottom = 3 * np.nanmax(ends), max(1.0, ends["low"].min() / 2)
    low, high = ends["low"].clip(lower=bottom), ends["high"].fillna(top)
    ax.fill_between(noise["update"], low, high, color=PURPLE, alpha=0.15)
    ax.plot(noise["update"], ends["value"], "o-", color=PURPLE)
    ax.set(yscale="log", ylim=(bottom, top), xlabel="updates", title="Noise scale")
    ax.set_ylabel(f"noise scale ({noun})")
    style.fixed_ticks(ax.xaxis, noise["update"])
    style.plain_log_ticks(ax.yaxis, "{:g}", 1, 3)


def _round_ticks(low: float, high: float) -> list[float]:
    """Five ticks or fewer for a logarithmic axis, of one digit."""
    return [float(f"{tick:.1g}") for tick in np.geomspace(low, high, 5)]
