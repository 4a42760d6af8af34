"""Accumulation: windows, sums of gradients, rounding, the damage of mistakes, and what it costs."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from nbutils.analysis.intervals import mean_interval
from nbutils.plots import style

FIRST, LAST = 3, 2  # updates of an epoch that `plot_windows` draws from its beginning and end

COSTS = {
    "peak_memory": ("peak memory (MB)", 1e-6),
    "seconds_per_update": ("seconds per update", 1.0),
    "images_per_second": ("images per second", 1.0),
}
"""Columns of `nbutils.measure.cost.measure_grid`: their names, and the factors to their units."""


def plot_windows(ax: Axes, sizes: Sequence[Sequence[int]]) -> None:
    """The windows of an epoch: one row of blocks per update, one block per micro-batch.

    What is not as large as the first is red and hatched. A row should be about 0.5 inches high.
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
            if images >= whole / 40:
                middle, box = left + images / 2, {"facecolor": face, "edgecolor": "none", "pad": 1}
                ax.text(middle, place, str(images), ha="center", va="center", size=9, bbox=box)
            elif odd:
                note = f", the last block has {images}"
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
    """Gradients of micro-batches (upper axes), their sum, and that of one large batch (lower axes).

    Filters are drawn as small images, first channel only: purple is negative, orange positive.
    `micro` are of the mean loss of each micro-batch, shape (micro-batches, filters, channels,
    height, width); `total` is what they accumulate to.
    """
    mean, whole = np.asarray(total), np.asarray(large)
    apart = np.abs(mean - whole).max() / np.abs(whole).max()
    upper = {f"micro-batch {n}": piece for n, piece in enumerate(np.asarray(micro), start=1)}
    lower = {
        "their mean:\naccumulated": mean,
        "one batch of\nall images": whole,
        f"difference: at most\n{apart:.0e} of the largest": mean - whole,
    }
    for ax, gradients in zip(axes, (upper, lower), strict=True):
        limit = max(np.abs(gradient).max() for gradient in gradients.values())
        for place, (name, gradient) in enumerate(gradients.items()):
            tiles = _tiles(gradient[:, 0])
            (height, width), side = tiles.shape, max(tiles.shape)
            left = 1.25 * side * place
            extent = (left, left + width, height, 0)
            ax.imshow(tiles, cmap="PuOr_r", vmin=-limit, vmax=limit, extent=extent)
            ax.text(left + width / 2, 1.05 * height, name, ha="center", va="top", size=9)
        ax.set(xlim=(0, 1.25 * side * len(gradients)), ylim=(1.4 * side, 0))
        ax.set_axis_off()


