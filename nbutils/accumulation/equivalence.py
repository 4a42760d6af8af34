"""Trains on large batches and on the same batches accumulated, side by side, and measures how far
the weights drift apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from nbutils.accumulation.vectors import flat_gradient, relative_difference
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


def small_cnn(norm: str | Callable[[int], nn.Module]) -> nn.Module:
    """A network for 28 x 28 images, small enough to train in float64 in seconds.

    `norm` is a key of `NORMS`, or a function that makes a layer for a number of channels.
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

    Returns:
        One row per update and size of micro-batch: `setting` ("8 x 128": steps x images),
        `update` and `epoch` (from 1), `images` in the window, and `gradient` and `weights`: the
        norm of the difference from the copy with large batches, relative to the norm of that
        copy. After the first update gradients are taken at weights that already differ.
    """
    models = [copy.deepcopy(model) for _ in (effective_batch_size, *batch_sizes)]
    optimizers = [OPTIMIZERS[optimizer](list(each.parameters())) for each in models]
    all_losses = [losses, *[losses_accumulated or losses] * len(batch_sizes)]
    rows, update = [], 0
    generator = torch.Generator().manual_seed(0)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(images, generator=generator)
        for (window,) in windows(order, effective_batch_size, accumulation_steps=1):
            update += 1
            seen = []
            for number, size in enumerate((effective_batch_size, *batch_sizes)):
                optimizers[number].zero_grad()
                each_loss = partial(all_losses[number], models[number])
                accumulate_gradient(models[number], window.split(size), each_loss)
                optimizers[number].step()
                weights = parameters_to_vector(models[number].parameters()).detach()
                seen.append((flat_gradient(models[number]), weights))
            (true_gradient, true_weights), *others = seen
            for size, (gradient, weights) in zip(batch_sizes, others, strict=True):
                setting = f"{-(-effective_batch_size // size)} x {size}"
                apart = relative_difference(gradient, true_gradient)
                drifted = relative_difference(weights, true_weights)
                rows.append((setting, update, epoch, len(window), apart, drifted))
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

    `cuts` has the sizes of the micro-batches for each effective batch size. Columns: the
    differences of the "first gradient", and of the weights after "one update", "one epoch" and
    "{epochs} epochs".
    """
    tables = {
        (name, optimizer, size): drift(model, optimizer, losses, images, size, sizes, epochs)
        for name, model in models.items()
        for optimizer in OPTIMIZERS
        for size, sizes in cuts.items()
    }
    keys = ["norm", "optimizer", "setting"]
    table = pd.concat(tables, names=["norm", "optimizer", "size"]).reset_index()
    groups = table.groupby(keys, sort=False)
    in_first_epoch = table[table["epoch"] == 1].groupby(keys, sort=False)
    return pd.DataFrame(
        {
            "first gradient": groups["gradient"].first(),
            "one update": groups["weights"].first(),
            "one epoch": in_first_epoch["weights"].last(),
            f"{epochs} epochs": groups["weights"].last(),
        }
    )
