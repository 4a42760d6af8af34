"""What goes in and what comes out: images, their classes, the network, what it gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from nbutils.plots import style

if TYPE_CHECKING:
    from nbutils.data.dataset import Dataset, Split

MISREAD = 12  # images that `plot_misread` draws at most


def plot_digits(ax: Axes, images: Split, class_names: Sequence[str], columns: int = 16) -> None:
    """The first images of each class, one row per class."""
    classes = range(len(class_names))
    rows = [images.images[images.labels == label][:columns, 0].numpy() for label in classes]
    ax.imshow(np.block([list(row) for row in rows]), cmap="gray_r", interpolation="nearest")
    height = images.images.shape[-2]
    ax.set_yticks([height * (row + 0.5) for row in classes], labels=list(class_names))
    ax.set_xticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def plot_class_balance(ax: Axes, data: Dataset) -> None:
    """The share of each class in each split whose classes are known, in percent."""
    shares = {}
    for name in ("train", "validation", "test"):
        labels = getattr(data, name).labels.numpy()
        if len(labels):
            counts = np.bincount(labels, minlength=len(data.class_names))
            shares[f"{name} ({len(labels):,} images)"] = 100 * counts / len(labels)
    colours: Any = ["#31688e", "#35b779", "#c8c8c8"]
    pd.DataFrame(shares, data.class_names).plot.bar(ax=ax, width=0.8, rot=0, color=colours)
    ax.grid(axis="x", visible=False)
    ax.set(xlabel="class", ylabel="share of the images (%)")
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))


def plot_network(ax: Axes, layers: pd.DataFrame) -> None:
    """What each layer of a network gives, from the image to the classes.

    `layers` are rows by name: `activations` ("16 x 14 x 14", drawn as some sheets, or "10", as a
    column) and the number of `weights`. The axes should be four times as wide as high.
    """
    side, left, gap = 28, 0.0, 16.8
    parts = [("image", f"1 x {side} x {side}", "")]
    for name, shape, number in layers[["activations", "weights"]].itertuples():
        parts.append((name, shape, f"{number:,} weights"))
    for (name, shape, weights), colour in zip(parts, style.shades(len(parts)), strict=True):
        width, height, sheets = 3.0, 0.8 * side, 1
        channels, *area = map(int, shape.split(" x "))
        if area:
            width = height = area[-1]
            sheets = min(channels, 2 + channels // 8)
        if left:
            arrow = {"arrowstyle": "-|>", "mutation_scale": 12, "color": "0.4"}
            ax.annotate("", (left - 2, 0), (left - gap, 0), arrowprops=arrow)
        for sheet in reversed(range(sheets)):
            corner = left + 1.3 * sheet, -height / 2 + 1.3 * sheet
            ax.add_patch(Rectangle(corner, width, height, facecolor=colour, edgecolor="white"))
        look: dict[str, Any] = {"ha": "center", "va": "top"}
        ax.text(left + width / 2, -0.6 * side, name, size=11, weight="bold", **look)
        ax.text(left + width / 2, -0.75 * side, f"{shape}\n{weights}", size=10, **look)
        left += width + 1.3 * sheets + gap + 2
    ax.set(xlim=(-0.3 * side, left), ylim=(-1.15 * side, 0.95 * side), aspect="equal")
    ax.set_axis_off()


def plot_misread(
    ax: Axes,
    images: ArrayLike,
    labels: ArrayLike,
    predictions: ArrayLike,
    class_names: Sequence[str] = "0123456789",
) -> None:
    """The `MISREAD` images that most networks get wrong, with label and commonest wrong guess.

    Shapes: `images` (n, 1, height, width), dark is high; `labels` (n,); `predictions` (networks,
    n). Rows of six images should be 1.6 inches high.
    """
    pictures, right, guesses = np.asarray(images), np.asarray(labels), np.asarray(predictions)
    times_wrong = (guesses != right).sum(0)
    worst = [n for n in np.argsort(-times_wrong, kind="stable")[:MISREAD] if times_wrong[n]]
    height, width = pictures.shape[-2:]
    columns = min(6, max(1, len(worst)))
    for place, number in enumerate(worst):
        left, top = 1.7 * width * (place % columns), 1.75 * height * (place // columns)
        extent = (left, left + width, top + height, top)
        ax.imshow(pictures[number, 0], cmap="gray_r", extent=extent)
        label, guessed = int(right[number]), guesses[:, number]
        times = np.bincount(guessed[guessed != label])
        caption = f"{class_names[label]}, read as {class_names[int(times.argmax())]}\n"
        caption += f"by {times.max()} of {len(guesses)}"
        ax.text(left + width / 2, top + 1.05 * height, caption, ha="center", va="top", size=9)
    rows, gap = -(-len(worst) // columns), 0.35 * width
    ax.set(xlim=(-gap, 1.7 * width * columns - gap), ylim=(1.75 * height * rows, -2))
    count = int((times_wrong > len(guesses) / 2).sum())
    ax.set_title(f"{count} of {len(right):,} images are misread by most of {len(guesses)} networks")
    ax.set_axis_off()
