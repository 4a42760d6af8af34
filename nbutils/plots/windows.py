"""Pictures of accumulation: the windows of an epoch, and what the gradients of one add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from nbutils.plots.style import RED


def plot_windows(ax: Axes, sizes: Sequence[Sequence[int]], first: int = 3, last: int = 2) -> None:
    """The windows of an epoch: one row of blocks per update, one block per micro-batch.

    A block is as wide as its micro-batch has images, and says how many. Blocks of a size that
    differs from the first one, and the sum of a window that is smaller than the first one, are
    red and hatched. Rows in the middle of a long epoch are left out.

    Args:
        ax: Where to draw; about 0.5 inches high for each row.
        sizes: Images of each micro-batch of each update.
        first: How many updates to draw from the beginning.
        last: How many to draw from the end.
    """
    rows: list[int | None] = list(range(len(sizes)))
    if len(sizes) > first + last:
        rows = [*rows[:first], None, *rows[-last:]]
    usual, whole = sizes[0][0], sum(sizes[0])
    names = []
    for place, update in enumerate(rows):
        if update is None:
            names.append("...")
            left_out = f"{len(sizes) - first - last:,} more updates of {whole:,} images"
            ax.text(whole / 2, place, left_out, ha="center", va="center", color="0.4")
            continue
        names.append(f"update {update + 1:,}")
        left = 0
        for images in sizes[update]:
            odd = images != usual
            face, edge, hatch = ("white", RED, "///") if odd else ("#7fb8c4", "white", None)
            style: dict[str, Any] = {"facecolor": face, "edgecolor": edge, "hatch": hatch}
            ax.add_patch(Rectangle((left, place - 0.38), images, 0.76, linewidth=1.5, **style))
            if images >= whole / 40:
                box = {"facecolor": face, "edgecolor": "none", "pad": 1}
                ax.text(
                    left + images / 2,
                    place,
                    str(images),
                    ha="center",
                    va="center",
                    size=9,
                    bbox=box,
                )
            left += images
        short = left < whole
        text = f" {left:,} images" if len(sizes[update]) > 1 or short else ""
        if odd and images < whole / 40:
            text += f", the last block has {images}"
        ax.text(left, place, text, va="center", color=RED if short else "0.15")
    ax.set(xlim=(0, 1.2 * whole), ylim=(len(rows) - 0.5, -0.5), xlabel="images of one update")
    ax.set_yticks(range(len(rows)), names)
    ax.set_xticks([0, whole])
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)


def plot_gradient_sum(
    axes: Sequence[Axes], micro: ArrayLike, total: ArrayLike, large: ArrayLike
) -> None:
    """What the gradients of micro-batches add up to, beside the gradient of one large batch.

    A gradient is drawn as the small images of its filters: purple is negative, orange positive,
    white zero. Each row has a scale of its own, since the mean is smaller than what it is of.

    Args:
        axes: Two, one above the other, for the micro-batches and for their mean.
        micro: The gradient of the mean loss of each micro-batch, shape (micro-batches, filters,
            channels, height, width); only the first channel is drawn.
        total: The accumulated gradient, shape (filters, channels, height, width).
        large: The gradient of all these images in one batch, the same shape.
    """
    pieces = [np.asarray(gradient) for gradient in np.asarray(micro)]
    mean, whole = np.asarray(total), np.asarray(large)
    apart = float(np.abs(mean - whole).max())
    upper = {f"micro-batch {n}": gradient for n, gradient in enumerate(pieces, start=1)}
    lower = {
        "their mean:\naccumulated": mean,
        "one batch of\nall images": whole,
        f"difference: at most\n{apart / np.abs(whole).max():.0e} of the largest": mean - whole,
    }
    for ax, gradients in zip(axes, (upper, lower), strict=True):
        limit = max(float(np.abs(gradient).max()) for gradient in gradients.values())
        for place, (name, gradient) in enumerate(gradients.items()):
            tiles = _tiles(gradient[:, 0])
            side = max(tiles.shape)
            extent = (1.25 * side * place, 1.25 * side * place + tiles.shape[1], tiles.shape[0], 0)
            ax.imshow(tiles, cmap="PuOr_r", vmin=-limit, vmax=limit, extent=extent)
            ax.text(np.mean(extent[:2]), 1.05 * tiles.shape[0], name, ha="center", va="top", size=9)
        ax.set(xlim=(0, 1.25 * side * len(gradients)), ylim=(1.4 * side, 0))
        ax.set_axis_off()


def _tiles(filters: np.ndarray) -> np.ndarray:
    """One image of all `filters`, shape (n, height, width), about as high as it is wide."""
    columns = int(np.ceil(np.sqrt(len(filters))))
    padded = np.pad(filters, ((0, -len(filters) % columns), (1, 0), (1, 0)))
    rows = [
        np.concatenate(list(row), axis=1) for row in padded.reshape(-1, columns, *padded.shape[1:])
    ]
    return np.pad(np.concatenate(rows), ((0, 1), (0, 1)))
