"""Trains on large batches and on the same batches accumulated, side by side, and measures how far
the weights drift apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbutils.accumulation.vectors import flat_gradient, flat_weights, relative_difference
from nbutils.accumulation.window import accumulate_gradient, windows

OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2),
}

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": partial(nn.GroupNorm, 8),
    "none": nn.Identity,
}

Losses = Callable[[nn.Module, Tensor], Tensor]
"""`losses(model, indices)`: the loss of each of these images, shape (len(indices),)."""


def small_cnn(norm: str | Callable[[int], nn.Module], dropout: float = 0.0) -> nn.Module:
    """A network for 28 x 28 images, small enough to train in float64 in seconds.

    Args:
        norm: A key of `NORMS`, or a function that makes a layer for a number of channels.
        dropout: Probability that an input of the last layer is dropped in training.
    """
    make_norm = NORMS[norm] if isinstance(norm, str) else norm
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        make_norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        make_norm(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(16 * 7 * 7, 10),
    )


def cross_entropies(images: Tensor, labels: Tensor) -> Losses:
    """The usual losses of a classifier on `images`."""
    return lambda model, indices: F.cross_entropy(
        model(images[indices]), labels[indices], reduction="none"
    )


@dataclass
class Racer:
    """A copy of the model that takes every window in micro-batches of one size."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch_size: int

    def update(self, window: Tensor, losses: Losses) -> None:
        """Make one update from the images in `window`."""
        self.optimizer.zero_grad()
        accumulate_gradient(
            self.model, window.split(self.batch_size), lambda indices: losses(self.model, indices)
        )
        self.optimizer.step()


def drift(
    model: nn.Module,
    optimizer: str,
    losses: Losses,
    images: int,
    effective_batch_size: int,
    batch_sizes: Sequence[int],
    epochs: int = 1,
    losses_accumulated: Losses | None = None,
) -> pd.DataFrame:
    """Train one copy of `model` on large batches, and one copy for each size of micro-batch.

    Args:
        model: Where all copies start; it is not changed.
        optimizer: A key of `OPTIMIZERS`.
        losses: The loss of each image.
        images: Number of images. All copies see them in the same order, a new one each epoch.
        effective_batch_size: Images per update; the last update of an epoch may have fewer.
        batch_sizes: Sizes of the micro-batches.
        epochs: Passes over the images.
        losses_accumulated: Other losses for the copies that accumulate.

    Returns:
        One row per update and size of micro-batch: `setting` ("8 x 128": steps x images),
        `update` and `epoch` (from 1), `images` in the window, and `gradient` and `weights`: the
        norm of the difference from the copy with large batches, relative to the norm of that
        copy. After the first update gradients are taken at weights that already differ.
    """
    racers = []
    for batch_size in [effective_batch_size, *batch_sizes]:
        mine = copy.deepcopy(model)
        racers.append(Racer(mine, OPTIMIZERS[optimizer](list(mine.parameters())), batch_size))
    large, *others = racers
    rows, update = [], 0
    generator = torch.Generator().manual_seed(0)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(images, generator=generator)
        for (window,) in windows(order, effective_batch_size, accumulation_steps=1):
            update += 1
            large.update(window, losses)
            for other in others:
                other.update(window, losses_accumulated or losses)
                steps = -(-effective_batch_size // other.batch_size)
                rows.append(
                    {
                        "setting": f"{steps} x {other.batch_size}",
                        "update": update,
                        "epoch": epoch,
                        "images": len(window),
                        "gradient": relative_difference(
                            flat_gradient(other.model), flat_gradient(large.model)
                        ),
                        "weights": relative_difference(
                            flat_weights(other.model), flat_weights(large.model)
                        ),
                    }
                )
    return pd.DataFrame(rows)


def ladder(
    models: Mapping[str, nn.Module],
    losses: Losses,
    images: int,
    cuts: Mapping[int, Sequence[int]],
    epochs: int,
) -> pd.DataFrame:
    """`drift` of every model, optimizer and setting, after more and more updates.

    Args:
        models: Where the copies start, by the name of the norm.
        losses: The loss of each image.
        images: Number of images.
        cuts: Sizes of the micro-batches, for each effective batch size.
        epochs: Epochs until the last column.

    Returns:
        One row per norm, optimizer and setting. Columns: the differences of the "first gradient",
        and of the weights after "one update", "one epoch" and "{epochs} epochs".
    """
    rows = {}
    for name, model in models.items():
        for optimizer in OPTIMIZERS:
            for effective_batch_size, batch_sizes in cuts.items():
                table = drift(
                    model, optimizer, losses, images, effective_batch_size, batch_sizes, epochs
                )
                for setting, part in table.groupby("setting", sort=False):
                    rows[name, optimizer, setting] = {
                        "first gradient": part["gradient"].iloc[0],
                        "one update": part["weights"].iloc[0],
                        "one epoch": part["weights"][part["epoch"] == 1].iloc[-1],
                        f"{epochs} epochs": part["weights"].iloc[-1],
                    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(table.index, names=["norm", "optimizer", "setting"])
    return table
