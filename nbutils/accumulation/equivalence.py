"""Trains on large batches and on the same batches accumulated, side by side, and measures how far
the weights drift apart."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from nbutils.accumulation.vectors import flat_gradient, relative_difference
from nbutils.accumulation.window import accumulate_gradient

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}
NORMS: dict[str, Any] = {
    "batch": nn.BatchNorm2d,
    "group": partial(nn.GroupNorm, 8),
    "none": nn.Identity,
}

Losses = Callable[[nn.Module, Tensor], Tensor]
"""`losses(model, indices)`: the loss of each of these images, shape (len(indices),)."""


def small_cnn(norm: str | Callable[[int], nn.Module]) -> nn.Module:
    """A network for 28 x 28 images, small enough to train in float64 in seconds.

    `norm` is "batch", "group" or "none", or makes a layer for a number of channels.
    """
    make_norm: Callable[[int], nn.Module] = NORMS[norm] if isinstance(norm, str) else norm
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        make_norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        make_norm(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.0),  # notebook 05 puts its own in its place
        nn.Linear(16 * 7 * 7, 10),
    )


def cross_entropies(images: Tensor, labels: Tensor) -> Losses:
    """The usual losses of a classifier on `images`."""
    return lambda model, indices: F.cross_entropy(
        model(images[indices]), labels[indices], reduction="none"
    )


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

    All copies see the images in the same order, a new one each epoch; the last update of an epoch
    may have fewer. Copies that accumulate may have other losses.

    Returns one row per update and size of micro-batch: `setting` ("8 x 128": steps x images),
    `update` and `epoch` (from 1), `images` in the window, and `gradient` and `weights`: the norm of
    the difference from the copy with large batches, relative to that copy's. After the first update
    gradients are taken at weights that already differ.
    """

    def training(size: int, losses: Losses) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """The epoch, images and gradient of each update, and the weights after it."""
        twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
        stepped = OPTIMIZERS[optimizer](twin.parameters())
        for epoch in range(1, epochs + 1):
            order = torch.randperm(images, generator=generator)
            for window in order.split(effective_batch_size):
                stepped.zero_grad()
                accumulate_gradient(twin, window.split(size), partial(losses, twin))
                stepped.step()
                weights = parameters_to_vector(twin.parameters()).detach()
                yield epoch, len(window), flat_gradient(twin), weights

    large = training(effective_batch_size, losses)
    small = [training(size, losses_accumulated or losses) for size in batch_sizes]
    rows = []
    for update, (true, *others) in enumerate(zip(large, *small, strict=True), start=1):
        for size, other in zip(batch_sizes, others, strict=True):
            setting = f"{-(-effective_batch_size // size)} x {size}"
            apart, drifted = map(relative_difference, other[2:], true[2:])
            rows.append((setting, update, *true[:2], apart, drifted))
    columns = ["setting", "update", "epoch", "images", "gradient", "weights"]
    return pd.DataFrame(rows, columns=columns)


def ladder(
    models: Mapping[str, nn.Module],
    losses: Losses,
    images: int,
    cuts: Mapping[int, Sequence[int]],
    epochs: int,
) -> pd.DataFrame:
    """`drift` of every model (by its norm), optimizer and setting, after more and more updates.

    `cuts` has the sizes of the micro-batches for each effective batch size. The columns are the
    "first gradient", and the weights after "one update", "one epoch" and "{epochs} epochs".
    """
    rungs = {}
    for name, optimizer, size in product(models, OPTIMIZERS, cuts):
        table = drift(models[name], optimizer, losses, images, size, cuts[size], epochs)
        for setting, rows in table.groupby("setting", sort=False):
            rungs[name, optimizer, setting] = {
                "first gradient": rows["gradient"].iloc[0],
                "one update": rows["weights"].iloc[0],
                "one epoch": rows["weights"][rows["epoch"] == 1].iloc[-1],
                f"{epochs} epochs": rows["weights"].iloc[-1],
            }
    table = pd.DataFrame.from_dict(rungs, orient="index")
    return table.rename_axis(["norm", "optimizer", "setting"])
