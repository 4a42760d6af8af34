"""The images themselves: examples, classes, and what networks get wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from nbutils.data.dataset import Dataset, Split
from nbutils.errors import InputError


def plot_digits(ax: Axes, images: Split, class_names: tuple[str, ...], columns: int = 16) -> None:
    """The first images of each class, one row a class."""
    import seaborn as sns

    rows = []
    for label in range(len(class_names)):
        examples = images.images[images.labels == label][:columns, 0]
        rows.append(np.concatenate(list(examples.numpy()), axis=1))
    height = images.images.shape[-2]
    ax.imshow(np.concatenate(rows), cmap="gray_r", interpolation="nearest")
    ax.set_yticks([height * (row + 0.5) for row in range(len(rows))], labels=list(class_names))
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.grid(False)
    sns.despine(ax=ax, left=True, bottom=True)


def plot_class_balance(ax: Axes, data: Dataset) -> None:
    """The share of each class in each split whose classes are known, in percent."""
    import seaborn as sns

    named = {"train": data.train, "validation": data.validation, "test": data.test}
    splits = {f"{name} ({len(split.labels):,} images)": split for name, split in named.items()}
    splits = {name: split for name, split in splits.items() if len(split.labels)}
    table = pd.DataFrame(
        {
            "class": [data.class_names[label] for label in split.labels.tolist()],
            "split": name,
        }
        for name, split in splits.items()
    ).explode("class", ignore_index=True)
    shares = (
        table.groupby("split", sort=False)["class"]
        .value_counts(normalize=True)
        .mul(100)
        .rename("share")
        .reset_index()
    )
    sns.barplot(
        data=shares,
        x="class",
        y="share",
        hue="split",
        hue_order=list(splits),
        order=data.class_names,
        ax=ax,
        palette=["#31688e", "#35b779", "#c8c8c8"][: len(splits)],
    )
    ax.set(xlabel="class", ylabel="share of the images (%)")
    ax.legend(title=None, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.12))


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
