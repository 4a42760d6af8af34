"""Accumulation as a picture: windows, sums of gradients, rounding, and the damage of mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from nbutils.analysis.intervals import mean_interval
from nbutils.plots import style

FIRST, LAST = 3, 2  # updates of an epoch that `plot_windows` draws from its beginning and end


def plot_windows(ax: Axes, sizes: Sequence[Sequence[int]]) -> None:
    """The windows of an epoch: one row of blocks per update, one block per micro-batch.

    Blocks are as wide as their images are many. What differs from the first block, or is less than
    the first window, is red and hatched. The axes should be about 0.5 inches high for each row.
    """
    rows = [(f"update {update:,}", window) for update, window in enumerate(sizes, start=1)]
    usual, whole = sizes[0][0], sum(sizes[0])
    if len(sizes) > FIRST + LAST:
        rows[FIRST:-LAST] = [("...", ())]
        text = f"{len(sizes) - FIRST - LAST:,} more updates of {whole:,} images"
        ax.text(whole / 2, FIRST, text, ha="center", va="center", color="0.4")
    for place, (_, window) in enumerate(rows):
        left, note = 0, ""
        for images in window:
            odd = images != usual
            face, edge, hatch = ("white", style.RED, "///") if odd else ("#7fb8c4", "white", None)
            ax.barh(place, images, 0.76, left, color=face, ec=edge, hatch=hatch, lw=1.5)
            if images < whole / 40:
                note = f", the last block has {images}" if odd else ""
            else:
                middle, box = left + images / 2, {"facecolor": face, "edgecolor": "none", "pad": 1}
                ax.text(middle, place, str(images), ha="center", va="center", size=9, bbox=box)
            left += images
        short = left < whole
        if window and (short or len(window) > 1):
            colour = style.RED if short else "0.15"
            ax.text(left, place, f" {left:,} images{note}", va="center", color=colour)
    ax.set(xlim=(0, 1.2 * whole), ylim=(len(rows) - 0.5, -0.5), xlabel="images of one update")
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.set_xticks([0, whole])
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)


def plot_gradient_sum(
    axes: Sequence[Axes], micro: ArrayLike, total: ArrayLike, large: ArrayLike
) -> None:
    """What the gradients of micro-batches add up to (upper axes), beside that of one large batch.

    Filters are drawn as small images, first channel only: purple is negative, orange positive.
    `micro` are the gradients of the mean loss of each micro-batch, shape (micro-batches, filters,
    channels, height, width), `total` is what they accumulate to, `large` that of one batch.
    """
    mean, whole = np.asarray(total), np.asarray(large)
    difference = mean - whole
    apart = np.abs(difference).max() / np.abs(whole).max()
    upper = {f"micro-batch {n}": piece for n, piece in enumerate(np.asarray(micro), start=1)}
    lower = {
        "their mean:\naccumulated": mean,
        "one batch of\nall images": whole,
        f"difference: at most\n{apart:.0e} of the largest": difference,
    }
    for ax, gradients in zip(axes, (upper, lower), strict=True):
        limit = max(np.abs(gradient).max() for gradient in gradients.values())
        for place, (name, gradient) in enumerate(gradients.items()):
            tiles = _tiles(gradient[:, 0])
            side = max(tiles.shape)
            left, width, height = 1.25 * side * place, tiles.shape[1], tiles.shape[0]
            extent = (left, left + width, height, 0)
            ax.imshow(tiles, cmap="PuOr_r", vmin=-limit, vmax=limit, extent=extent)
            ax.text(left + width / 2, 1.05 * height, name, ha="center", va="top", size=9)
        ax.set(xlim=(0, 1.25 * side * len(gradients)), ylim=(1.4 * side, 0))
        ax.set_axis_off()


def _tiles(filters: np.ndarray) -> np.ndarray:
    """One image of all `filters`, shape (n, height, width), about as high as it is wide."""
    columns = int(np.ceil(np.sqrt(len(filters))))
    padded = np.pad(filters, ((0, -len(filters) % columns), (1, 0), (1, 0)))
    number, height, width = padded.shape
    rows = padded.reshape(-1, columns, height, width).swapaxes(1, 2)
    return np.pad(rows.reshape(number // columns * height, -1), ((0, 1), (0, 1)))


def plot_ladder(ax: Axes, table: pd.DataFrame, limits: Mapping[str, float]) -> None:
    """Differences of each rung of `accumulation.equivalence.ladder`, and the limit of each."""
    by_optimizer = table.groupby("optimizer")
    for number, (optimizer, rows) in enumerate(by_optimizer):
        places = np.arange(len(limits)) + 0.2 * (number - (len(by_optimizer) - 1) / 2)
        look = {"color": style.shades(len(by_optimizer), 1, 0.2)[number], "alpha": 0.7}
        look |= {"marker": style.MARKERS[number], "linestyle": ""}
        label = [optimizer, *[None] * (len(rows) - 1)]
        ax.plot(places, rows[list(limits)].to_numpy(float).T, label=label, **look)
    for place, limit in enumerate(limits.values()):
        name = "_limit" if place else "limit"
        ax.hlines(limit, place - 0.4, place + 0.4, color="0.4", linestyle="--", label=name)
    ax.set_xticks(range(len(limits)), list(limits))
    ax.set(yscale="log", ylabel="relative difference to the large batch")
    style.legend_beside(ax)


def plot_drift(ax: Axes, table: pd.DataFrame) -> None:
    """How the weights of two trainings drift apart: one line per precision and optimizer.

    `table` is from `accumulation.equivalence.drift`, with columns `precision` and `optimizer`.
    """
    precisions, optimizers = list(table["precision"].unique()), list(table["optimizer"].unique())
    for (precision, optimizer), rows in table.groupby(["precision", "optimizer"], sort=False):
        colour = (style.PURPLE, "#2d9e8f", "#8a8a00")[precisions.index(precision)]
        dashes = ("-", "--", ":")[optimizers.index(optimizer)]
        means = rows.groupby("update")["weights"].mean()
        ax.plot(means, dashes, color=colour, label=f"{precision}, {optimizer}", linewidth=2)
    ax.set(yscale="log", xlabel="updates", ylabel="relative difference of the weights")
    style.label_ends(ax)


def plot_damage(axes: Sequence[Axes], damage: pd.DataFrame) -> None:
    """What each wrong loop does to the gradient (left) and to the test error (right).

    `damage` is from `pitfalls.measure_damage`; its first loop, the right one, is red. The test
    error is shown as the difference to that loop with the same start, with its 95 % interval.
    """
    left, right = axes
    loops = damage["loop"].unique()
    errors = 100 * (1 - damage.pivot_table("accuracy", "seed", "loop"))
    differences = errors.sub(errors[loops[0]], axis=0)
    for place, loop in enumerate(loops):
        colour = "#2d708e" if place else style.RED
        gradients = damage.loc[damage["loop"] == loop, "gradient_error"]
        left.plot(gradients, [place] * len(gradients), "o", color=colour, alpha=0.6)
        mean = differences[loop].mean()
        right.hlines(place, *mean_interval(differences[loop].tolist()), color=colour, linewidth=2)
        right.plot(mean, place, "o", color=colour)
        beside = right.get_yaxis_transform()
        right.text(1.01, place, f"{mean:+.1f}", transform=beside, va="center", color=colour)
    right.axvline(0, color="0.4", linestyle="--", zorder=0)
    left.set(xscale="log", xlabel="largest relative error of an update's gradient")
    left.set_title("The gradient")
    left.set_yticks(range(len(loops)), loops)
    right.set_xscale("symlog", linthresh=1, linscale=1)
    right.set_xticks([-10, -1, 0, 1, 10, 90], ["-10", "-1", "0", "+1", "+10", "+90"])
    right.set(xlabel="test error minus the right loop's (points)", title="The test error")
    right.set_yticks(range(len(loops)), [""] * len(loops))
    left.invert_yaxis()
    right.invert_yaxis()