def _tiles(filters: np.ndarray) -> np.ndarray:
    """One image of all `filters`, shape (n, height, width), about as high as it is wide."""
    columns = int(np.ceil(np.sqrt(len(filters))))
    padded = np.pad(filters, ((0, -len(filters) % columns), (1, 0), (1, 0)))
    rows = np.split(padded, len(padded) // columns)
    return np.pad(np.block([list(row) for row in rows]), (0, 1))


def plot_ladder(ax: Axes, table: pd.DataFrame, limits: Mapping[str, float]) -> None:
    """Differences of each rung of `accumulation.equivalence.ladder`, and the limit of each."""
    by_optimizer, places = table.groupby("optimizer"), np.arange(len(limits))
    style.cycle_looks(ax, style.shades(len(by_optimizer), 1, 0.2))
    for number, (optimizer, rows) in enumerate(by_optimizer):
        beside = places + 0.2 * (number - (len(by_optimizer) - 1) / 2)
        differences = rows[list(limits)].to_numpy(float).ravel()
        ax.plot(np.tile(beside, len(rows)), differences, ls="", alpha=0.7, label=optimizer)
    ends = places - 0.4, places + 0.4
    ax.hlines(list(limits.values()), *ends, color="0.4", linestyle="--", label="limit")
    ax.set_xticks(places, list(limits))
    ax.set(yscale="log", ylabel="relative difference to the large batch")
    style.legend_beside(ax)


def plot_drift(ax: Axes, table: pd.DataFrame) -> None:
    """How weights drift apart in `equivalence.drift`, with columns `precision` and `optimizer`."""
    dashes = ["-", "--", ":"][: table["optimizer"].nunique()]
    ax.set_prop_cycle(cycler(color=[style.PURPLE, "#2d9e8f", "#8a8a00"]) * cycler(linestyle=dashes))
    for (precision, optimizer), rows in table.groupby(["precision", "optimizer"], sort=False):
        means = rows.groupby("update")["weights"].mean()
        ax.plot(means, label=f"{precision}, {optimizer}", linewidth=2)
    ax.set(yscale="log", xlabel="updates", ylabel="relative difference of the weights")
    style.label_ends(ax)


def plot_damage(axes: Sequence[Axes], damage: pd.DataFrame) -> None:
    """What each wrong loop of `pitfalls.measure_damage` does to the gradient and the test error.

    The first loop, the right one, is red. Test errors are differences to it with the same start.
    """
    left, right = axes
    errors = 100 * (1 - damage.pivot_table("accuracy", "seed", "loop", sort=False))
    differences = errors.sub(errors.iloc[:, 0], axis=0)
    for place, (loop, difference) in enumerate(differences.items()):
        colour = style.BLUE if place else style.RED
        gradients = damage.loc[damage["loop"] == loop, "gradient_error"]
        left.plot(gradients, [place] * len(gradients), "o", color=colour, alpha=0.6)
        mean, beside = difference.mean(), right.get_yaxis_transform()
        right.hlines(place, *mean_interval(difference.tolist()), color=colour, linewidth=2)
        right.plot(mean, place, "o", color=colour)
        right.text(1.01, place, f"{mean:+.1f}", transform=beside, va="center", color=colour)
    right.axvline(0, color="0.4", linestyle="--", zorder=0)
    left.set(xscale="log", xlabel="largest relative error of an update's gradient")
    left.set_title("The gradient")
    right.set_xscale("symlog", linthresh=1, linscale=1)
    right.set_xticks([-10, -1, 0, 1, 10, 90], ["-10", "-1", "0", "+1", "+10", "+90"])
    right.set(xlabel="test error minus the right loop's (points)", title="The test error")
    for ax, names in ((left, differences.columns), (right, [""] * differences.shape[1])):
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()


def plot_cost_map(ax: Axes, table: pd.DataFrame, column: str) -> None:
    """The medians of one of `COSTS` over batch size and accumulation steps."""
    import seaborn as sns  # takes over a second

    name, factor = COSTS[column]
    medians = factor * table.pivot_table(
        index="accumulation_steps", columns="batch_size", values=column, aggfunc="median"
    )
    look = {"cmap": "viridis_r", "norm": mpl.colors.LogNorm(), "linewidths": 1, "cbar": False}
    written = medians.map(lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}")
    sns.heatmap(medians, annot=written, fmt="", annot_kws={"size": 10}, ax=ax, **look)
    ax.invert_yaxis()
    ax.grid(False)
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel="micro-batch (images)", ylabel="accumulation steps", title=name)


def plot_cost(ax: Axes, table: pd.DataFrame, column: str) -> None:
    """One of `COSTS` against images per update: a line in one pass (thick) and per micro-batch.

    Points are medians, bars reach from the lowest to the highest measurement.
    """
    name, factor = COSTS[column]
    sizes = ["batch_size", "accumulation_steps", "effective_batch_size"]
    costs = (factor * table.set_index(sizes)[column]).groupby(sizes)
    points = costs.agg(value="median", low="min", high="max").dropna().reset_index()
    whole = points["accumulation_steps"] == 1
    lines = {"the whole batch": points[whole]}
    for size in sorted(points["batch_size"][~whole].unique()):
        lines[f"passes of {size}"] = points[points["batch_size"] == size]
    style.cycle_looks(ax, ["0.25", *style.shades(len(lines) - 1)])
    for number, (label, line) in enumerate(lines.items()):
        x = line["effective_batch_size"] * 1.025**number  # side by side, so that bars show
        look = {"linestyle": "--", "linewidth": 1.5} if number else {"linewidth": 3}
        style.errorbar(ax, x, line, label=label, elinewidth=1, **look)
    if column == "images_per_second":
        ax.set_ylim(0)
    else:
        ax.set_yscale("log")
        style.plain_log_ticks(ax.yaxis, "{:,g}", 1, 2, 5)
    ax.set(xscale="log", xlabel="images per update", ylabel=name)
    style.fixed_ticks(ax.xaxis, points["effective_batch_size"])
    style.label_ends(ax)


def plot_search(ax: Axes, tried: Mapping[int, int | None], limit: int) -> None:
    """The peaks (bytes) of the sizes that `largest_batch_size` tried, numbered, and the limit.

    None, where memory ran out, is not drawn.
    """
    name, factor = COSTS["peak_memory"]
    ax.axhline(limit * factor, color="0.4", linestyle="--", label="limit")
    for number, (size, peak) in enumerate(tried.items(), start=1):
        if peak is not None:
            mark, colour = ("o", style.BLUE) if peak <= limit else ("x", style.RED)
            ax.plot(size, peak * factor, mark, color=colour, ms=8)
            ax.annotate(f"{number}", (size, peak * factor), (6, -9), textcoords="offset points")
    ax.set(xlabel="micro-batch (images)", ylabel=name)
    style.label_ends(ax)
