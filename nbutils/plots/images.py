"""What goes in and what comes out: images, their classes, the network, what it gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle
from numpy.typing import ArrayLike

from nbutils.errors import InputError
from nbutils.plots.style import batch_size_colours

if TYPE_CHECKING:
    from nbutils.data.dataset import Dataset, Split


def plot_digits(ax: Axes, images: Split, class_names: Sequence[str], columns: int = 16) -> None:
    """The first images of each class, one row per class.

    Args:
        ax: Where to draw.
        images: Of which split.
        class_names: The names of its classes.
        columns: Images in a row.
    """
    rows = []
    for label in range(len(class_names)):
        examples = images.images[images.labels == label][:columns, 0]
        rows.append(np.concatenate(list(examples.numpy()), axis=1))
    height = images.images.shape[-2]
    ax.imshow(np.concatenate(rows), cmap="gray_r", interpolation="nearest")
    ax.set_yticks([height * (row + 0.5) for row in range(len(rows))], labels=list(class_names))
    ax.set_xticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def plot_class_balance(ax: Axes, data: Dataset) -> None:
    """The share of each class in each split whose classes are known, in percent.

    Args:
        ax: Where to draw.
        data: All splits.
    """
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    known = {name: split.labels.numpy() for name, split in splits.items() if len(split.labels)}
    classes = np.arange(len(data.class_names))
    width = 0.8 / len(known)
    shades = ("#31688e", "#35b779", "#c8c8c8")
    for number, (name, labels) in enumerate(known.items()):
        shares = 100 * np.bincount(labels, minlength=len(classes)) / len(labels)
        places = classes + width * (number - (len(known) - 1) / 2)
        label = f"{name} ({len(labels):,} images)"
        ax.bar(places, shares, width, color=shades[number], label=label)
    ax.set_xticks(classes, data.class_names)
    ax.grid(axis="x", visible=False)
    ax.set(xlabel="class", ylabel="share of the images (%)")
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))


def plot_network(ax: Axes, layers: pd.DataFrame, image: tuple[int, ...] = (1, 28, 28)) -> None:
    """A network as a drawing: what each layer gives, from the image to the classes.

    Channels are drawn as sheets, one behind the other (not all, where there are many), as wide as
    the image that each holds; the values of a layer without height and width as a column.

    Args:
        ax: Where to draw; about four times as wide as high.
        layers: One row per layer, indexed by its name: `activations` ("16 x 14 x 14": channels,
            height, width) and `weights`, how many it learns.
        image: Channels, height and width of what goes in.
    """
    shapes = [image, *(tuple(map(int, text.split(" x "))) for text in layers["activations"])]
    names = ["image", *map(str, layers.index)]
    weights = ["", *(f"{number:,} weights" for number in layers["weights"])]
    colours = list(batch_size_colours(range(len(shapes))).values())
    left, gap, largest = 0.0, 0.6 * image[-1], image[-1]
    for shape, name, learnt, colour in zip(shapes, names, weights, colours, strict=True):
        side = shape[-1] if len(shape) == 3 else 3
        height = side if len(shape) == 3 else 0.8 * largest
        sheets = min(shape[0], 2 + shape[0] // 8) if len(shape) == 3 else 1
        if left:
            arrow: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 12, "color": "0.4"}
            ax.add_patch(FancyArrowPatch((left - gap, 0), (left - 2, 0), **arrow))
        for sheet in reversed(range(sheets)):
            corner = left + 1.3 * sheet, -height / 2 + 1.3 * sheet
            style: dict[str, Any] = {"facecolor": colour, "edgecolor": "white", "linewidth": 1}
            ax.add_patch(Rectangle(corner, side, height, **style))
        middle = left + side / 2
        ax.text(middle, -0.6 * largest, name, ha="center", va="top", size=11, weight="bold")
        text = " x ".join(map(str, shape)) + f"\n{learnt}"
        ax.text(middle, -0.75 * largest, text, ha="center", va="top", size=10)
        left += side + 1.3 * sheets + gap + 2
    ax.set(xlim=(-0.3 * largest, left), ylim=(-1.15 * largest, 0.95 * largest), aspect="equal")
    ax.set_axis_off()


def plot_misread(
    ax: Axes,
    images: ArrayLike,
    labels: ArrayLike,
    predictions: ArrayLike,
    most: int = 12,
    class_names: Sequence[str] | None = None,
) -> None:
    """The images that most networks get wrong, each with its label and the commonest wrong guess.

    Args:
        ax: Where to draw; about 1.6 inches high for each row of six images.
        images: Shape (n, 1, height, width), or without the 1; dark is high.
        labels: The right class of each, shape (n,).
        predictions: The class that each network gives each image, shape (networks, n).
        most: How many images to draw at most.
        class_names: The names of the classes; their numbers where it is None.

    Raises:
        InputError: The shapes do not fit each other.
    """
    pictures, right, guesses = np.asarray(images), np.asarray(labels), np.asarray(predictions)
    if guesses.ndim != 2 or guesses.shape[1] != len(right) or len(pictures) != len(right):
        raise InputError(
            f"predictions {guesses.shape}, labels {right.shape} and images {pictures.shape} must "
            "have the shapes (networks, n), (n,) and (n, 1, height, width)"
        )
    wrong = (guesses != right).sum(0)
    worst = [int(n) for n in np.argsort(-wrong, kind="stable")[:most] if wrong[n]]
    height, width = pictures.shape[-2:]
    columns = min(6, max(1, len(worst)))
    names = class_names or [
        str(number) for number in range(int(max(right.max(), guesses.max())) + 1)
    ]
    for place, number in enumerate(worst):
        left, top = 1.7 * width * (place % columns), 1.75 * height * (place // columns)
        picture = pictures[number].reshape(height, width)
        ax.imshow(picture, cmap="gray_r", extent=(left, left + width, top + height, top))
        misses, times = np.unique(
            guesses[guesses[:, number] != right[number], number], return_counts=True
        )
        caption = f"{names[right[number]]}, read as {names[misses[times.argmax()]]}\n"
        caption += f"by {times.max()} of {len(guesses)}"
        ax.text(left + width / 2, top + 1.05 * height, caption, ha="center", va="top", size=9)
    rows = -(-len(worst) // columns)
    ax.set(
        xlim=(-0.35 * width, 1.7 * width * columns - 0.35 * width), ylim=(1.75 * height * rows, -2)
    )
    count = int((wrong > len(guesses) / 2).sum())
    ax.set_title(f"{count} of {len(right):,} images are misread by most of {len(guesses)} networks")
    ax.set_axis_off()
