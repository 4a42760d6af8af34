"""The images themselves: examples, classes, and what networks get wrong."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nbutils.data.dataset import Dataset, Split


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
